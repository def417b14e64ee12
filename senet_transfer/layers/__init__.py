"""The SE operator and what else knows no network."""

from senet_transfer.layers.shake_shake import ShakeMix
from senet_transfer.layers.squeeze_excitation import SEOptions, SqueezeExcitation

__all__ = ["SEOptions", "ShakeMix", "SqueezeExcitation"]
