"""The analysis of gates from the command line."""

import argparse
import logging
import os
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from senet_transfer.analysis.excitations.collect import collect_excitations, trunk_of
from senet_transfer.analysis.excitations.figures import write_blocks, write_overview
from senet_transfer.analysis.excitations.gates import gates_of
from senet_transfer.analysis.excitations.prune import (
    measure_pruning,
    pruned_config,
    pruning_table,
    save_pruned,
)
from senet_transfer.analysis.excitations.tables import block_table, write_csv
from senet_transfer.cli.arguments import Parser, add_running_arguments
from senet_transfer.data.base import ClassificationDataset
from senet_transfer.data.build import find_dataset
from senet_transfer.data.cifar.in_memory import load_images
from senet_transfer.data.cifar.open import ArrayDataset, is_prepared
from senet_transfer.data.classification.open import open_dataset
from senet_transfer.data.detection.crops import CocoCrops
from senet_transfer.data.images.transforms import EvalTransform
from senet_transfer.engine.checkpoints.checkpointer import Checkpointer
from senet_transfer.engine.model_from import model_config
from senet_transfer.engine.setup import use_available_device
from senet_transfer.errors import UserError

logger = logging.getLogger(__name__)


def analysis_parser(description: str | None) -> argparse.ArgumentParser:
    """The command line of the analysis."""
    parser = Parser(description=description)
    add = parser.add_argument
    add("--weights", required=True, help="of an SE network, a classifier or a detector")
    add("--model", default="", help="its name, where nothing else tells")
    add("--config-file", default="", help="its config; default: the config.yaml beside it")
    add("--data", required=True, help="labelled images")
    add("--images", help="folder of images, where --data is a JSON in COCO's format")
    add("--output", required=True, help="folder for figures and tables")
    add("--classes", nargs="+", help="names of the classes to draw; default: some at random")
    add("--num-classes", type=int, default=4, help="how many, where they are drawn (4)")
    add("--images-per-class", type=int, default=50, help="of every class (50)")
    add("--channels", type=int, default=50, help="channels a figure (50)")
    add("--seed", type=int, default=0, help="of images, classes and channels (0)")
    add("--prune-stage", type=int, nargs="+", default=[], help="drop the gates of these stages")
    add_running_arguments(parser)
    return parser


def run_analysis(args: argparse.Namespace) -> None:
    """Watches, draws, and prunes where asked to; prints what was found.

    Raises:
        UserError: a file is missing or does not fit the rest.
    """
    if args.channels < 1:
        raise UserError(f"--channels is {args.channels}, expected 1 or more.")
    try:
        os.makedirs(args.output, exist_ok=True)
    except OSError as error:
        raise UserError(f"The folder {args.output} can't be made: {error}.") from error
    dataset = open_images(args.data, args.images)
    cfg, model = load_trained_model(args)
    gates_of(trunk_of(model))
    # Refused before the long part begins.
    pruned = pruned_config(cfg, model, args.prune_stage) if args.prune_stage else None
    transform = _transform(cfg, model)
    reading = {"batch_size": args.batch_size, "workers": args.workers, "quiet": args.quiet}
    found = collect_excitations(
        model,
        dataset,
        transform,
        images_per_class=args.images_per_class,
        classes=args.classes,
        num_classes=args.num_classes,
        seed=args.seed,
        **reading,
    )
    written = write_csv(found, args.output)
    drawing = {"channels": args.channels, "seed": args.seed}
    written += write_overview(found, args.output, **drawing)
    written += write_blocks(found, os.path.join(args.output, "blocks"), **drawing)
    print(f"{found.images} images of {found.classes} classes of {dataset.origin}")
    print(block_table(found))
    print(f"{len(written)} figures and tables in {args.output}")
    if pruned is not None:
        rows = measure_pruning(pruned, model, found, dataset, transform, **reading)
        print(f"Without the gates of stage {', '.join(map(str, args.prune_stage))}:")
        print(pruning_table(rows))
        pruned.DATASETS.CLASSES = dataset.classes
        print(f"Written: {save_pruned(pruned, rows, os.path.join(args.output, 'pruned'))}")


def open_images(data: str, images: str | None) -> ClassificationDataset:
    """Labelled images of any kind; as :func:`~.data.classification.open.open_dataset`.

    Args:
        data: a folder, archive or address of labelled images, a prepared split of CIFAR, by its
            path or as "cifar10_test", or a JSON in COCO's format.
        images: the folder of the latter's images.

    Raises:
        UserError: there is no such data, or it is damaged.
    """
    if data.endswith(".json") and os.path.basename(data) != "manifest.json":
        if images is None:
            raise UserError(f"{data} is a JSON: name the folder of its images with --images.")
        return CocoCrops(data, images)
    if images is not None:
        raise UserError(f"--images goes with a JSON in COCO's format, and --data is {data}.")
    place = find_dataset(data)
    if is_prepared(place):
        return ArrayDataset(load_images(place))
    return open_dataset(place, split="val")


def load_trained_model(args: argparse.Namespace) -> tuple[CfgNode, nn.Module]:
    """The config and the model of a checkpoint, loaded wholly, in evaluation mode."""
    cfg = model_config(args.model, args.config_file, args.weights, args.opts)
    cfg.MODEL.DEVICE = args.device or cfg.MODEL.DEVICE
    use_available_device(cfg, logger)
    model = build_model(cfg)
    Checkpointer(model, family=cfg.MODEL.WEIGHTS_FAMILY).load(args.weights)
    return cfg, model.eval()


def _transform(cfg: CfgNode, model: nn.Module) -> EvalTransform:
    expected: Any = trunk_of(model).preprocessing
    mode = cfg.INPUT.CLASSIFICATION.TEST_MODE
    return EvalTransform(
        # A gate is of one view of an image.
        mode="short_side" if mode == "ten_crop" else mode,
        resize=expected.resize,
        crop=expected.crop,
        interpolation=expected.interpolation,
    )
