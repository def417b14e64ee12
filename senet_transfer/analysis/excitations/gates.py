"""Names of a network's gates as in the paper, and recording of their values."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from senet_transfer.errors import UserError
from senet_transfer.layers.squeeze_excitation import SqueezeExcitation

_IN_STAGE = re.compile(r"(?:.*\.)?res(?P<stage>\d+)(?P<rest>\..+)?\.[^.]+$")


def gates_of(backbone: nn.Module) -> dict[str, SqueezeExcitation]:
    """Return the gates of a backbone by name, in the order of its modules.

    Names follow the paper's ``SE_stageID_blockID`` with blocks counted from 1: ``res4.5.se`` is
    SE_4_6. The name of a gate in a branch ends with the name of the branch. A gate outside all
    stages has the name of its module.

    Raises:
        UserError: If the backbone has no gates.
    """
    found = {
        _name(path): module
        for path, module in backbone.named_modules()
        if isinstance(module, SqueezeExcitation)
    }
    if not found:
        raise UserError(
            "The network has no SE, so it has no gates to analyze. Use a checkpoint of an se_... "
            "network, or of a config with MODEL.SE.ENABLED True."
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
    """Return the stage in a gate's name from :func:`gates_of`, or None outside all stages."""
    match = re.match(r"SE_(\d+)", name)
    return int(match[1]) if match else None


@contextmanager
def watched(gates: dict[str, SqueezeExcitation]) -> Iterator[dict[str, Tensor]]:
    """Record the values of gates during forward passes.

    Yields:
        A dict with each gate's values ``(N, C)`` for the last batch. Gates with spatial positions
        (``squeeze="none"``) are averaged over the positions.
    """
    values: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[SqueezeExcitation, tuple[Tensor, ...], Any], None]:
        def keep(module: SqueezeExcitation, inputs: tuple[Tensor, ...], output: Any) -> None:
            values[name] = module.gate(inputs[0]).detach().float().mean((2, 3))

        return keep

    handles = [gate.register_forward_hook(hook(name)) for name, gate in gates.items()]
    try:
        yield values
    finally:
        for handle in handles:
            handle.remove()
