"""Names of SE gates as in the paper, and hooks that record gate values."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from senet_transfer.analysis.se_layers import is_se_layer, timm_gate
from senet_transfer.errors import UserError
from senet_transfer.layers.squeeze_excitation import SqueezeExcitation
from senet_transfer.models.timm_backbone import TimmBackbone

_IN_STAGE = re.compile(r"(?:.*\.)?res(?P<stage>\d+)(?P<rest>\..+)?\.[^.]+$")


def gates_of(backbone: nn.Module) -> dict[str, nn.Module]:
    """Return the SE gates of a backbone, keyed by name, in the order of the backbone's modules.

    Names follow the paper's ``SE_stageID_blockID`` with blocks counted from 1: ``res4.5.se`` is
    named SE_4_6. If a gate is in a branch, its name ends with the branch's name. A gate outside all
    stages is named after its module. In timm's networks, stage 1 is the stem, and blockID is the
    gate's position among the gates of its stage, counted from 1.

    Raises:
        UserError: If the backbone has no gates.
    """
    stages = backbone.stages if isinstance(backbone, TimmBackbone) else {}
    counts: Counter[int] = Counter()
    found = {}
    for path, module in backbone.named_modules():
        if is_se_layer(module):
            name = _name(path)
            if stage := stages.get(path.removeprefix("net.")):
                counts[stage] += 1
                name = f"SE_{stage}_{counts[stage]}"
            found[name] = module
    if not found:
        raise UserError(
            "The network has no SE layers, so there are no gates to analyse. Use a checkpoint of "
            "an se_... network or of a network trained with MODEL.SE.ENABLED set to True."
        )
    return found


def _name(path: str) -> str:
    match = _IN_STAGE.match(path)
    if not match:
        return path.removesuffix(".se")
    parts = [part for part in (match["rest"] or "").split(".") if part]
    if parts and parts[0].isdigit():
        parts[0] = str(int(parts[0]) + 1)
    return "_".join(["SE", match["stage"], *parts])


def stage_of(name: str) -> int | None:
    """Return the stage number in a gate's name, or None if the gate is outside all stages."""
    match = re.match(r"SE_(\d+)", name)
    return int(match[1]) if match else None


@contextmanager
def capture_gates(gates: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Record gate values during forward passes.

    Yields:
        A dict with the values ``(N, C)`` of each gate for the last batch, keyed by gate name. The
        values of gates without a squeeze (``squeeze="none"``) are averaged over the spatial
        positions.
    """
    values: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Any], None]:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            gate = module.gate(inputs[0]) if isinstance(module, SqueezeExcitation) else output
            values[name] = gate.detach().float().mean((2, 3))

        return keep

    handles = [
        (timm_gate(layer) or layer).register_forward_hook(hook(name))
        for name, layer in gates.items()
    ]
    try:
        yield values
    finally:
        for handle in handles:
            handle.remove()
