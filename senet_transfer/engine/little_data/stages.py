"""Stage-wise fine-tuning: lower learning rates in earlier stages, and gradual unfreezing."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from detectron2.engine import HookBase
from torch import nn

from senet_transfer.errors import UserError

# Names of the stage modules in classifiers, in FPN detectors and in C4 detectors.
_STAGE = re.compile(r"(?:backbone\.(?:bottom_up\.)?|roi_heads\.)(stem|res[2-5])")


def backbone_stages(model: nn.Module) -> dict[str, nn.Module]:
    """Return a dict from module names to the backbone's stages, from the stem to the last stage.

    The last stage of a C4 detector is part of the ROI heads. It is included because it is also
    pretrained.
    """
    found = {name: module for name, module in model.named_modules() if _STAGE.fullmatch(name)}
    order = ("stem", "res2", "res3", "res4", "res5")
    return dict(sorted(found.items(), key=lambda item: order.index(item[0].rpartition(".")[2])))


def layer_factors(model: nn.Module, decay: float) -> Callable[[str], float]:
    """Return a function that maps a parameter name to the factor for its learning rate.

    The factor is 1 for parameters outside the stages, ``decay`` in the last stage, ``decay ** 2``
    in the stage before it, and so on. This is the layer decay of BEiT (Bao et al. 2022) and timm,
    applied to the stages of the backbone.

    Raises:
        UserError: If the backbone has no known stages.
    """
    stages = list(backbone_stages(model))
    if not stages:
        raise UserError(
            f"SOLVER.LAYER_DECAY is {decay:g}, but the backbone has no stages named stem and res2 "
            "to res5. Set SOLVER.LAYER_DECAY to 1."
        )
    powers = {f"{name}.": decay ** (len(stages) - depth) for depth, name in enumerate(stages)}

    def factor(name: str) -> float:
        return next((power for stage, power in powers.items() if name.startswith(stage)), 1.0)

    return factor


class GradualUnfreezing(HookBase):
    """Hook that initially freezes all backbone stages, then unfreezes them from last to first.

    The weights of a frozen stage do not change, its batch norms use their running statistics and do
    not update them, and no gradients are computed for it. The frozen stages depend only on the
    iteration, so a resumed run freezes the same stages as an uninterrupted one.
    """

    def __init__(self, model: nn.Module, starts: Sequence[int], wrap: Callable[[], Any]):
        """
        Args:
            model: The unwrapped model (not ``DistributedDataParallel``).
            starts: The iterations at which the last stage, the stage before it, and so on are
                unfrozen. If there are fewer iterations than stages, the first stages stay frozen.
            wrap: A function that wraps the model in ``DistributedDataParallel`` again. It is called
                whenever stages are frozen or unfrozen, because the wrapper only reduces gradients
                of the parameters that required gradients when it was created.

        Raises:
            UserError: If an iteration is negative, if the iterations are not in ascending order, or
                if there are more iterations than trainable stages.
        """
        stages = [
            (name, stage, parameters)
            for name, stage in reversed(backbone_stages(model).items())
            if (parameters := [p for p in stage.parameters() if p.requires_grad])
        ]
        if len(starts) > len(stages):
            raise UserError(
                f"SOLVER.UNFREEZE_ITERS (or UNFREEZE_EPOCHS) contains {len(starts)} values, but "
                f"the backbone has {len(stages)} trainable stages: "
                f"{', '.join(name for name, *_ in stages)}. Set at most one value per trainable "
                "stage, starting with the last stage. Stages frozen by MODEL.BACKBONE.FREEZE_AT "
                "are not trainable."
            )
        if list(starts) != sorted(starts) or any(start < 0 for start in starts):
            raise UserError(
                f"SOLVER.UNFREEZE_ITERS (or UNFREEZE_EPOCHS) is {list(starts)}; expected "
                "non-negative values in ascending order. The first value applies to the last "
                "stage of the backbone, which is unfrozen first."
            )
        self.stages = [(stage, parameters) for _, stage, parameters in stages]
        self.starts = [*starts, *[math.inf] * (len(stages) - len(starts))]
        self.wrap = wrap
        self.trained: int | None = None

    def before_step(self) -> None:
        """Apply the unfreezing schedule, and keep the frozen stages in evaluation mode."""
        trained = sum(start <= self.trainer.iter for start in self.starts)
        if trained != self.trained:
            for place, (stage, parameters) in enumerate(self.stages):
                stage.train(place < trained)
                for parameter in parameters:
                    parameter.requires_grad_(place < trained)
            self.trained = trained
            self.wrap()
        # An evaluation puts the whole model back into training mode.
        for stage, _ in self.stages[trained:]:
            stage.eval()
