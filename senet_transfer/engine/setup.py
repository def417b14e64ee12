"""Setup of a run: config, logging, datasets, device and checks."""

import contextlib
import importlib.util
import io
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from senet_transfer.config import is_classification
from senet_transfer.config.architectures import PIXELS, predicts
from senet_transfer.config.load import load_config
from senet_transfer.data.build import (
    check_brightness,
    use_class_weights,
    use_classification_datasets,
)
from senet_transfer.data.detection.augmentation.build import crops_images
from senet_transfer.data.detection.coco import (
    CocoDataset,
    register_datasets,
    register_shapes,
    registered_entry,
)
from senet_transfer.data.detection.dataset_checks import (
    category_ids,
    check_datasets_on_disk,
    check_segmentations,
    check_trainable,
    dataset_classes,
    use_class_order,
    warn_of_many_objects,
)
from senet_transfer.data.detection.image_checks import MODES, check_images
from senet_transfer.data.detection.task_checks import stuff_classes, use_keypoints
from senet_transfer.data.reading import reading_of
from senet_transfer.engine.checkpoints import checkpoint_history as history
from senet_transfer.engine.checkpoints.classes import use_trained_classes
from senet_transfer.engine.checkpoints.output_folder import (
    claim_output_folder,
    drop_earlier_log,
    log_size,
)
from senet_transfer.engine.checkpoints.resume import check_changes
from senet_transfer.engine.numerics import apply_settings, resolve_auto, settings
from senet_transfer.engine.recipe.make import use_recipe
from senet_transfer.engine.run_checks import check_run, scratch_hint
from senet_transfer.errors import RunError, UserError, check_choice
from senet_transfer.evaluation.evaluators import check_evaluators
from senet_transfer.utils.environment import environment_report
from senet_transfer.utils.text import counted
from senet_transfer.weights import apply_file_geometry
from senet_transfer.weights.file_geometry import examine_config_weights
from senet_transfer.weights.hub.catalogue import catalogue_entry, names_published
from senet_transfer.weights.mapping.source import Source

# Environment variables that launchers use to count how often they have restarted the command.
_RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


@dataclass(frozen=True)
class RunOptions:
    """Options for a training or evaluation run.

    Attributes:
        config_file: A YAML file, or the name of one of this project's configs. If empty, the
            default config is used.
        options: Alternating config keys and values that override the config file.
        datasets: Datasets to register, each as (name, annotations) or (name, annotations, image
            folder); see ``DATASETS.REGISTER``.
        classes: The class order of a classifier: "numeric", or a file with one class name per
            line.
        resume: If True, continue from the newest checkpoint in ``OUTPUT_DIR``.
        eval_only: If True, evaluate ``MODEL.WEIGHTS`` without training.
        deterministic: If True, set the config key ``DETERMINISTIC`` to True.
        quiet: If True, print only warnings. The full log is always written to ``log.txt``.
        overwrite: If True, delete the files of an earlier run in ``OUTPUT_DIR`` before training.
        data: Training data. If set, the run uses a config created for this data instead of
            ``config_file``.
        val: Validation data. If empty, it is found in ``data`` or split off from the training data.
        images: Image folder for the JSON files in ``data`` and ``val``. If empty, the folder is
            found automatically.
    """

    config_file: str = ""
    options: Sequence[str] = ()
    datasets: Sequence[Sequence[str]] = ()
    classes: str = ""
    resume: bool = False
    eval_only: bool = False
    deterministic: bool = False
    quiet: bool = False
    overwrite: bool = False
    data: str = ""
    val: str = ""
    images: str = ""


def setup(options: RunOptions) -> CfgNode:
    """Set up a run: load the config, start logging, register the datasets and check everything.

    The full config, the command line and the package versions are written to the output folder.

    Args:
        options: The run's options. If a launcher has restarted the run after a failure, the run is
            resumed even if ``resume`` is False; see :func:`resumes`.

    Returns:
        The frozen config.

    Raises:
        UserError: If the run can't start with these options.
    """
    try:
        with use_recipe(options, resume=options.resume or restarted()) as used:
            cfg = _prepare(used)
    except UserError as error:
        error.on_all_ranks = True
        raise
    cfg.freeze()
    _start(cfg, options)
    return cfg


def _start(cfg: CfgNode, options: RunOptions) -> None:
    """Start a run as Detectron2's ``default_setup`` does, but write the config file atomically."""
    rank = comm.get_rank()
    _logger("fvcore", cfg, quiet=options.quiet)
    logger = _logger("detectron2", cfg, quiet=options.quiet)
    logger.info("Rank of current process: %d. World size: %d", rank, comm.get_world_size())
    logger.info("Options: %s", options)
    if comm.is_main_process():
        logger.info("Running with full config:\n%s", cfg.dump())
        history.write_text(Path(cfg.OUTPUT_DIR, "config.yaml"), cfg.dump())
        environment = environment_report()
        logger.info("Environment:\n%s", environment)
        history.write_text(Path(cfg.OUTPUT_DIR, "environment.txt"), environment)
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + rank)
    if not options.eval_only:
        apply_settings(cfg)
        said = ", ".join(f"{key} {value}" for key, value in settings(cfg).items())
        logger.info("Settings that affect rounding on %s: %s", cfg.MODEL.DEVICE, said)


def resumes(cfg: CfgNode, options: RunOptions) -> bool:
    """Return whether a run resumes from a checkpoint.

    A run resumes if ``options.resume`` is set. A training run also resumes if torchrun or SLURM
    has restarted it after a failure and a checkpoint exists. All processes of a job must call this
    function together.
    """
    if options.resume or options.eval_only:
        return options.resume
    # The main process decides: on a shared file system, other processes may not see a new
    # checkpoint yet.
    return comm.all_gather(restarted() and bool(history.checkpoints(cfg.OUTPUT_DIR)))[0]


def restarted() -> bool:
    """Return whether torchrun or SLURM has started this command again after a failure."""
    counts = (os.environ.get(name, "") for name in _RESTARTS)
    return any(count.isdigit() and int(count) > 0 for count in counts)


def check_overwrite(options: RunOptions) -> None:
    """Raise a UserError if --overwrite is combined with --resume or --eval-only."""
    if options.overwrite and (options.resume or options.eval_only):
        raise UserError(
            "--overwrite deletes an earlier run, so it can't be combined with "
            f"{'--resume' if options.resume else '--eval-only'}. Remove one of the two."
        )


def _prepare(options: RunOptions) -> CfgNode:
    eval_only = options.eval_only
    check_overwrite(options)
    cfg = load_config(options.config_file, list(options.options))
    logged = log_size(cfg.OUTPUT_DIR)
    logger = _start_logging(cfg, quiet=options.quiet)
    resume = resumes(cfg, options)
    if resume and not options.resume:
        logger.warning("The launcher has restarted this command. Resuming the run.")
    use_available_device(cfg, logger)
    cfg.DETERMINISTIC = cfg.DETERMINISTIC or options.deterministic
    before = _config_of_start(cfg, logger) if resume and not eval_only else None
    resolve_auto(cfg, before)
    cfg.DATASETS.REGISTER = [*cfg.DATASETS.REGISTER, *map(list, options.datasets)]
    if is_classification(cfg):
        use_classification_datasets(cfg, eval_only=eval_only, classes=options.classes)
    else:
        if options.classes:
            raise UserError(
                f"--classes is {options.classes}, but it is only supported for classifiers. The "
                "classes of a detector are read from its JSON files. Remove --classes."
            )
        use_named_datasets(cfg, options, logger)
        use_datasets(cfg, eval_only=eval_only, keep_classes=eval_only or resume)
    check_run(cfg, eval_only=eval_only, resume=resume)
    _check_images(cfg, eval_only=eval_only)
    resumed = str(history.newest_whole(cfg.OUTPUT_DIR)) if resume else None
    source = _examine_weights(cfg, resumed, eval_only=eval_only)
    if source:
        apply_file_geometry(cfg, source)
        names = [*(() if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST]
        use_trained_classes(cfg, source, names, keeps=eval_only or resume, eval_only=eval_only)
    use_class_weights(cfg, eval_only=eval_only)
    if before:
        check_changes(cfg, before)
    if not (resume or eval_only):
        claim_output_folder(cfg, overwrite=options.overwrite, restarted=restarted())
        if options.overwrite and comm.is_main_process():
            drop_earlier_log(cfg.OUTPUT_DIR, logged)
    return cfg


def _examine_weights(cfg: CfgNode, resumed: str | None, *, eval_only: bool) -> Source | None:
    """Read the weight file, and detect its weight family and architecture.

    If published weights can't be downloaded, the error message recommends a config for training
    without pretrained weights.
    """
    try:
        return examine_config_weights(cfg, resumed)
    except UserError as error:
        name = cfg.MODEL.WEIGHTS
        if eval_only or resumed or not names_published(name) or catalogue_entry(name).path.exists():
            raise
        raise UserError(f"{error} {scratch_hint(cfg)}") from error


def _config_of_start(cfg: CfgNode, logger: logging.Logger) -> CfgNode | None:
    """Return the original config of the run to resume, or None if it can't be read."""
    try:
        return load_config(os.path.join(cfg.OUTPUT_DIR, "config.yaml"))
    except UserError as error:
        logger.warning("Can't compare the config with the run's original config: %s", error)
        return None


def _start_logging(cfg: CfgNode, *, quiet: bool) -> logging.Logger:
    try:
        if comm.is_main_process():
            os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
        return _logger("senet_transfer", cfg, quiet=quiet)
    except OSError as error:
        raise UserError(
            f"Can't write to the output folder {cfg.OUTPUT_DIR}: {error}. "
            "Set OUTPUT_DIR to a writable folder."
        ) from error


def _logger(name: str, cfg: CfgNode, *, quiet: bool) -> logging.Logger:
    """Return a logger set up by Detectron2.

    If ``quiet`` is True, the logger prints only warnings and errors. Detectron2 also logs all
    results in a format for spreadsheets. These lines are written to ``log.txt``, but not printed.
    """
    logger = setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name=name)
    escape_names(logger)
    for handler in logger.handlers:
        if getattr(handler, "stream", None) is sys.stdout:
            handler.addFilter(_is_for_people)
            if quiet:
                handler.setLevel(logging.WARNING)
    return logger


def escape_names(logger: logging.Logger) -> None:
    """Make a logger's handlers escape characters of file names that can't be encoded."""
    for handler in logger.handlers:
        stream = getattr(handler, "stream", None)
        if isinstance(stream, io.TextIOWrapper) and not stream.closed:
            stream.reconfigure(errors="backslashreplace")


def _is_for_people(record: logging.LogRecord) -> bool:
    # Detectron2 logs the traceback of every exception, but these errors are printed at the end.
    if record.exc_info and isinstance(record.exc_info[1], UserError | RunError):
        return False
    message = record.getMessage()
    return not message.startswith("copypaste:") and not message.endswith("in csv format:")


def use_available_device(cfg: CfgNode, logger: logging.Logger) -> None:
    """Set ``MODEL.DEVICE`` to "cpu" if it is a GPU and the machine has no GPUs.

    Raises:
        UserError: If ``MODEL.DEVICE`` is invalid, or if it is a GPU that does not exist.
    """
    cfg.MODEL.DEVICE = available_device(cfg.MODEL.DEVICE, logger)


def available_device(name: str, logger: logging.Logger) -> str:
    """Return the device name, or "cpu" with a warning if it is a GPU and no GPU is available.

    Raises:
        UserError: If the name is invalid, or if its GPU index is too high for this machine.
    """
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise UserError(
            f"The device is {name!r}; expected cuda or cpu. Set MODEL.DEVICE to one of them."
        ) from error
    if device.type != "cuda":
        return name
    if not torch.cuda.is_available():
        logger.warning(
            "No GPU is available. Running on the CPU with %s.",
            counted(torch.get_num_threads(), "thread"),
        )
        return "cpu"
    if (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"The device is {name}, but this machine has only "
            f"{counted(torch.cuda.device_count(), 'GPU')}. The first GPU has the index 0. Set "
            "MODEL.DEVICE to an available GPU, such as cuda:0."
        )
    return name


def use_named_datasets(cfg: CfgNode, options: RunOptions, logger: logging.Logger) -> None:
    """Set the config to train on the first dataset of ``--dataset`` and evaluate on the second.

    ``DATASETS.TRAIN`` or ``DATASETS.TEST`` is only changed if it names a dataset that is not
    registered, as in the recipes for a user's own data, and if the command line does not set the
    key. With ``--eval-only``, a single dataset is evaluated.

    Args:
        cfg: The config, which is changed in place.
        options: The run's options.
        logger: The logger for messages about changed keys.
    """
    register_shapes()
    # A malformed entry or name is rejected when the datasets are registered and checked.
    entries = [
        entry for entry in cfg.DATASETS.REGISTER if isinstance(entry, list | tuple) and entry
    ]
    registered = {str(entry[0]) for entry in entries} | set(DatasetCatalog)
    named = [entry[0] for entry in options.datasets]
    chosen = {"TRAIN": named[:1], "TEST": named[:1] if options.eval_only else []}
    chosen["TEST"] = named[1:2] or chosen["TEST"]
    for key, names in chosen.items():
        configured = cfg.DATASETS[key]
        given = f"DATASETS.{key}" in options.options[::2]
        if not all(isinstance(name, str) for name in configured):
            continue
        if names and not given and configured and not registered.issuperset(configured):
            logger.info(
                "DATASETS.%s is set to %s, which --dataset registers, because the config's %s is "
                "not registered.",
                key,
                names[0],
                ", ".join(sorted(set(configured) - registered)),
            )
            cfg.DATASETS[key] = tuple(names)


def use_datasets(cfg: CfgNode, *, eval_only: bool = False, keep_classes: bool = False) -> None:
    """Register and check the config's datasets, and copy their classes to the config.

    Args:
        cfg: The config, which is changed in place.
        eval_only: If True, ignore ``DATASETS.TRAIN``.
        keep_classes: If True, the classes in the config belong to a trained model, and the datasets
            must have the same classes.

    Raises:
        UserError: If a dataset is unknown, missing on disk or malformed, or if its classes differ
            from the classes of the other datasets or of the model.
    """
    names = register_datasets(
        cfg.DATASETS.REGISTER, segmentations=cfg.MODEL.MASK_ON, upright=reading_of(cfg).upright
    )
    registered = [registered_entry(name) for name in names]
    # Store absolute paths, so that the saved config works from any folder.
    cfg.DATASETS.REGISTER = [
        [d.name, d.json_file, d.image_dir] for d in registered if isinstance(d, CocoDataset)
    ]
    needed = "TEST" if eval_only else "TRAIN"
    if not cfg.DATASETS[needed]:
        raise UserError(
            f"DATASETS.{needed} is empty. Set it to a tuple of dataset names such as "
            "\"('coco_2017_val',)\"."
        )
    names = [*(() if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST]
    if not all(isinstance(name, str) for name in names):
        raise UserError(
            f"DATASETS.TRAIN and DATASETS.TEST contain {names!r}; expected dataset names such as "
            "'coco_2017_val'."
        )
    check_datasets_on_disk(names, evaluated=cfg.DATASETS.TEST)
    check_evaluators(cfg, () if eval_only else cfg.DATASETS.TRAIN, cfg.DATASETS.TEST)
    _use_stuff(cfg, names, keep_classes=keep_classes)
    if predicts(cfg) == {PIXELS}:
        cfg.DATASETS.CLASSES, cfg.DATASETS.CATEGORY_IDS = [], []
        return
    if cfg.MODEL.KEYPOINT_ON:
        use_keypoints(cfg, names)
    classes = dataset_classes(names)
    if not eval_only:
        check_trainable(cfg.DATASETS.TRAIN)
    warn_of_many_objects(cfg.DATASETS.TEST, cfg.TEST.DETECTIONS_PER_IMAGE)
    if cfg.MODEL.MASK_ON:
        _use_mask_format(cfg, names)
    trained = list(cfg.DATASETS.CLASSES)
    if keep_classes and trained and trained != classes and not use_class_order(names, trained):
        raise UserError(
            f"The model was trained on the classes {trained}, but {names[0]} has the classes "
            f"{classes}. To evaluate the model or resume its training, use data with the same "
            "classes."
        )
    classes = trained if keep_classes and trained else classes
    cfg.DATASETS.CLASSES = classes
    cfg.DATASETS.CATEGORY_IDS = category_ids(names[0])
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(classes)
    cfg.MODEL.RETINANET.NUM_CLASSES = len(classes)


def _use_stuff(cfg: CfgNode, names: Sequence[str], *, keep_classes: bool) -> None:
    """Copy the data's semantic segmentation classes to the config, if the model predicts them."""
    if PIXELS not in predicts(cfg):
        cfg.DATASETS.STUFF_CLASSES = []
        return
    classes, ignored = stuff_classes(names)
    trained = list(cfg.DATASETS.STUFF_CLASSES)
    if keep_classes and trained and trained != classes:
        raise UserError(
            f"The model was trained on the segmentation classes {trained}, but {names[0]} has the "
            f"classes {classes}. Use data with the same classes in the same order."
        )
    cfg.DATASETS.STUFF_CLASSES = classes
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = len(classes)
    cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE = ignored


def _check_images(cfg: CfgNode, *, eval_only: bool) -> None:
    """Check a run's images in the main process. Errors are raised in all processes.

    For a classifier, only warn about 16-bit images that would be almost black.

    Raises:
        UserError: If images are unreadable, or if their sizes differ from the annotations.
    """
    if is_classification(cfg):
        if comm.is_main_process():
            # All processes report data that can't be read when they open it.
            with contextlib.suppress(UserError):
                check_brightness(cfg, eval_only=eval_only)
        return
    check_choice("DATALOADER.CHECK_IMAGES", cfg.DATALOADER.CHECK_IMAGES, MODES)
    problem = ""
    if comm.is_main_process():
        names = [*(() if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST]
        try:
            check_images(
                names,
                mode=cfg.DATALOADER.CHECK_IMAGES,
                reading=reading_of(cfg),
                max_size=min(cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TEST),
            )
        except UserError as error:
            problem = str(error)
    problem = comm.all_gather(problem)[0]
    if problem:
        raise UserError(problem)


def _use_mask_format(cfg: CfgNode, names: Sequence[str]) -> None:
    """Check the ``segmentation`` of all objects.

    If any mask is run-length encoded, set ``INPUT.MASK_FORMAT`` to "bitmask".

    Raises:
        UserError: If a ``segmentation`` is missing or invalid, or a required package is not
            installed.
    """
    check_choice("INPUT.MASK_FORMAT", cfg.INPUT.MASK_FORMAT, ("polygon", "bitmask"))
    if check_segmentations(names) and cfg.INPUT.MASK_FORMAT == "polygon":
        cfg.INPUT.MASK_FORMAT = "bitmask"
        logging.getLogger(__name__).info(
            "INPUT.MASK_FORMAT is set to bitmask, because some masks are run-length encoded."
        )
    crops = crops_images(cfg) and cfg.INPUT.MASK_FORMAT == "polygon"
    if crops and importlib.util.find_spec("shapely") is None:
        key = "CROP" if cfg.INPUT.CROP.ENABLED else "LARGE_SCALE_JITTER"
        raise UserError(
            f"INPUT.{key}.ENABLED is True, which requires the package shapely for polygon masks, "
            "but shapely is not installed. Run pip install shapely, or set INPUT.MASK_FORMAT to "
            "bitmask."
        )
