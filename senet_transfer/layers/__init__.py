"""Layers that are independent of any network: the SE operator and the shake-shake operator."""

from senet_transfer.layers.shake_shake import ShakeMix
from senet_transfer.layers.squeeze_excitation import SEOptions, SqueezeExcitation

__all__ = ["SEOptions", "ShakeMix", "SqueezeExcitation"]
