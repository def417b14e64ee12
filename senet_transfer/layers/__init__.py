"""Layers that do not depend on a specific network, such as the SE module."""

from senet_transfer.layers.shake_shake import ShakeMix
from senet_transfer.layers.squeeze_excitation import SEOptions, SqueezeExcitation

__all__ = ["SEOptions", "ShakeMix", "SqueezeExcitation"]
