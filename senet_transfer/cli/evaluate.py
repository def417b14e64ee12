"""The evaluation of classifiers from the command line."""

import argparse
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import build_model

from senet_transfer.cli.arguments import Parser, add_running_arguments
from senet_transfer.config import is_classification
from senet_transfer.config.load import load_config
from senet_transfer.data.base import ClassificationDataset
from senet_transfer.data.build import find_dataset, in_memory
from senet_transfer.data.cifar.in_memory import SIDE, ImageArrays
from senet_transfer.data.cifar.open import open_cifar
from senet_transfer.data.classification.open import open_dataset
from senet_transfer.data.images.transforms import EVAL_MODES, EvalTransform
from senet_transfer.engine.checkpoints.checkpointer import Checkpointer
from senet_transfer.engine.results import write_results
from senet_transfer.engine.setup import available_device, use_available_device
from senet_transfer.errors import UserError
from senet_transfer.evaluation.classification import Evaluation, evaluate_classifier
from senet_transfer.evaluation.paper_results import IMAGENET, Published, published_on_cifar
from senet_transfer.models.build import backbone_name
from senet_transfer.models.classifier import create_classifier
from senet_transfer.models.image_classifier import ImageClassifier, wrap_classifier
from senet_transfer.models.registry import model_entry
from senet_transfer.weights import apply_file_geometry
from senet_transfer.weights.file_geometry import local_weights

logger = logging.getLogger(__name__)


def evaluation_parser(description: str | None) -> argparse.ArgumentParser:
    """The command line of the evaluation tools."""
    parser = Parser(description=description)
    add = parser.add_argument
    add("--model", help="a name of senet_transfer.list_models()")
    add("--weights", help="a weight file; default: MODEL.WEIGHTS of the config")
    add("--family", help="of the weight file, where its names are those of several")
    add("--config-file", help="in place of --model; default: the config.yaml beside the weights")
    add("--data", help="shards, a folder or an archive; default: DATASETS.TEST of the config")
    add("--output", help="a JSON to write")
    add("--crop-mode", choices=EVAL_MODES, help="default: short_side, or as the config says")
    add("--resize", type=int, help="pixels to resize to; default: the model's")
    add("--crop", type=int, help="pixels to crop to; default: the model's")
    add("--predictions", help="a CSV to write: key, label and the best five classes of each image")
    add("--logits", action="store_true", help="the CSV has the logits, too")
    add_running_arguments(parser)
    return parser


def run_evaluation(args: argparse.Namespace, published: Sequence[Published] = ()) -> dict[str, Any]:
    """Evaluates as a command line says, prints what was found, and writes it.

    Args:
        args: of :func:`evaluation_parser`.
        published: others' results on the same data, to be printed beside.

    Returns:
        What is written to ``--output``.

    Raises:
        UserError: a file is missing or does not fit the rest.
    """
    for path in (args.output, args.predictions):
        _check_writable(path)
    if args.logits and not args.predictions:
        raise UserError("--logits go into the CSV of --predictions, which is not given.")
    cfg = _config(args)
    dataset = _dataset(args, cfg)
    model = _model(args, cfg, dataset)
    transform = _transform(args, cfg, model)
    found = evaluate_classifier(
        model,
        dataset,
        transform,
        batch_size=args.batch_size,
        workers=args.workers,
        keep_predictions=args.predictions is not None,
        keep_logits=args.logits,
        quiet=args.quiet,
    )
    family = getattr(model.backbone, "weights_source", {}).get("family")
    name = args.model or backbone_name(cfg)
    published = published or _published(found, dataset.origin, name, family)
    result = {
        **found.summary(),
        "model": name if args.model or cfg.MODEL.BACKBONE.ARCH else args.config_file,
        "weights": args.weights,
        "family": family,
        "data": dataset.origin,
        "view": asdict(transform),
        "published": [asdict(row) for row in published],
    }
    _print(found, result["model"], published)
    if args.predictions:
        found.write_predictions(args.predictions)
    if args.output:
        write_results(args.output, result)
    return result


def _published(
    found: Evaluation, origin: str, name: str, family: str | None
) -> tuple[Published, ...]:
    """What others have published of this network on this data."""
    row = published_on_cifar(origin, name)
    if not row and len(found.classes) == 1000:
        row = IMAGENET.get((family, name))
    return (row,) if row else ()


def _check_writable(path: str | None) -> None:
    """Finds out before the evaluation whether there is a place for what it finds."""
    if not path:
        return
    folder = os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} can't be written: {error}. Take another place.") from error
    if os.path.isdir(path) or not os.access(folder, os.W_OK):
        raise UserError(f"{path} can't be written: it is a folder, or in one that is read-only.")


def _config(args: argparse.Namespace) -> CfgNode | None:
    """The config of the model, unless it is known by its name alone."""
    if args.model and args.config_file:
        raise UserError("--model and --config-file both say what the model is. Give one of them.")
    if args.model:
        if args.opts:
            raise UserError(f"Config options ({' '.join(args.opts)}) go with --config-file.")
        if not args.weights:
            raise UserError("--model needs --weights: random weights are not worth evaluating.")
        return None
    beside = os.path.join(os.path.dirname(args.weights or ""), "config.yaml")
    if not args.config_file and not os.path.isfile(beside):
        raise UserError(
            "What is the model? Give --model NAME (see senet_transfer.list_models()) or "
            f"--config-file; there is no {beside} either."
        )
    args.config_file = args.config_file or beside
    cfg = load_config(args.config_file, args.opts)
    if not is_classification(cfg):
        raise UserError(
            f"{args.config_file} is of a {cfg.MODEL.META_ARCHITECTURE}, expected a classifier "
            "(MODEL.META_ARCHITECTURE ImageClassifier). tools/train_net.py --eval-only evaluates "
            "detectors."
        )
    args.weights = args.weights or cfg.MODEL.WEIGHTS
    if not args.weights:
        raise UserError("Neither --weights nor MODEL.WEIGHTS names a weight file. Give one.")
    return cfg


def _dataset(args: argparse.Namespace, cfg: CfgNode | None) -> ClassificationDataset | ImageArrays:
    name = args.data or (cfg.DATASETS.TEST[0] if cfg and cfg.DATASETS.TEST else None)
    if not name:
        raise UserError("There is no data to evaluate on. Name it with --data.")
    classes = list(cfg.DATASETS.CLASSES) if cfg else []
    small = in_memory(cfg) if cfg else model_entry(args.model).preprocessing.resize == SIDE
    if small:
        return open_cifar(find_dataset(name), split="test", classes=classes or None)
    cache = cfg.DATALOADER.CACHE_DIR if cfg else ""
    return open_dataset(
        find_dataset(name), split="val", classes=classes or None, cache_dir=cache or None
    )


def _model(
    args: argparse.Namespace, cfg: CfgNode | None, dataset: ClassificationDataset
) -> ImageClassifier:
    local_weights(args.weights)  # found, or refused, before a network is built
    if cfg is None:
        classifier = create_classifier(
            args.model, dataset.num_classes, weights=args.weights, family=args.family
        )
        model = wrap_classifier(classifier)
        model.to(available_device(args.device or "cuda", logger))
        family = args.family or ""
    else:
        cfg.MODEL.DEVICE = args.device or cfg.MODEL.DEVICE
        use_available_device(cfg, logger)
        cfg.MODEL.CLASSIFIER.NUM_CLASSES = dataset.num_classes
        cfg.MODEL.WEIGHTS_FAMILY = family = args.family or cfg.MODEL.WEIGHTS_FAMILY
        cfg.MODEL.WEIGHTS = args.weights
        apply_file_geometry(cfg)
        model = build_model(cfg)
    # Wholly this time: a classifier of other classes would be evaluated untrained.
    Checkpointer(model, family=family).load(args.weights)
    return model.eval()


def _transform(
    args: argparse.Namespace, cfg: CfgNode | None, model: ImageClassifier
) -> EvalTransform:
    view = model.preprocessing
    default = cfg.INPUT.CLASSIFICATION.TEST_MODE if cfg else "short_side"
    return EvalTransform(
        mode=args.crop_mode or default,
        resize=view.resize if args.resize is None else args.resize,
        crop=view.crop if args.crop is None else args.crop,
        interpolation=view.interpolation,
    )


def _print(found: Evaluation, name: str, published: Sequence[Published]) -> None:
    rows = [(name, found.top1_error, found.top5_error, "this run")]
    rows += [(row.name, row.top1_error, row.top5_error, row.source) for row in published]
    width = max(len(row[0]) for row in rows)
    print(f"{found.images} images, {found.images / found.seconds:.1f} images/s")
    print(f"{'':{width}}  top-1 error  top-5 error")
    for title, top1, top5, source in rows:
        top5 = "-" if top5 is None else f"{top5:.2f}"
        print(f"{title:{width}}  {top1:11.2f}  {top5:>11}  ({source})")
    print("Worst classes (top-1 error, images):")
    for row in found.worst_classes():
        print(f"  {row['top1_error']:6.2f}  {row['images']:6d}  {row['class']}")
    print("Most confused (images):")
    for row in found.most_confused():
        print(f"  {row['images']:6d}  {row['class']} taken for {row['taken_for']}")
