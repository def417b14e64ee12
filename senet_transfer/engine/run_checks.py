"""What is refused, or warned of, before a run starts."""

import difflib
import logging
import os

from detectron2.config import CfgNode
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
)
from detectron2.utils import comm

from senet_transfer.config import config_items, is_classification
from senet_transfer.config.validation import check_ranges
from senet_transfer.engine.checkpoints import checkpoint_history as history
from senet_transfer.engine.solver import check_epochs
from senet_transfer.errors import UserError
from senet_transfer.models.build import backbone_from_config
from senet_transfer.weights.hub.catalogue import catalogue_entry, names_published, nearest_names

logger = logging.getLogger(__name__)


def check_run(cfg: CfgNode, *, eval_only: bool, resume: bool) -> None:
    """Refuses a run that could only waste its user's time.

    Raises:
        UserError: the message says what was found and the remedy.
    """
    if resume and not history.checkpoints(cfg.OUTPUT_DIR):
        tag = os.path.join(cfg.OUTPUT_DIR, history.TAG)
        raise UserError(
            f"--resume found nothing to resume: there is no {tag} that names a checkpoint. Set "
            "OUTPUT_DIR to the folder of the run to go on with, or start a new run without "
            "--resume."
        )
    if not resume:
        _check_weights(cfg, eval_only=eval_only)
    _check_names(cfg)
    _check_norms(cfg)
    if not eval_only:
        _check_numbers(cfg)
    check_augmentation(cfg)
    if not eval_only:
        _check_solver(cfg)
        _warn_of_learning_rate(cfg)


def check_augmentation(cfg: CfgNode) -> None:
    """Raises UserError where ``TEST.AUG`` is on and the model can't be augmented."""
    if cfg.TEST.AUG.ENABLED and cfg.MODEL.META_ARCHITECTURE != "GeneralizedRCNN":
        raise UserError(
            "TEST.AUG.ENABLED: test-time augmentation is Detectron2's for GeneralizedRCNN, and "
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}. Set it to False."
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
        # Detectron2 knows this one without a registration.
        if values[key] not in (*known, "PrecomputedProposals"):
            near = difflib.get_close_matches(str(values[key]), known, n=3) or sorted(known)
            raise UserError(
                f"{key} is {values[key]!r}, which nothing is registered as. Known: "
                f"{', '.join(near)}. What another project registers has to be imported."
            )
    c4 = cfg.MODEL.ROI_HEADS.NAME == "Res5ROIHeads"
    of_ours = cfg.MODEL.BACKBONE.NAME == "build_senet_backbone"
    if c4 and of_ours and cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN":
        entry, _ = backbone_from_config(cfg)
        if entry.has_se and 5 in cfg.MODEL.SE.STAGES:
            raise UserError(
                "MODEL.ROI_HEADS.NAME is Res5ROIHeads, which builds a res5 without SE whatever "
                "the backbone. Set it to SENetRes5ROIHeads."
            )


def _check_weights(cfg: CfgNode, *, eval_only: bool) -> None:
    weights = cfg.MODEL.WEIGHTS
    if weights and names_published(weights):
        catalogue_entry(weights)
    elif weights and "://" not in weights and not os.path.isfile(weights):
        near = nearest_names(weights)
        hint = f" Published weights of a name like this: {near[0]}." if near else ""
        raise UserError(
            f"MODEL.WEIGHTS is {weights}, and there is no such file "
            f"({os.path.abspath(weights)}). Put the pretrained file there or set MODEL.WEIGHTS "
            "to where it is. To train from scratch: MODEL.WEIGHTS '' MODEL.RESNETS.NORM GN "
            f"MODEL.BACKBONE.FREEZE_AT 0.{hint}"
        )
    if weights:
        return
    if eval_only:
        raise UserError(
            "--eval-only with an empty MODEL.WEIGHTS would evaluate random weights. Set "
            "MODEL.WEIGHTS to a checkpoint, or add --resume to take the last one of OUTPUT_DIR."
        )
    if cfg.MODEL.RESNETS.NORM == "FrozenBN":
        raise UserError(
            "MODEL.RESNETS.NORM is FrozenBN and MODEL.WEIGHTS is empty: a frozen norm has the "
            "statistics of its pretrained file, and without one it normalises nothing. Set "
            "MODEL.WEIGHTS to a file, or train from scratch with MODEL.RESNETS.NORM GN (or BN "
            "where each process has 8 images or more) and MODEL.BACKBONE.FREEZE_AT 0."
        )
    if cfg.MODEL.BACKBONE.FREEZE_AT > 0:
        logger.warning(
            "MODEL.BACKBONE.FREEZE_AT is %d and MODEL.WEIGHTS is empty: the frozen stages keep "
            "their random weights. From scratch, set it to 0.",
            cfg.MODEL.BACKBONE.FREEZE_AT,
        )


def _check_numbers(cfg: CfgNode) -> None:
    check_ranges(cfg)
    processes = comm.get_world_size()
    if cfg.SOLVER.IMS_PER_BATCH % processes:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, the images of all "
            f"{processes} processes together, and can't be shared evenly. Set it to a multiple."
        )
    share = cfg.SOLVER.IMS_PER_BATCH // processes
    if cfg.SOLVER.MICRO_BATCHES < 1 or share % cfg.SOLVER.MICRO_BATCHES:
        raise UserError(
            f"SOLVER.MICRO_BATCHES is {cfg.SOLVER.MICRO_BATCHES}, and each process has {share} "
            "images a step, which can't be cut into that many equal parts. Set it to a divisor."
        )


def _check_norms(cfg: CfgNode) -> None:
    synced = [
        key for key, value in config_items(cfg) if key.endswith(".NORM") and value == "SyncBN"
    ]
    processes = comm.get_world_size()
    if synced and processes > 1 and cfg.MODEL.DEVICE == "cpu":
        raise UserError(
            f"SyncBN needs GPUs, and this run has {processes} processes on the CPU. Set "
            f"{', '.join(synced)} to GN or BN."
        )


def _check_solver(cfg: CfgNode) -> None:
    check_epochs(cfg)
    if cfg.SOLVER.EPOCHS is not None and not is_classification(cfg):
        raise UserError(
            "SOLVER.EPOCHS counts passes over a classifier's data; a detector's schedule is in "
            "iterations. Set SOLVER.EPOCHS None and SOLVER.MAX_ITER."
        )
    counted = cfg.SOLVER.EPOCHS is not None and cfg.TEST.EVAL_EPOCHS
    evaluates = cfg.TEST.EVAL_PERIOD > 0 or counted
    if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupPlateauLR" and not (evaluates and cfg.DATASETS.TEST):
        raise UserError(
            "SOLVER.LR_SCHEDULER_NAME is WarmupPlateauLR, whose rate follows evaluations, and "
            "there are none: set TEST.EVAL_PERIOD (or TEST.EVAL_EPOCHS) and DATASETS.TEST."
        )


def _warn_of_learning_rate(cfg: CfgNode) -> None:
    reference = cfg.SOLVER.REFERENCE_LR_PER_IMAGE
    if not reference:
        return
    scaled = reference * cfg.SOLVER.IMS_PER_BATCH
    if not 0.5 <= cfg.SOLVER.BASE_LR / scaled <= 2:
        logger.warning(
            "SOLVER.BASE_LR is %g at %d images a step; this recipe's rate scaled to that batch "
            "(linear rule) is %g. A rate too high is the usual cause of NaN: consider "
            "SOLVER.BASE_LR %g, and as many more iterations as the batch is smaller.",
            cfg.SOLVER.BASE_LR,
            cfg.SOLVER.IMS_PER_BATCH,
            scaled,
            scaled,
        )
