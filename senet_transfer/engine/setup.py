"""From a command line to a config that a run can start with."""

import argparse
import difflib
import logging
import os
import sys
from importlib import metadata, resources
from pathlib import Path

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from senet_transfer.config import config_items, get_senet_config
from senet_transfer.data.build import is_classification, use_classification_datasets
from senet_transfer.data.detection.coco import register_datasets, registered_entry
from senet_transfer.data.detection.dataset_checks import (
    category_ids,
    check_datasets_on_disk,
    check_segmentations,
    dataset_classes,
)
from senet_transfer.engine.checkpoints import checkpoint_history as history
from senet_transfer.engine.checkpoints.resume import check_changes
from senet_transfer.engine.run_checks import check_run
from senet_transfer.errors import UserError
from senet_transfer.weights import apply_file_geometry

_RECORDED = (
    "senet_transfer", "torch", "torchvision", "numpy", "pillow", "fvcore", "iopath",
    "pycocotools", "opencv-python-headless", "omegaconf", "yacs",
)  # fmt: skip

# How often a launcher has started the same command again.
_RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


def load_config(config_file: str, options: list[str] = ()) -> CfgNode:
    """Reads a config file and options over it, on this project's defaults.

    Args:
        config_file: a YAML file, or the name of one of this project's; empty for the defaults
            alone.
        options: alternating keys and values, as on a command line.

    Raises:
        UserError: a missing or malformed file, an unknown key, a value of the wrong type.
    """
    cfg = get_senet_config()
    if config_file:
        config_file = find_config(config_file)
        _check_config_file(config_file)
        # Detectron2's default would run code that a file names in a YAML tag.
        _merge(cfg, config_file, lambda path: cfg.merge_from_file(path, allow_unsafe=False))
    merge_options(cfg, options)
    return cfg


def merge_options(cfg: CfgNode, options: list[str]) -> None:
    """Sets config keys, in place, as on a command line: alternating keys and values.

    Raises:
        UserError: an unknown key, a value of the wrong type.
    """
    if len(options) % 2:
        raise UserError(
            f"Config options come in pairs of KEY VALUE, found {len(options)} words: "
            f"{' '.join(options)}. Put a value that has spaces in quotes."
        )
    if options:
        options = _whole_numbers_as_floats(cfg, list(options))
        _merge(cfg, "the command line", lambda _: cfg.merge_from_list(options))
    _check_nothing_is_missing(cfg)


def _check_nothing_is_missing(cfg: CfgNode) -> None:
    """Refuses None where there is a default, which yacs takes for a value of any type."""
    values = dict(config_items(cfg))
    for key, default in config_items(get_senet_config()):
        if default is not None and not isinstance(default, str) and values.get(key) is None:
            raise UserError(
                f"{key} is None, expected a value as its default, {default!r}. Set one, or leave "
                "the key out."
            )


def find_config(name: str) -> str:
    """The path of a config file, which may be one of this project's by name.

    Args:
        name: a path; or such as "faster_rcnn_se_r50", also with "configs/" before it and ".yaml"
            after it, where there is no such file.

    Raises:
        UserError: there is none of either kind.
    """
    if os.path.exists(name) or name.endswith(".py"):
        return name
    own = resources.files("senet_transfer").joinpath("configs")
    stem = name.removeprefix("configs/").removesuffix(".yaml")
    path = own.joinpath(f"{stem}.yaml")
    if path.is_file():
        return str(path)
    names = [entry.name for entry in own.iterdir() if entry.is_file()]
    known = [name.removesuffix(".yaml") for name in names if name.endswith(".yaml")]
    near = difflib.get_close_matches(stem, known, n=3) or sorted(known)
    raise UserError(
        f"There is no config file {name}. Give the path of one, or a name such as "
        f"{', '.join(near)}."
    )


def _check_config_file(path: str) -> None:
    if path.endswith(".py"):
        raise UserError(
            f"{path} is a LazyConfig, which this command doesn't read. Give a YAML config; in "
            "Python, a LazyConfig can hold senet_transfer.create_backbone."
        )
    try:
        with open(path) as file:
            content = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The config file {path} can't be read: {error}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"The config file {path} is not plain YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(
            f"The config file {path} holds {type(content).__name__}, expected keys such as "
            "MODEL and SOLVER with values below them."
        )


def _whole_numbers_as_floats(cfg: CfgNode, options: list[str]) -> list[str]:
    """Makes 90 of a key whose value is 30.0 to 90.0, which yacs refuses as of another type."""
    floats = {key for key, value in config_items(cfg) if isinstance(value, float)}
    return [
        f"{word}.0" if key in floats and str(word).lstrip("-").isdigit() else word
        for key, word in zip([None, *options], options, strict=False)
    ]


def _merge(cfg: CfgNode, source: str, merge) -> None:
    try:
        merge(source)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The config file {source} can't be read: {error}.") from error
    except yaml.YAMLError as error:
        raise UserError(f"The config file {source} is not YAML: {error}") from error
    except KeyError as error:
        raise UserError(f"In {source}: {_explain_key(cfg, str(error.args[0]))}") from error
    except RecursionError as error:
        raise UserError(f"The config file {source} is its own _BASE_. Name another.") from error
    except (ValueError, AssertionError, AttributeError, TypeError, SyntaxError) as error:
        if "Non-existent" in str(error):
            raise UserError(f"In {source}: {_explain_key(cfg, str(error))}") from error
        raise UserError(
            f"In {source}: {error}. Expected a value of the type of the key's default; see "
            "Detectron2's config reference and senet_transfer/config/defaults.py."
        ) from error


def _explain_key(cfg: CfgNode, message: str) -> str:
    key = message.rpartition(": ")[2]
    near = difflib.get_close_matches(key, [name for name, _ in config_items(cfg)], n=3, cutoff=0.6)
    hint = f"Did you mean {' or '.join(near)}?" if near else "It is no key of Detectron2 or ours."
    return f"{message}. {hint}"


def setup(args: argparse.Namespace) -> CfgNode:
    """Makes everything ready for a run: config, logging, data sets, device, checks.

    Writes the full config, the command line and the versions of everything to the output folder.

    Args:
        args: of :func:`senet_transfer.cli.arguments.argument_parser`. ``resume`` is set where
            the launcher has started the same command again after a failure.

    Returns:
        The config, frozen.

    Raises:
        UserError: the run can't start as asked; the message says why and what to do.
    """
    try:
        cfg = _prepare(args)
    except UserError as error:
        error.on_all_ranks = True
        raise
    cfg.freeze()
    _start(cfg, args)
    return cfg


def _start(cfg: CfgNode, args: argparse.Namespace) -> None:
    """As Detectron2's default_setup, which can leave half a config where it is interrupted."""
    rank = comm.get_rank()
    _logger("fvcore", cfg, args)
    logger = _logger("detectron2", cfg, args)
    logger.info("Rank of current process: %d. World size: %d", rank, comm.get_world_size())
    logger.info("Command line arguments: %s", args)
    if comm.is_main_process():
        logger.info("Running with full config:\n%s", cfg.dump())
        history.write_text(Path(cfg.OUTPUT_DIR, "config.yaml"), cfg.dump())
        environment = _environment()
        logger.info("Environment:\n%s", environment)
        history.write_text(Path(cfg.OUTPUT_DIR, "environment.txt"), environment)
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + rank)
    if not args.eval_only:
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK


def _was_restarted(cfg: CfgNode) -> bool:
    """Whether torchrun or SLURM starts this command again, and it has got somewhere before."""
    counts = (os.environ.get(name, "") for name in _RESTARTS)
    again = any(count.isdigit() and int(count) > 0 for count in counts)
    # As the main process sees it: another may see its first checkpoint a moment later.
    return comm.all_gather(again and bool(history.checkpoints(cfg.OUTPUT_DIR)))[0]


def _prepare(args: argparse.Namespace) -> CfgNode:
    if args.config_file:
        args.config_file = find_config(args.config_file)
    cfg = load_config(args.config_file, args.opts)
    logger = _start_logging(cfg, args)
    if not (args.resume or args.eval_only) and _was_restarted(cfg):
        logger.warning("The command was started again after a failure: the run is resumed.")
        args.resume = True
    use_available_device(cfg, logger)
    cfg.DATASETS.REGISTER = [*cfg.DATASETS.REGISTER, *args.dataset]
    if is_classification(cfg):
        use_classification_datasets(cfg, eval_only=args.eval_only)
    else:
        use_datasets(cfg, eval_only=args.eval_only, keep_classes=args.eval_only or args.resume)
    check_run(cfg, eval_only=args.eval_only, resume=args.resume)
    resumed = str(history.newest_whole(cfg.OUTPUT_DIR)) if args.resume else None
    apply_file_geometry(cfg, resumed)
    if args.resume and not args.eval_only:
        _compare_with_begun(cfg, logger)
    return cfg


def _compare_with_begun(cfg: CfgNode, logger: logging.Logger) -> None:
    path = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
    try:
        before = load_config(path)
    except UserError as error:
        logger.warning("Whether the run goes on as it began can't be told: %s", error)
        return
    check_changes(cfg, before)


def _start_logging(cfg: CfgNode, args: argparse.Namespace) -> logging.Logger:
    try:
        if comm.is_main_process():
            os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
        return _logger("senet_transfer", cfg, args)
    except OSError as error:
        raise UserError(
            f"The output folder {cfg.OUTPUT_DIR} can't be written: {error}. "
            "Set OUTPUT_DIR to a folder that can."
        ) from error


def _logger(name: str, cfg: CfgNode, args: argparse.Namespace) -> logging.Logger:
    """Detectron2's logger to the terminal and ``log.txt``; with ``--quiet`` to the latter alone."""
    logger = setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name=name)
    if args.quiet:
        for handler in logger.handlers:
            if getattr(handler, "stream", None) is sys.stdout:
                handler.setLevel(logging.WARNING)
    return logger


def use_available_device(cfg: CfgNode, logger: logging.Logger) -> None:
    """Turns ``MODEL.DEVICE`` to the CPU where the config wants a GPU and there is none.

    Raises:
        UserError: it names no device, or one that is not there.
    """
    cfg.MODEL.DEVICE = available_device(cfg.MODEL.DEVICE, logger)


def available_device(name: str, logger: logging.Logger) -> str:
    """The device of this name; the CPU, with a warning, for a GPU where there is none at all.

    Raises:
        UserError: it names no device, or one that is not there.
    """
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"The device is {name!r}, expected cuda or cpu (MODEL.DEVICE).") from error
    if device.type != "cuda":
        return name
    if not torch.cuda.is_available():
        logger.warning(
            "No GPU is available: running on the CPU, with %d threads.", torch.get_num_threads()
        )
        return "cpu"
    if (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"The device is {name}, and there are {torch.cuda.device_count()} GPUs.")
    return name


def use_datasets(cfg: CfgNode, *, eval_only: bool = False, keep_classes: bool = False) -> None:
    """Registers and checks the config's data sets and takes the classes from them.

    Args:
        cfg: changed in place.
        eval_only: leave out ``DATASETS.TRAIN``.
        keep_classes: whether the classes that the config names already are those of a trained
            model, which the data sets must have.

    Raises:
        UserError: a data set is unknown, not on disk, malformed, or has other classes than the
            rest or the model.
    """
    registered = [registered_entry(name) for name in register_datasets(cfg.DATASETS.REGISTER)]
    # Absolute, so that the saved config works from any folder.
    cfg.DATASETS.REGISTER = [[d.name, d.json_file, d.image_dir] for d in registered]
    needed = "TEST" if eval_only else "TRAIN"
    if not cfg.DATASETS[needed]:
        raise UserError(
            f"DATASETS.{needed} is empty: there is nothing to run on. Name data sets there, such "
            "as \"('coco_2017_val',)\"."
        )
    names = [*(() if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST]
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"DATASETS.TRAIN and DATASETS.TEST hold names, found {names!r}.")
    check_datasets_on_disk(names, evaluated=cfg.DATASETS.TEST)
    classes = dataset_classes(names)
    if cfg.MODEL.MASK_ON:
        check_segmentations(names)
    trained = list(cfg.DATASETS.CLASSES)
    if keep_classes and trained and trained != classes:
        raise UserError(
            f"The model was trained on the classes {trained}, and {names[0]} has {classes}. "
            "Evaluate and resume on data with the same classes in the same order of their ids."
        )
    cfg.DATASETS.CLASSES = classes
    cfg.DATASETS.CATEGORY_IDS = category_ids(names[0])
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(classes)
    cfg.MODEL.RETINANET.NUM_CLASSES = len(classes)


def _environment() -> str:
    versions = []
    for name in _RECORDED:
        try:
            versions.append(f"{name}=={metadata.version(name)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{name}: not installed")
    return "\n\n".join([" ".join(sys.argv), "\n".join(versions), collect_env_info()]) + "\n"
