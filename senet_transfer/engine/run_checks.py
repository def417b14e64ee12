"""Config checks before the start of a run."""

import copy
import difflib
import logging
import os
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
)
from detectron2.utils import comm
from torch import nn

from senet_transfer.config import (
    config_items,
    config_value,
    get_senet_config,
    is_classification,
)
from senet_transfer.config.architectures import OBJECTS, predicts, predicts_rotated_boxes
from senet_transfer.config.validation import check_encoding, check_input, check_ranges
from senet_transfer.data.detection.augmentation.build import check_detection_augmentation
from senet_transfer.data.images.augmentation import ENABLING_KEYS
from senet_transfer.engine.checkpoints import checkpoint_history as history
from senet_transfer.engine.solver import check_epochs
from senet_transfer.errors import UserError, check_choice
from senet_transfer.evaluation.metric_names import check_metric
from senet_transfer.models.build import FPN_BUILDERS, backbone_from_config
from senet_transfer.utils.tracking import check_trackers
from senet_transfer.weights.formats.sniff import sniff
from senet_transfer.weights.hub.catalogue import (
    catalogue_entry,
    names_published,
    nearest_names,
    only_in_timm,
)
from senet_transfer.weights.hub.repositories import hub_weights, is_hub_name

logger = logging.getLogger(__name__)

_OF_DETECTORS = (
    "INPUT.BRIGHTNESS",
    "INPUT.CONTRAST",
    "INPUT.COPY_PASTE",
    "INPUT.LARGE_SCALE_JITTER.ENABLED",
    "INPUT.RIGHT_ANGLES",
    "INPUT.SATURATION",
    "INPUT.VERTICAL_FLIP",
)
_OF_CLASSIFIERS = (
    *(f"INPUT.CLASSIFICATION.{key}" for key in ENABLING_KEYS),
    "MODEL.CLASSIFIER.CLASS_WEIGHTS",
    "MODEL.CLASSIFIER.LOSS",
)


def check_run(cfg: CfgNode, *, eval_only: bool, resume: bool) -> None:
    """Check that a run can start, and warn about settings that are probably wrong.

    Args:
        cfg: The run's config.
        eval_only: True for a run that evaluates without training.
        resume: True for a run that resumes from a checkpoint.

    Raises:
        UserError: If the run can't succeed. The message contains the invalid value and how to fix
            it.
    """
    if resume and not history.checkpoints(cfg.OUTPUT_DIR):
        tag = os.path.join(cfg.OUTPUT_DIR, history.TAG)
        raise UserError(
            f"There is nothing to resume: {tag} does not exist or contains no checkpoint name. "
            "Set OUTPUT_DIR to the output folder of the run to resume, or start a new run without "
            "--resume."
        )
    if cfg.TEST.ENSEMBLE.WEIGHTS and not eval_only:
        raise UserError(
            f"TEST.ENSEMBLE.WEIGHTS is {list(cfg.TEST.ENSEMBLE.WEIGHTS)}, but several detectors "
            "can't be trained together. Set the key to (), or evaluate the detectors with "
            "--eval-only."
        )
    if not resume:
        _check_weights(cfg, eval_only=eval_only)
    _check_names(cfg)
    _check_norms(cfg)
    if not eval_only:
        _check_numbers(cfg)
    check_encoding(config_items(cfg))
    check_input(cfg)
    _check_anchors(cfg)
    check_augmentation(cfg)
    _check_padding(cfg)
    if not eval_only:
        _check_solver(cfg)
        check_trackers(list(cfg.TRACKING))
        _check_task_keys(cfg)
        if not is_classification(cfg):
            check_detection_augmentation(cfg)
            _warn_of_sampler(cfg)
        _warn_of_learning_rate(cfg)


def scratch_hint(cfg: CfgNode) -> str:
    """Return a sentence that recommends a config for training without pretrained weights."""
    name = "scratch_folder" if is_classification(cfg) else "scratch_detector"
    return f"To train without pretrained weights, use --config-file configs/{name}.yaml."


def check_augmentation(cfg: CfgNode) -> None:
    """Raise a UserError if ``TEST.AUG`` or ``TEST.ENSEMBLE`` can't be used with this config."""
    several = bool(cfg.TEST.ENSEMBLE.WEIGHTS)
    if not cfg.TEST.AUG.ENABLED and not several:
        return
    used = "TEST.ENSEMBLE.WEIGHTS is set" if several else "TEST.AUG.ENABLED is True"
    remedy = "TEST.ENSEMBLE.WEIGHTS to ()" if several else "TEST.AUG.ENABLED to False"
    architecture = cfg.MODEL.META_ARCHITECTURE
    problem = ""
    if is_classification(cfg):
        problem = "is a classifier; senet eval has --scales, --crops and --weights for classifiers"
    elif predicts(cfg) != {OBJECTS}:
        problem = f"predicts {' and '.join(sorted(predicts(cfg)))}"
    elif predicts_rotated_boxes(cfg):
        problem = "predicts rotated boxes"
    elif cfg.MODEL.KEYPOINT_ON:
        problem = "predicts keypoints (MODEL.KEYPOINT_ON)"
    elif cfg.MODEL.MASK_ON and (several or architecture != "GeneralizedRCNN"):
        problem = "predicts masks (MODEL.MASK_ON), which are supported only for the test-time "
        problem += "augmentation of a single GeneralizedRCNN"
    if problem:
        raise UserError(
            f"{used}, which requires a box detector, but the {architecture} in this config "
            f"{problem}. Set {remedy}."
        )
    if several and not 0 <= cfg.TEST.ENSEMBLE.IOU < 1:
        raise UserError(
            f"TEST.ENSEMBLE.IOU is {cfg.TEST.ENSEMBLE.IOU}; expected a value in [0, 1)."
        )
    if several and cfg.TEST.LOSS:
        raise UserError(
            "TEST.LOSS is True, but the losses of several detectors can't be combined. Set "
            "TEST.LOSS to False, or TEST.ENSEMBLE.WEIGHTS to ()."
        )


def _check_names(cfg: CfgNode) -> None:
    registries = {
        "MODEL.META_ARCHITECTURE": META_ARCH_REGISTRY,
        "MODEL.BACKBONE.NAME": BACKBONE_REGISTRY,
        "MODEL.PROPOSAL_GENERATOR.NAME": PROPOSAL_GENERATOR_REGISTRY,
        "MODEL.ROI_HEADS.NAME": ROI_HEADS_REGISTRY,
    }
    values = dict(config_items(cfg))
    for key, registry in registries.items():
        known = [name for name, _ in registry]
        # Detectron2 accepts this name although it is not in a registry.
        if values[key] not in (*known, "PrecomputedProposals"):
            near = difflib.get_close_matches(str(values[key]), known, n=3) or sorted(known)
            raise UserError(
                f"{key} is {values[key]!r}, which is not a registered name. Similar or available "
                f"names: {', '.join(near)}. If the name is registered by another project, import "
                "that project first."
            )
    c4 = cfg.MODEL.ROI_HEADS.NAME == "Res5ROIHeads"
    of_ours = cfg.MODEL.BACKBONE.NAME == "build_senet_backbone"
    if c4 and of_ours and cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN":
        entry, _ = backbone_from_config(cfg)
        if entry.has_se and 5 in cfg.MODEL.SE.STAGES:
            raise UserError(
                "MODEL.ROI_HEADS.NAME is Res5ROIHeads, which always builds a res5 stage without "
                "SE blocks, but the backbone has SE blocks. Set MODEL.ROI_HEADS.NAME to "
                "SENetRes5ROIHeads."
            )


def _check_anchors(cfg: CfgNode) -> None:
    """Raise a UserError if anchor sizes or aspect ratios are not nested as Detectron2 requires.

    Detectron2 accepts one list of numbers for all feature maps, or a list that contains either one
    list for all feature maps or one list per feature map.
    """
    anchors, features = cfg.MODEL.ANCHOR_GENERATOR, cfg.MODEL.RPN.IN_FEATURES
    if cfg.MODEL.META_ARCHITECTURE == "RetinaNet":
        features = cfg.MODEL.RETINANET.IN_FEATURES
    elif cfg.MODEL.META_ARCHITECTURE not in ("GeneralizedRCNN", "ProposalNetwork", "PanopticFPN"):
        return
    for leaf in ("SIZES", "ASPECT_RATIOS"):
        key, value = f"MODEL.ANCHOR_GENERATOR.{leaf}", anchors[leaf]
        rows = value if any(isinstance(part, list | tuple) for part in value) else [value]
        numbers = [part for row in rows for part in (row if isinstance(row, list | tuple) else ())]
        nested = all(isinstance(row, list | tuple) and row for row in rows)
        if not nested or any(not isinstance(n, int | float) or n <= 0 for n in numbers):
            raise UserError(
                f"{key} is {value}; expected a list of positive numbers that is shared by all "
                "feature maps, such as [32, 64], or one list per feature map, such as [[32], [64]]."
            )
        if len(rows) not in (1, len(features)):
            raise UserError(
                f"{key} contains {len(rows)} inner lists, but anchors are placed on "
                f"{len(features)} feature maps ({', '.join(features)}); expected one inner list "
                "for all feature maps, or one list per feature map."
            )


def _check_weights(cfg: CfgNode, *, eval_only: bool) -> None:
    weights = cfg.MODEL.WEIGHTS
    if weights and names_published(weights):
        if not only_in_timm(weights):
            catalogue_entry(weights)
    elif is_hub_name(weights):
        hub_weights(weights)
    elif weights and os.path.isdir(weights):
        sniff(Path(weights))  # raises an error that describes the folder
    elif weights and "://" not in weights and not os.path.isfile(weights):
        near = nearest_names(weights)
        hint = f" Published weights with a similar name: {near[0]}." if near else ""
        raise UserError(
            f"MODEL.WEIGHTS is {weights}, but this file does not exist "
            f"({os.path.abspath(weights)}). Set MODEL.WEIGHTS to the path of a pretrained weight "
            f"file.{hint} {scratch_hint(cfg)}"
        )
    if weights:
        return
    if eval_only:
        raise UserError(
            "MODEL.WEIGHTS is empty, so --eval-only would evaluate a model with random weights. "
            "Set MODEL.WEIGHTS to a checkpoint, or add --resume to evaluate the newest checkpoint "
            "in OUTPUT_DIR."
        )
    if cfg.MODEL.RESNETS.NORM == "FrozenBN":
        raise UserError(
            "MODEL.RESNETS.NORM is FrozenBN and MODEL.WEIGHTS is empty, but frozen batch norms "
            f"need pretrained statistics. Set MODEL.WEIGHTS to a weight file. {scratch_hint(cfg)} "
            "Alternatively, in your own config, set MODEL.RESNETS.NORM to GN (or to BN with at "
            "least 4 images per process) and MODEL.BACKBONE.FREEZE_AT to 0."
        )
    if cfg.MODEL.BACKBONE.FREEZE_AT > 0:
        logger.warning(
            "MODEL.BACKBONE.FREEZE_AT is %d and MODEL.WEIGHTS is empty, so the frozen stages keep "
            "their random weights. To train from scratch, set MODEL.BACKBONE.FREEZE_AT to 0.",
            cfg.MODEL.BACKBONE.FREEZE_AT,
        )


def _check_numbers(cfg: CfgNode) -> None:
    check_ranges(cfg)
    processes = comm.get_world_size()
    if cfg.SOLVER.IMS_PER_BATCH % processes:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, which can't be divided evenly "
            f"among {processes} processes. Set SOLVER.IMS_PER_BATCH to a multiple of {processes}."
        )
    share = cfg.SOLVER.IMS_PER_BATCH // processes
    if cfg.SOLVER.MICRO_BATCHES < 1 or share % cfg.SOLVER.MICRO_BATCHES:
        raise UserError(
            f"SOLVER.MICRO_BATCHES is {cfg.SOLVER.MICRO_BATCHES}, but the batch of {share} images "
            "per process can't be split into that many micro-batches of equal size. Set "
            f"SOLVER.MICRO_BATCHES to a divisor of {share}."
        )


def _check_norms(cfg: CfgNode) -> None:
    synced = [
        key for key, value in config_items(cfg) if key.endswith(".NORM") and value == "SyncBN"
    ]
    processes = comm.get_world_size()
    if synced and processes > 1 and cfg.MODEL.DEVICE == "cpu":
        raise UserError(
            f"SyncBN needs GPUs, but this run has {processes} processes on the CPU. Set "
            f"{', '.join(synced)} to GN or BN."
        )


def check_batch_norms(cfg: CfgNode, model: nn.Module) -> None:
    """Check that a classifier's batch norms receive more than one value per channel in training.

    With one image per forward pass and a last feature map of one pixel, the variance is undefined.

    Args:
        cfg: The run's config.
        model: The classifier in training mode. It is not changed.

    Raises:
        UserError: If a batch norm would receive a single value per channel.
    """
    share = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size() // cfg.SOLVER.MICRO_BATCHES
    if not is_classification(cfg) or share > 1:
        return
    side = cfg.INPUT.CLASSIFICATION.CROP
    try:
        # On the device "meta", only shapes are computed.
        copy.deepcopy(model.backbone).to("meta")(
            torch.zeros(1, len(cfg.MODEL.PIXEL_MEAN), side, side, device="meta")
        )
    except ValueError as error:
        if "more than 1 value per channel" in str(error):
            raise UserError(
                "Batch norm needs more than one value per channel, but with one image per forward "
                f"pass and INPUT.CLASSIFICATION.CROP {side}, the last feature map has a single "
                f"pixel (SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH} for "
                f"{comm.get_world_size()} processes, SOLVER.MICRO_BATCHES is "
                f"{cfg.SOLVER.MICRO_BATCHES}). Increase SOLVER.IMS_PER_BATCH or the crop size, "
                "reduce SOLVER.MICRO_BATCHES, or set MODEL.RESNETS.NORM to GN or FrozenBN."
            ) from error
    except RuntimeError:
        logger.debug(
            "Skipped the batch norm check: the shapes of the feature maps can't be computed.",
            exc_info=True,
        )


def _check_solver(cfg: CfgNode) -> None:
    _check_compile(cfg)
    check_epochs(cfg)
    counted = cfg.SOLVER.EPOCHS is not None and cfg.TEST.EVAL_EPOCHS
    evaluates = (cfg.TEST.EVAL_PERIOD > 0 or counted) and cfg.DATASETS.TEST
    plateau = cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupPlateauLR"
    for needs, setting in (
        (plateau, "SOLVER.LR_SCHEDULER_NAME is WarmupPlateauLR"),
        (cfg.TEST.PATIENCE > 0, f"TEST.PATIENCE is {cfg.TEST.PATIENCE}"),
    ):
        if needs and not evaluates:
            raise UserError(
                f"{setting}, which requires evaluation during training. Set TEST.EVAL_PERIOD (or "
                "TEST.EVAL_EPOCHS) and DATASETS.TEST."
            )
    if cfg.TEST.PATIENCE > 0 and not cfg.TEST.BEST_METRIC:
        raise UserError(
            f"TEST.PATIENCE is {cfg.TEST.PATIENCE}, but TEST.BEST_METRIC is empty. Set "
            "TEST.BEST_METRIC to the metric that must improve, such as classification/top1_error "
            "or bbox/AP."
        )
    check_metric(cfg, "TEST.BEST_METRIC", cfg.TEST.BEST_METRIC)
    if plateau:
        check_metric(cfg, "SOLVER.PLATEAU.METRIC", cfg.SOLVER.PLATEAU.METRIC)


def _check_padding(cfg: CfgNode) -> None:
    multiple = cfg.INPUT.SIZE_DIVISIBILITY
    if multiple and (is_classification(cfg) or cfg.MODEL.BACKBONE.NAME not in FPN_BUILDERS):
        raise UserError(
            f"INPUT.SIZE_DIVISIBILITY is {multiple}, which is only supported for detectors whose "
            f"MODEL.BACKBONE.NAME is {' or '.join(FPN_BUILDERS)}. Set INPUT.SIZE_DIVISIBILITY to 0."
        )


def _check_task_keys(cfg: CfgNode) -> None:
    """Raise a UserError if augmentation or losses for a different task are enabled."""
    defaults = get_senet_config()
    keys, task, other = _OF_CLASSIFIERS, "classifiers", "detectors"
    if is_classification(cfg):
        keys, task, other = _OF_DETECTORS, other, task
    for key in keys:
        value = config_value(cfg, key)
        if value != config_value(defaults, key):
            raise UserError(
                f"{key} is {value!r}, which is only supported for {task}. Remove the key. "
                f"docs/augmentation.md lists the keys for {other}."
            )


def _warn_of_sampler(cfg: CfgNode) -> None:
    options = cfg.DATALOADER
    if options.SAMPLER_TRAIN == "RepeatFactorTrainingSampler" and options.REPEAT_THRESHOLD <= 0:
        logger.warning(
            "DATALOADER.SAMPLER_TRAIN is RepeatFactorTrainingSampler, but "
            "DATALOADER.REPEAT_THRESHOLD is %g, so no image is repeated. Set REPEAT_THRESHOLD to "
            "the frequency below which a class's images are repeated, such as 0.1.",
            options.REPEAT_THRESHOLD,
        )


def _check_compile(cfg: CfgNode) -> None:
    check_choice("SOLVER.COMPILE", cfg.SOLVER.COMPILE, ("none", "default", "graph"))
    if cfg.SOLVER.COMPILE != "graph":
        return
    remedy = "Set SOLVER.COMPILE to none or default."
    if not cfg.MODEL.DEVICE.startswith("cuda"):
        raise UserError(
            "SOLVER.COMPILE is graph, which captures CUDA graphs, but this run's device is "
            f"{cfg.MODEL.DEVICE}. {remedy}"
        )
    if comm.get_world_size() > 1:
        raise UserError(
            "SOLVER.COMPILE is graph, which supports only one process, but this run has "
            f"{comm.get_world_size()} processes. {remedy}"
        )
    if cfg.SOLVER.UNFREEZE_ITERS or cfg.SOLVER.UNFREEZE_EPOCHS:
        raise UserError(
            "SOLVER.COMPILE is graph, but SOLVER.UNFREEZE_ITERS (or UNFREEZE_EPOCHS) changes which "
            f"parameters are trained. A CUDA graph does not support such changes. {remedy}"
        )
    options = cfg.MODEL.CLASSIFIER
    if is_classification(cfg) and (options.MIXUP or options.CUTMIX):
        raise UserError(
            f"SOLVER.COMPILE is graph, but MODEL.CLASSIFIER.MIXUP is {options.MIXUP:g} and CUTMIX "
            f"is {options.CUTMIX:g}. Both draw random numbers on the host, which a CUDA graph "
            "would repeat in every step. Set both to 0, or set SOLVER.COMPILE to none or default."
        )
    if not is_classification(cfg) and cfg.SOLVER.MICRO_BATCHES > 1:
        raise UserError(
            f"SOLVER.COMPILE is graph and SOLVER.MICRO_BATCHES is {cfg.SOLVER.MICRO_BATCHES}, but "
            "a detector's captured backbone does not support gradient accumulation. Set "
            "SOLVER.MICRO_BATCHES to 1, or set SOLVER.COMPILE to none or default."
        )


def _warn_of_learning_rate(cfg: CfgNode) -> None:
    reference = cfg.SOLVER.REFERENCE_LR_PER_IMAGE
    if not reference:
        return
    scaled = reference * cfg.SOLVER.IMS_PER_BATCH
    if not 0.5 <= cfg.SOLVER.BASE_LR / scaled <= 2:
        logger.warning(
            "SOLVER.BASE_LR is %g with %d images per step, but this recipe's learning rate scaled "
            "linearly to that batch size is %g. A learning rate that is too high often causes NaN "
            "losses. Consider SOLVER.BASE_LR %g, and scale the number of iterations inversely with "
            "the batch size.",
            cfg.SOLVER.BASE_LR,
            cfg.SOLVER.IMS_PER_BATCH,
            scaled,
            scaled,
        )
