"""Optimizers and learning rates: epochs as iterations, and a rate that follows evaluations."""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier, WarmupParamScheduler
from detectron2.solver import build_lr_scheduler as build_detectron2_scheduler
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from fvcore.common.param_scheduler import MultiStepParamScheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from senet_transfer.config import config_value, get_senet_config
from senet_transfer.errors import UserError

logger = logging.getLogger(__name__)

# The keys in iterations, and those in epochs that take their places.
_IN_EPOCHS = {
    "SOLVER.WARMUP_ITERS": "SOLVER.WARMUP_EPOCHS",
    "SOLVER.FROZEN_BN_ITERS": "SOLVER.FROZEN_BN_EPOCHS",
    "SOLVER.CHECKPOINT_PERIOD": "SOLVER.CHECKPOINT_EPOCHS",
    "TEST.EVAL_PERIOD": "TEST.EVAL_EPOCHS",
}


def check_epochs(cfg: CfgNode) -> None:
    """Refuses a config that counts in epochs and iterations at once.

    Where ``SOLVER.EPOCHS`` is not set, other keys in epochs are of no effect: a recipe in epochs
    is turned to one in iterations by that key alone.

    Raises:
        UserError: it counts in both, or in something that is no number above 0.
    """
    if cfg.SOLVER.EPOCHS is None:
        return
    for key in ("SOLVER.EPOCHS", *_IN_EPOCHS.values()):
        value = config_value(cfg, key)
        if value is not None and not (isinstance(value, int | float) and value > 0):
            raise UserError(f"{key} is {value!r}, expected a number of epochs, such as 90 or 0.5.")
    defaults = get_senet_config()
    for key in ("SOLVER.MAX_ITER", "SOLVER.STEPS"):
        if config_value(cfg, key) != config_value(defaults, key):
            raise UserError(
                f"{key} is {config_value(cfg, key)} and SOLVER.EPOCHS is {cfg.SOLVER.EPOCHS:g}: "
                "which is meant? To count in iterations, set SOLVER.EPOCHS None; to count in "
                f"epochs, leave {key} out."
            )


def epochs_to_iterations(cfg: CfgNode, images: int) -> CfgNode:
    """A copy of a config in which epochs are iterations, ``ceil(epochs * images / batch)``.

    Args:
        cfg: given back as it is where ``SOLVER.EPOCHS`` is not set.
        images: in the training set.
    """
    if cfg.SOLVER.EPOCHS is None:
        return cfg

    def iterations(epochs: float) -> int:
        # Epochs such as 0.1 have no exact float; a rounding error is no further iteration.
        return math.ceil(round(epochs * images / cfg.SOLVER.IMS_PER_BATCH, 6))

    counted = cfg.clone()
    counted.defrost()
    counted.SOLVER.MAX_ITER = iterations(cfg.SOLVER.EPOCHS)
    counted.SOLVER.STEPS = tuple(iterations(epochs) for epochs in cfg.SOLVER.STEP_EPOCHS)
    for key, in_epochs in _IN_EPOCHS.items():
        if epochs := config_value(cfg, in_epochs):
            node, _, leaf = key.rpartition(".")
            config_value(counted, node)[leaf] = iterations(epochs)
    logger.info(
        "%g epochs of %d images, %d a step: %d iterations.",
        cfg.SOLVER.EPOCHS, images, cfg.SOLVER.IMS_PER_BATCH, counted.SOLVER.MAX_ITER,
    )  # fmt: skip
    if cfg.is_frozen():
        counted.freeze()
    return counted


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Builds ``SOLVER.OPTIMIZER``: Detectron2's SGD, or AdamW on the same parameter groups.

    The rate of what is in ``backbone`` is multiplied by ``SOLVER.BACKBONE_MULTIPLIER``.

    Raises:
        UserError: an unknown optimizer, or learning rates of their own for the backbone and for
            biases at once.
    """
    solver = cfg.SOLVER
    factor = solver.BACKBONE_MULTIPLIER
    if factor != 1 and solver.BIAS_LR_FACTOR != 1:
        # Detectron2 would give all biases the one rate, those of the backbone among them.
        raise UserError(
            f"SOLVER.BACKBONE_MULTIPLIER is {factor:g} and SOLVER.BIAS_LR_FACTOR is "
            f"{solver.BIAS_LR_FACTOR:g}. Set one of them to 1."
        )
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        lr_factor_func=lambda name: factor if name.startswith("backbone.") else 1.0,
    )
    options = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY}
    if solver.OPTIMIZER == "SGD":
        optimizer = torch.optim.SGD(
            groups, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV, foreach=True, **options
        )
    elif solver.OPTIMIZER == "AdamW":
        optimizer = torch.optim.AdamW(groups, **options)
    else:
        raise UserError(f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}, expected SGD or AdamW.")
    return maybe_add_gradient_clipping(cfg, optimizer)


def build_lr_scheduler(cfg: CfgNode, optimizer: Optimizer) -> LRScheduler:
    """Detectron2's schedules, and "WarmupPlateauLR"."""
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME != "WarmupPlateauLR":
        return build_detectron2_scheduler(cfg, optimizer)
    warmup = WarmupParamScheduler(
        MultiStepParamScheduler([1.0], milestones=[], num_updates=solver.MAX_ITER),
        solver.WARMUP_FACTOR,
        min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0),
        solver.WARMUP_METHOD,
    )
    return PlateauLR(
        optimizer,
        multiplier=warmup,
        max_iter=solver.MAX_ITER,
        metric=solver.PLATEAU.METRIC,
        factor=solver.GAMMA,
        patience=solver.PLATEAU.PATIENCE,
        threshold=solver.PLATEAU.THRESHOLD,
        max_drops=solver.PLATEAU.MAX_DROPS,
    )


def lower_is_better(metric: str) -> bool:
    """Whether a metric, by its name, is an error or a loss."""
    return metric.rpartition("/")[2].endswith(("error", "loss"))


class PlateauLR(LRMultiplier):
    """A rate that drops where a metric no longer improves, as torch's ReduceLROnPlateau.

    It is a schedule of Detectron2's kind, so that warm-up, hooks and checkpoints treat it as any
    other; :meth:`observe` tells it of evaluations.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        multiplier: Callable[[float], float],
        max_iter: int,
        metric: str,
        factor: float,
        patience: int,
        threshold: float = 0.0,
        max_drops: int = 3,
    ):
        """
        Args:
            optimizer: has the base rates.
            multiplier: of the rate, by the share of the run that is done: the warm-up.
            max_iter: iterations of the run.
            metric: the name by which the metric is logged.
            factor: that a drop multiplies the rate by, 0-1.
            patience: evaluations without improvement that are borne with.
            threshold: an improvement is larger than this, in the metric's units.
            max_drops: at most as many drops.

        Raises:
            UserError: a value makes no sense.
        """
        if not 0 < factor < 1 or patience < 0 or threshold < 0 or max_drops < 1:
            raise UserError(
                f"WarmupPlateauLR: factor {factor} (SOLVER.GAMMA), patience {patience}, threshold "
                f"{threshold}, max_drops {max_drops} (SOLVER.PLATEAU): expected a factor between 0 "
                "and 1, at least one drop, and nothing negative."
            )
        self.metric = metric
        self.sign = 1 if lower_is_better(metric) else -1
        self.factor, self.patience = factor, patience
        self.threshold, self.max_drops = threshold, max_drops
        self.best = math.inf
        self.bad, self.drops = 0, 0
        super().__init__(optimizer, multiplier, max_iter)

    def observe(self, value: float) -> None:
        """Takes note of an evaluation; a drop counts from the next step on."""
        value *= self.sign
        if value < self.best - self.threshold:
            self.best, self.bad = value, 0
            return
        self.bad += 1
        if self.bad > self.patience and self.drops < self.max_drops:
            self.drops, self.bad = self.drops + 1, 0
            for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
                group["lr"] = rate
            logger.info("No better %s: the learning rate drops, %d.", self.metric, self.drops)

    def get_lr(self) -> list[float]:
        """The rate of each group of parameters."""
        return [rate * self.factor**self.drops for rate in super().get_lr()]

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        own = {"best": self.best, "bad": self.bad, "drops": self.drops}
        return {**super().state_dict(), **own}
