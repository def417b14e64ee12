"""Optimizers, learning rate schedules, and conversion of epochs to iterations."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier, WarmupParamScheduler
from detectron2.solver import build_lr_scheduler as build_detectron2_scheduler
from detectron2.solver.build import GradientClipType, get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler
from torch import Tensor, nn
from torch.nn.utils import clip_grad_value_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from senet_transfer.config import config_value, get_senet_config
from senet_transfer.engine.little_data.stages import layer_factors
from senet_transfer.errors import UserError
from senet_transfer.utils.private_api import multiply_all, norms_of

logger = logging.getLogger(__name__)

# Config keys in iterations, and the corresponding keys in epochs. The latter take precedence.
_IN_EPOCHS = {
    "SOLVER.WARMUP_ITERS": "SOLVER.WARMUP_EPOCHS",
    "SOLVER.FROZEN_BN_ITERS": "SOLVER.FROZEN_BN_EPOCHS",
    "SOLVER.CHECKPOINT_PERIOD": "SOLVER.CHECKPOINT_EPOCHS",
    "TEST.EVAL_PERIOD": "TEST.EVAL_EPOCHS",
}

_MAY_BE_ZERO = ("SOLVER.WARMUP_EPOCHS", "SOLVER.FROZEN_BN_EPOCHS")


def check_epochs(cfg: CfgNode) -> None:
    """Check that the config doesn't specify the schedule in both epochs and iterations.

    If ``SOLVER.EPOCHS`` is None, all other keys that are specified in epochs are ignored. Setting
    this key to None is therefore enough to switch a recipe from epochs to iterations.

    Raises:
        UserError: If the schedule is specified twice, or a number of epochs is invalid.
    """
    if cfg.SOLVER.EPOCHS is None:
        return
    for key in ("SOLVER.EPOCHS", *_IN_EPOCHS.values()):
        value, least = config_value(cfg, key), 0 if key in _MAY_BE_ZERO else math.ulp(0)
        if value is not None and not (isinstance(value, int | float) and value >= least):
            raise UserError(
                f"{key} is {value!r}; expected a positive number of epochs, such as 90 or 0.5"
                f"{', or 0 to disable this phase' if least == 0 else ''}."
            )
    defaults = get_senet_config()
    for key in ("SOLVER.MAX_ITER", "SOLVER.STEPS"):
        if config_value(cfg, key) != config_value(defaults, key):
            raise UserError(
                f"{key} is {config_value(cfg, key)} and SOLVER.EPOCHS is {cfg.SOLVER.EPOCHS:g}, "
                "but only one of the two can be set. For a schedule in iterations, set "
                f"SOLVER.EPOCHS to None; for a schedule in epochs, remove {key}."
            )


def epochs_to_iterations(cfg: CfgNode, images: int) -> CfgNode:
    """Return a copy of the config with epochs converted to iterations.

    The number of iterations is ``ceil(epochs * images / SOLVER.IMS_PER_BATCH)``.

    Args:
        cfg: The config. If ``SOLVER.EPOCHS`` is None, it is returned unchanged.
        images: The number of images in the training set.
    """
    if cfg.SOLVER.EPOCHS is None:
        return cfg

    def iterations(epochs: float) -> int:
        # Numbers such as 0.1 are not exact in floating point. Without rounding, the error could
        # add one iteration.
        return math.ceil(round(epochs * images / cfg.SOLVER.IMS_PER_BATCH, 6))

    counted = cfg.clone()
    counted.defrost()
    counted.SOLVER.MAX_ITER = iterations(cfg.SOLVER.EPOCHS)
    counted.SOLVER.STEPS = tuple(iterations(epochs) for epochs in cfg.SOLVER.STEP_EPOCHS)
    if cfg.SOLVER.UNFREEZE_EPOCHS:
        counted.SOLVER.UNFREEZE_ITERS = tuple(map(iterations, cfg.SOLVER.UNFREEZE_EPOCHS))
    for key, in_epochs in _IN_EPOCHS.items():
        if (epochs := config_value(cfg, in_epochs)) is not None:
            node, _, leaf = key.rpartition(".")
            config_value(counted, node)[leaf] = iterations(epochs)
    logger.info(
        "Training for %g epochs of %d images with %d images per step takes %d iterations.",
        cfg.SOLVER.EPOCHS, images, cfg.SOLVER.IMS_PER_BATCH, counted.SOLVER.MAX_ITER,
    )  # fmt: skip
    if cfg.is_frozen():
        counted.freeze()
    return counted


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer, SGD or AdamW, with Detectron2's parameter groups.

    The learning rate of the backbone's parameters is multiplied by ``SOLVER.BACKBONE_MULTIPLIER``,
    and, in the backbone's stages, also by a power of ``SOLVER.LAYER_DECAY``. On a GPU, the
    optimizer is fused, so it can skip a step without host-device synchronisation.

    Raises:
        UserError: If ``SOLVER.OPTIMIZER`` is unknown, or if both the backbone and the biases have
            learning rates that differ from ``SOLVER.BASE_LR``.
    """
    solver = cfg.SOLVER
    factor = solver.BACKBONE_MULTIPLIER
    for key in ("BACKBONE_MULTIPLIER", "LAYER_DECAY"):
        if solver[key] != 1 and solver.BIAS_LR_FACTOR != 1:
            # Detectron2 would use the same learning rate for all biases, including the backbone's.
            raise UserError(
                f"SOLVER.{key} is {solver[key]:g} and SOLVER.BIAS_LR_FACTOR is "
                f"{solver.BIAS_LR_FACTOR:g}, but only one of the two can differ from 1. "
                "Set one of them to 1."
            )
    of_stage = layer_factors(model, solver.LAYER_DECAY) if solver.LAYER_DECAY != 1 else None

    def lr_factor(name: str) -> float:
        own = factor if name.startswith("backbone.") else 1.0
        return own * of_stage(name) if of_stage else own

    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        lr_factor_func=lr_factor,
    )
    options: dict[str, Any] = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY}
    fused = next(model.parameters()).device.type == "cuda"
    optimizer: Optimizer
    if solver.OPTIMIZER == "SGD":
        options |= {"fused": True} if fused else {"foreach": True}
        optimizer = torch.optim.SGD(
            groups, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV, **options
        )
        if fused:
            fill_momentum(optimizer)
    elif solver.OPTIMIZER == "AdamW":
        optimizer = torch.optim.AdamW(groups, fused=fused or None, **options)
    else:
        raise UserError(f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}; expected SGD or AdamW.")
    if solver.CLIP_GRADIENTS.ENABLED:
        clip = _gradient_clipper(solver.CLIP_GRADIENTS)
        optimizer.register_step_pre_hook(lambda optimizer, *_: clip(optimizer))
    return optimizer


def fill_momentum(optimizer: torch.optim.SGD) -> None:
    """Create momentum buffers filled with zeros, which do not affect the first step.

    Otherwise, fused SGD would create the buffers itself and, if it skips the first step, leave them
    uninitialised.
    """
    for group in optimizer.param_groups:
        if group["momentum"]:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


@contextlib.contextmanager
def tensor_rates(optimizer: Optimizer, rates: Sequence[Tensor]) -> Iterator[None]:
    """Temporarily replace the learning rates with scalar tensors, one per parameter group.

    On each replay, a CUDA graph of the optimizer's step reads the current value of a tensor. The
    value of a Python number would be fixed at capture. On exit, the numbers are restored, because
    schedulers and checkpoints use them.
    """
    groups = optimizer.param_groups
    captures = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    saved = [{key: group[key] for key in ("lr", "capturable") if key in group} for group in groups]
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
        if "capturable" in group:
            # PyTorch requires this option in a capture, and warns about it otherwise. It changes
            # nothing in a fused optimizer.
            group["capturable"] = captures
    try:
        yield
    finally:
        for group, values in zip(groups, saved, strict=True):
            group.update(values)


def _gradient_clipper(options: CfgNode) -> Callable[[Optimizer], None]:
    """Return a function that clips each gradient individually, as Detectron2's optimizers do."""
    limit, order = options.CLIP_VALUE, options.NORM_TYPE
    by_norm = GradientClipType(options.CLIP_TYPE) is GradientClipType.NORM

    @torch.no_grad()
    def clip(optimizer: Optimizer) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
        if gradients and not by_norm:
            clip_grad_value_(parameters, limit)
        elif gradients:
            norms = norms_of(gradients, order)
            # clip_grad_norm_ takes the norm of the tensors' norms, even of a single one.
            norms = torch.linalg.vector_norm(norms[:, None], order, dim=1)
            multiply_all(gradients, (limit / (norms + 1e-6)).clamp(max=1.0))

    return clip


def build_lr_scheduler(cfg: CfgNode, optimizer: Optimizer) -> LRScheduler:
    """Build the learning rate schedule: a Detectron2 schedule or "WarmupPlateauLR"."""
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
    """Return whether lower values of a metric are better, as for errors and losses."""
    name = metric.rpartition("/")[2]
    return name.endswith(("error", "loss")) or name.startswith("loss")


class PlateauLR(LRMultiplier):
    """Schedule that reduces the learning rate when a metric stops improving.

    It works like PyTorch's ReduceLROnPlateau, but subclasses Detectron2's LRMultiplier to support
    warm-up, hooks and checkpoints. :meth:`observe` must be called after each evaluation.
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
            optimizer: The optimizer, with its base learning rates.
            multiplier: The warm-up: a function that maps the completed fraction of the run,
                between 0 and 1, to a learning rate multiplier.
            max_iter: The number of iterations in the run.
            metric: The name under which the metric is logged.
            factor: The multiplier, between 0 and 1, for each reduction of the learning rate.
            patience: The number of evaluations without improvement to tolerate.
            threshold: The minimum change, in the metric's units, that counts as an improvement.
            max_drops: The maximum number of reductions.

        Raises:
            UserError: If a value is out of range.
        """
        if not 0 < factor < 1 or patience < 0 or threshold < 0 or max_drops < 1:
            raise UserError(
                "At least one option of WarmupPlateauLR is invalid. "
                f"SOLVER.GAMMA is {factor}; expected a value between 0 and 1. "
                f"SOLVER.PLATEAU.PATIENCE is {patience}; expected 0 or more. "
                f"SOLVER.PLATEAU.THRESHOLD is {threshold}; expected 0 or more. "
                f"SOLVER.PLATEAU.MAX_DROPS is {max_drops}; expected 1 or more."
            )
        self.metric = metric
        self.sign = 1 if lower_is_better(metric) else -1
        self.factor, self.patience = factor, patience
        self.threshold, self.max_drops = threshold, max_drops
        self.best = math.inf
        self.bad, self.drops = 0, 0
        super().__init__(optimizer, multiplier, max_iter)

    def observe(self, value: float) -> None:
        """Record the metric after an evaluation, and reduce the learning rate on a plateau.

        The reduced rate takes effect at the next step.
        """
        value *= self.sign
        if value < self.best - self.threshold:
            self.best, self.bad = value, 0
            return
        self.bad += 1
        if self.bad > self.patience and self.drops < self.max_drops:
            self.drops, self.bad = self.drops + 1, 0
            for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
                group["lr"] = rate
            logger.info(
                "%s has stopped improving. Reducing the learning rate (reduction %d).",
                self.metric,
                self.drops,
            )

    def get_lr(self) -> list[float]:
        """Return the learning rate of each parameter group."""
        return [rate * self.factor**self.drops for rate in super().get_lr()]

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        own = {"best": self.best, "bad": self.bad, "drops": self.drops}
        return {**super().state_dict(), **own}
