"""Shake-shake regularization: a random convex combination of two branches.

Paper: Gastaldi, "Shake-Shake regularization" (2017). The forward and backward passes use different
coefficients. As in the paper's best variants, the coefficients are drawn per image. Details follow
the author's released network definition.
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
    """Random convex combination ``alpha * a + (1 - alpha) * b`` of two feature maps.

    In the backward pass, the coefficient beta replaces alpha. In training, alpha and beta are drawn
    uniformly from [0, 1) for each image. The device's default random generator is used, so the
    values can be reproduced with a seed. In evaluation, both are 0.5.
    """

    def __init__(self, *, even: bool = False):
        """
        Args:
            even: Whether beta is always 0.5 (the paper's "Shake-Even").
        """
        super().__init__()
        self.even = even
        # False in the frozen part of a network, where no coefficients are drawn.
        self.random = True

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Mix two feature maps ``(N, C, H, W)`` into one of the same shape."""
        if not (self.training and self.random):
            return 0.5 * (a + b)
        # Draw beta here rather than in the backward pass. The values then do not depend on the
        # order of the backward pass, and activation checkpointing draws the same values when it
        # recomputes a block.
        drawn = torch.rand(2, a.shape[0], 1, 1, 1, device=a.device).to(a.dtype)
        return _Mix.apply(a, b, drawn[0], torch.full_like(drawn[1], 0.5) if self.even else drawn[1])

    def extra_repr(self) -> str:
        """Return the value of ``even`` for the module's repr."""
        return f"even={self.even}"
