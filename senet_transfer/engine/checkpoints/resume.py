"""Comparison of a resumed run's config with the config that the run was started with."""

import json
import logging

from detectron2.config import CfgNode
from tabulate import tabulate

from senet_transfer.config import config_items
from senet_transfer.errors import UserError

# Every checkpoint stores these values in the optimizer's state, which overrides the config.
_KEPT = (
    "SOLVER.BASE_LR", "SOLVER.BIAS_LR_FACTOR", "SOLVER.BACKBONE_MULTIPLIER", "SOLVER.MOMENTUM",
    "SOLVER.NESTEROV", "SOLVER.WEIGHT_DECAY", "SOLVER.WEIGHT_DECAY_BIAS",
    "SOLVER.WEIGHT_DECAY_NORM",
)  # fmt: skip

logger = logging.getLogger(__name__)


def check_changes(cfg: CfgNode, before: CfgNode) -> None:
    """Warn about config keys that were changed for a resumed run.

    The warning also names the changes that have no effect, because the optimizer's state in the
    checkpoint overrides them.

    Args:
        cfg: The current config.
        before: The config that the run was started with.

    Raises:
        UserError: If the optimizer has changed, because it can't use the checkpoint's state.
    """
    if cfg.SOLVER.OPTIMIZER != before.SOLVER.OPTIMIZER:
        raise UserError(
            f"SOLVER.OPTIMIZER is {cfg.SOLVER.OPTIMIZER}, but the run to resume has used "
            f"{before.SOLVER.OPTIMIZER}. Change it back, or start a new run with MODEL.WEIGHTS."
        )
    values = dict(config_items(before))
    changes = [
        (key, values.get(key), value, "none" if key in _KEPT else "from here on")
        for key, value in config_items(cfg)
        # Compared as JSON, because a saved config has lists instead of tuples.
        if key != "OUTPUT_DIR" and json.dumps(value) != json.dumps(values.get(key))
    ]
    if not changes:
        return
    kept = any(key in _KEPT for key, *_ in changes)
    logger.warning(
        "The config has changed since the run was started:\n%s%s",
        tabulate(changes, headers=("key", "before", "now", "effect"), disable_numparse=True),
        '\nChanges with effect "none" are overridden by the optimizer\'s state in the checkpoint. '
        "To train with the new values, start a new run with MODEL.WEIGHTS set to the checkpoint."
        if kept
        else "",
    )
