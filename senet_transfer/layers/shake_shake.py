"""Shake-shake: two branches mixed by random coefficients, others forward than backward.

Paper: Gastaldi, "Shake-Shake regularization" (2017); its best variants draw at the level of the
image. Source of the details: the author's released network definition.
"""

from typing import Any

import torch
from torch import Tensor, nn


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        ctx.save_for_backward(beta)
        return torch.lerp(b, a, alpha)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (beta,) = ctx.saved_tensors
        to_a = grad * beta
        return to_a, grad - to_a, None, None


class ShakeMix(nn.Module):
    """``alpha * a + (1 - alpha) * b``, with gradients as though it were ``beta``.

    In training alpha and beta are uniform in 0-1 and drawn for each image, from torch's generator
    of the device, so that a seed reproduces them. In evaluation both are 0.5.
    """

    def __init__(self, *, even: bool = False):
        """
        Args:
            even: whether beta is always 0.5 ("Shake-Even").
        """
        super().__init__()
        self.even = even
        # Whether training draws at all: not in a frozen part of a network.
        self.random = True

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Two maps ``(N, C, H, W)`` to one."""
        if not (self.training and self.random):
            return 0.5 * (a + b)
        # Both now rather than beta in the backward pass: what is drawn then does not depend on
        # the order of that pass, and a checkpointed block draws again what it drew.
        drawn = torch.rand(2, a.shape[0], 1, 1, 1, device=a.device).to(a.dtype)
        return _Mix.apply(a, b, drawn[0], torch.full_like(drawn[1], 0.5) if self.even else drawn[1])

    def extra_repr(self) -> str:
        """The variant."""
        return f"even={self.even}"
