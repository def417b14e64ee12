"""Comparison of a resumed run's config with its original config."""

import json
import logging

from detectron2.config import CfgNode
from tabulate import tabulate

from senet_transfer.config import config_items
from senet_transfer.errors import UserError

# The optimizer state in a checkpoint includes these values, which override the config.
_KEPT = (
    "SOLVER.BASE_LR", "SOLVER.BIAS_LR_FACTOR", "SOLVER.BACKBONE_MULTIPLIER", "SOLVER.LAYER_DECAY",
    "SOLVER.MOMENTUM", "SOLVER.NESTEROV", "SOLVER.WEIGHT_DECAY", "SOLVER.WEIGHT_DECAY_BIAS",
    "SOLVER.WEIGHT_DECAY_NORM",
)  # fmt: skip

logger = logging.getLogger(__name__)


def check_changes(cfg: CfgNode, before: CfgNode) -> None:
    """Warn about config keys that have changed since the run was started.

    The warning marks changes that have no effect because the optimizer state in the checkpoint
    overrides them.

    Args:
        cfg: The current config.
        before: The run's original config.

    Raises:
        UserError: If ``SOLVER.OPTIMIZER`` has changed. The checkpoint's optimizer state does not
            fit a different optimizer.
    """
    if cfg.SOLVER.OPTIMIZER != before.SOLVER.OPTIMIZER:
        raise UserError(
            f"SOLVER.OPTIMIZER is {cfg.SOLVER.OPTIMIZER}, but the run to resume used "
            f"{before.SOLVER.OPTIMIZER}. Change the key back, or start a new run with "
            "MODEL.WEIGHTS."
        )
    values = dict(config_items(before))
    changes = [
        (key, values.get(key), value, "none" if key in _KEPT else "from here on")
        for key, value in config_items(cfg)
        # The values are compared as JSON because tuples become lists in a saved config.
        if key != "OUTPUT_DIR" and json.dumps(value) != json.dumps(values.get(key))
    ]
    if not changes:
        return
    kept = any(key in _KEPT for key, *_ in changes)
    logger.warning(
        "The config has changed since the run was started:\n%s%s",
        tabulate(changes, headers=("key", "before", "now", "effect"), disable_numparse=True),
        '\nChanges with effect "none" are overridden by the optimizer state in the checkpoint. To '
        "train with the new values, start a new run with MODEL.WEIGHTS set to the checkpoint."
        if kept
        else "",
    )
