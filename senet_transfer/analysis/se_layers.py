"""Functions that identify SE layers in networks of this project and of timm."""

from torch import nn

from senet_transfer.layers.squeeze_excitation import SqueezeExcitation

# Names of timm's SE layer classes, and of their submodules that compute the gates.
_TIMM = {
    "EffectiveSEModule": ("gate",),
    "SEModule": ("gate", "sigmoid"),
    "SqueezeExcite": ("gate",),
}


def is_se_layer(module: nn.Module) -> bool:
    """Return whether a module is an SE layer of this project or of timm."""
    return isinstance(module, SqueezeExcitation) or timm_gate(module) is not None


def timm_gate(module: nn.Module) -> nn.Module | None:
    """Return the submodule of a timm SE layer that computes the gates ``(N, C, 1, 1)``.

    Returns:
        The submodule, or None if the module is not a timm SE layer.
    """
    kind = type(module)
    names = _TIMM.get(kind.__name__, ()) if kind.__module__.startswith("timm.") else ()
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)
