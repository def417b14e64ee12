"""The gates of a network, by the paper's names, and their values as images pass."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from senet_transfer.errors import UserError
from senet_transfer.layers.squeeze_excitation import SqueezeExcitation

_IN_STAGE = re.compile(r"(?:.*\.)?res(?P<stage>\d+)(?P<rest>\..+)?\.[^.]+$")


def gates_of(backbone: nn.Module) -> dict[str, SqueezeExcitation]:
    """The gates of a backbone by name, in the order of its modules.

    The paper's ``SE_stageID_blockID``, blocks counted from 1: ``res4.5.se`` is SE_4_6. A gate in a
    branch has the branch's name behind it; one outside of all stages has its module's.

    Raises:
        UserError: there is none.
    """
    found = {
        _name(path): module
        for path, module in backbone.named_modules()
        if isinstance(module, SqueezeExcitation)
    }
    if not found:
        raise UserError(
            "The network has no SE, so there are no gates to look at. Take a checkpoint of an "
            "se_... network, or of a config with MODEL.SE.ENABLED True."
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
    """The stage that a name of :func:`gates_of` is of; None outside of all stages."""
    match = re.match(r"SE_(\d+)", name)
    return int(match[1]) if match else None


@contextmanager
def watched(gates: dict[str, SqueezeExcitation]) -> Iterator[dict[str, Tensor]]:
    """Gives a dict that holds each gate's values ``(N, C)`` of the last batch that passed.

    Where gates keep positions (``squeeze="none"``), these are the means over them.
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
