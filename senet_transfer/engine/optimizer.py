"""The optimizers that a config can name."""

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import nn

from senet_transfer.errors import UserError


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Builds ``SOLVER.OPTIMIZER``: Detectron2's SGD, or AdamW on the same parameter groups.

    The rate of what is in ``backbone`` is multiplied by ``SOLVER.BACKBONE_MULTIPLIER``.

    Raises:
        UserError: another name, or a rate of their own for the trunk and for biases at once.
    """
    solver = cfg.SOLVER
    factor = solver.BACKBONE_MULTIPLIER
    if factor != 1 and solver.BIAS_LR_FACTOR != 1:
        # Detectron2 would give all biases the one rate, those of the trunk among them.
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
