"""What a resumed run does otherwise than it began, which its user should hear of."""

import json
import logging

from detectron2.config import CfgNode
from tabulate import tabulate

from senet_transfer.config import config_items
from senet_transfer.errors import UserError

# The optimizer's state, in every checkpoint, holds these, and they replace the config's.
_KEPT = (
    "SOLVER.BASE_LR", "SOLVER.BIAS_LR_FACTOR", "SOLVER.BACKBONE_MULTIPLIER", "SOLVER.MOMENTUM",
    "SOLVER.NESTEROV", "SOLVER.WEIGHT_DECAY", "SOLVER.WEIGHT_DECAY_BIAS",
    "SOLVER.WEIGHT_DECAY_NORM",
)  # fmt: skip

logger = logging.getLogger(__name__)


def check_changes(cfg: CfgNode, before: CfgNode) -> None:
    """Says which keys a resumed run has other values of, and which of these are of no effect.

    Args:
        cfg: the config of now.
        before: the one that the run began with.

    Raises:
        UserError: the optimizer is another one, which can't go on from the checkpoint's state.
    """
    if cfg.SOLVER.OPTIMIZER != before.SOLVER.OPTIMIZER:
        raise UserError(
            f"SOLVER.OPTIMIZER is {cfg.SOLVER.OPTIMIZER}, and the run to resume has the state of "
            f"{before.SOLVER.OPTIMIZER}. Set it back, or start a new run with MODEL.WEIGHTS."
        )
    values = dict(config_items(before))
    changes = [
        (key, values.get(key), value, "none" if key in _KEPT else "from here on")
        for key, value in config_items(cfg)
        # As JSON, because a saved config has lists for tuples.
        if key != "OUTPUT_DIR" and json.dumps(value) != json.dumps(values.get(key))
    ]
    if not changes:
        return
    kept = any(key in _KEPT for key, *_ in changes)
    logger.warning(
        "The run began with other values than it goes on with:\n%s%s",
        tabulate(changes, headers=("key", "began with", "now", "effect"), disable_numparse=True),
        "\nThose of no effect are held by the checkpoint's optimizer. To train on with the new "
        "values, start a new run with MODEL.WEIGHTS set to the checkpoint."
        if kept
        else "",
    )
