"""The Squeeze-and-Excitation (SE) module and its variants.

Paper: "Squeeze-and-Excitation Networks", section 3 (SE block) and section 6 (variants). Details
that the paper does not specify follow the authors' released network definitions.

Differences from other implementations:

* Gating and adding the shortcut are one fused multiply-add, as in the authors' Axpy layer. The
  gated feature map is therefore never written to memory.
* ``fc1`` and ``fc2`` are linear layers on ``(N, C)``. On a CPU, they are faster than 1x1
  convolutions on 1x1 feature maps. The parameters are the same: when a weight file is loaded,
  weights of shape ``(O, I, 1, 1)`` are reshaped.
* Gates can be initialised to be almost open (close to 1); see
  :meth:`SqueezeExcitation.reset_parameters`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from senet_transfer.errors import UserError, check_choice
from senet_transfer.utils.private_api import is_exporting

SQUEEZES = ("avg", "max", "none")

EXCITATIONS = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu}

INITS = ("open", "random")

PLACEMENTS = ("standard", "pre", "post", "identity", "3x3", "mixture")

# Largest batch for which the compiler's loops are faster than a matrix multiplication library.
_FEW_IMAGES = 8

# Initial biases of fc2. The resulting gates are open or nearly open: 0.982, 0.964 and 1.
_OPEN_BIAS = {"sigmoid": 4.0, "tanh": 2.0, "relu": 1.0}


def hidden_width(channels: int, ratio: int, divisor: int = 1) -> int:
    """Return the hidden width, ``channels / ratio`` rounded to a multiple of ``divisor``."""
    if divisor == 1:
        return channels // ratio
    return max(divisor, int(channels / ratio + divisor / 2) // divisor * divisor)


@dataclass(frozen=True)
class SEOptions:
    """SE options of a network: the variant of the SE module and its position in residual blocks.

    Attributes:
        ratio: Reduction ratio r.
        squeeze: Pooling, "avg", "max" or "none".
        excitation: Activation of the gate, "sigmoid", "tanh" or "relu".
        placement: Position in a residual block (paper, Figure 5 and Table XV). "standard" gates the
            output of the residual branch before the sum. "pre" gates the input of the branch, and
            "post" the sum after its ReLU. "identity" gates the shortcut, after its projection if it
            has one. "3x3" gates the output of a bottleneck's 3x3 convolution, after its norm and
            ReLU. In a shake-shake block, "standard" gates each of the two branches, and "mixture"
            gates their mixture.
        stages: Stages with SE, from 2 to 5.
        bias: Whether the two linear layers have biases.
        divisor: The hidden width is rounded to a multiple of this number (8 in timm). With 1, the
            width is ``channels // ratio``.
        relu_before: Whether to add a ReLU between the residual branch and its gate, as in timm's
            legacy_seresnet18 and legacy_seresnet34 but not in the paper. Only supported with the
            standard placement.
        init: Initialisation, "open" or "random"; see :meth:`SqueezeExcitation.reset_parameters`.

    Raises:
        UserError: If an option has an invalid value.
    """

    ratio: int = 16
    squeeze: str = "avg"
    excitation: str = "sigmoid"
    placement: str = "standard"
    stages: tuple[int, ...] = (2, 3, 4, 5)
    bias: bool = True
    divisor: int = 1
    relu_before: bool = False
    init: str = "open"

    def __post_init__(self) -> None:
        check_choice("The squeeze", self.squeeze, SQUEEZES)
        check_choice("The excitation", self.excitation, EXCITATIONS)
        check_choice("The SE placement", self.placement, PLACEMENTS)
        check_choice("The SE initialisation", self.init, INITS)
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, int) or self.ratio < 1:
            raise UserError(f"The SE reduction ratio is {self.ratio!r}; expected an integer >= 1.")
        if isinstance(self.divisor, bool) or not isinstance(self.divisor, int) or self.divisor < 1:
            raise UserError(f"The SE divisor is {self.divisor!r}; expected an integer >= 1.")
        if self.relu_before and self.placement != "standard":
            raise UserError(
                f"The SE placement is {self.placement!r}, but a ReLU before the gate (relu_before) "
                "is only supported with 'standard'. Set relu_before to False, or the placement to "
                "'standard'."
            )
        if not isinstance(self.bias, bool) or not isinstance(self.relu_before, bool):
            raise UserError(
                f"The SE bias is {self.bias!r} and relu_before is {self.relu_before!r}; expected "
                "True or False for both."
            )
        if not self.stages or any(
            type(stage) is not int or stage not in (2, 3, 4, 5) for stage in self.stages
        ):
            raise UserError(
                f"The stages with SE are {self.stages!r}; expected one or more of 2, 3, 4, 5. To "
                "disable SE in all stages, use the network without SE."
            )

    def operator(self, channels: int) -> "SqueezeExcitation":
        """Build an SE module with these options for feature maps with ``channels`` channels."""
        return SqueezeExcitation(
            channels,
            ratio=self.ratio,
            bias=self.bias,
            squeeze=self.squeeze,
            excitation=self.excitation,
            divisor=self.divisor,
            init=self.init,
        )


class SqueezeExcitation(nn.Module):
    """Squeeze-and-Excitation module, which rescales channels based on the global context.

    It computes ``gate(x) * x`` with ``gate(x) = excitation(fc2(relu(fc1(squeeze(x)))))``.
    """

    def __init__(
        self,
        channels: int,
        *,
        ratio: int = 16,
        bias: bool = True,
        squeeze: str = "avg",
        excitation: str = "sigmoid",
        divisor: int = 1,
        init: str = "open",
    ):
        """
        Args:
            channels: Number of channels of the feature map.
            ratio: Reduction ratio r; the hidden layer has ``channels // ratio`` units.
            bias: Whether fc1 and fc2 have biases. The authors' released networks have biases; the
                networks of the paper's ablations (section 6) do not.
            squeeze: "avg" or "max" pooling over all positions, or "none" for no pooling. Without
                pooling, the two layers are 1x1 convolutions (the paper's NoSqueeze).
            excitation: Activation of the gate, "sigmoid", "tanh" or "relu".
            divisor: The hidden width is rounded to a multiple of this number; see
                :class:`SEOptions`.
            init: "open" or "random"; see :meth:`reset_parameters`.

        Raises:
            UserError: If a value is invalid, such as a ratio larger than the number of channels.
        """
        super().__init__()
        check_choice("The squeeze", squeeze, SQUEEZES)
        check_choice("The excitation", excitation, EXCITATIONS)
        check_choice("The initialisation", init, INITS)
        if not 1 <= ratio <= channels:
            raise UserError(
                f"The SE reduction ratio is {ratio}; expected an integer from 1 to {channels}, "
                f"because a layer with {channels} channels has no hidden units if the ratio is "
                "larger. Choose a different ratio."
            )
        hidden = hidden_width(channels, ratio, divisor)
        self.channels = channels
        self.squeeze = squeeze
        self.excitation = excitation
        self.init = init
        self.fc1 = nn.Linear(channels, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, channels, bias=bias)
        # True if fc1 reads the pooled input of the preceding convolution; see `fold_squeeze`.
        self.takes_input = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise fc1 with He initialisation, and fc2 according to ``init``.

        "open" is for networks that start from the weights of a network without SE. The weights of
        fc2 are zero, and the bias sets every gate to 0.98 (sigmoid). An SE backbone initialised
        from a plain ResNet then computes the same features as the ResNet, except for a difference
        of 2% per residual branch. The gates are then learnt during training. Gates near 0.5 would
        halve the output of every residual branch, and frozen batch norms could not compensate for
        this.

        "random" uses He initialisation for fc2, too, with zero biases, as in the paper's training
        from scratch. The gates start near 0.5, where a sigmoid is 14 times as steep as at an open
        gate. With open gates, weight decay can shrink fc1 to zero before fc2 has learnt anything.
        The gates then become constant.

        Without biases, a sigmoid gate can't be open for every input, so "open" is the same as
        "random". In this case, do not expect pretrained weights of a network without SE to work.
        """
        is_open = self.init == "open" and self.fc1.bias is not None
        nn.init.kaiming_normal_(self.fc1.weight, nonlinearity="relu")
        for layer in (self.fc1, self.fc2):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        if not is_open:
            nn.init.kaiming_normal_(self.fc2.weight, nonlinearity="relu")
            return
        nn.init.zeros_(self.fc2.weight)
        nn.init.constant_(self.fc2.bias, _OPEN_BIAS[self.excitation])

    def gate(self, x: Tensor) -> Tensor:
        """Compute the gates of a feature map.

        Args:
            x: Feature map ``(N, C, H, W)``.

        Returns:
            Gates ``(N, C, 1, 1)``, or ``(N, C, H, W)`` if ``squeeze`` is "none".
        """
        if self.squeeze == "none":
            hidden = F.relu(_conv1x1(x, self.fc1))
            return EXCITATIONS[self.excitation](_conv1x1(hidden, self.fc2))
        pooled = mean_of_maps(x) if self.squeeze == "avg" else x.amax((2, 3))
        return self.excite(pooled)[:, :, None, None]

    def excite(self, squeezed: Tensor) -> Tensor:
        """Compute gates ``(N, C)`` from pooled features ``(N, C)``."""
        hidden = F.relu(_linear(self.fc1, squeezed))
        return EXCITATIONS[self.excitation](_linear(self.fc2, hidden))

    def gate_and_add(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        """Return ``scale * gate(x) * x + y``, computing the product and the sum in one pass.

        Args:
            x: Output of the residual branch, ``(N, C, H, W)``, which is gated.
            y: Output of the shortcut, ``(N, C, H, W)``.
            scale: Factor for the gated branch.
        """
        # Call the module instead of `forward` to run its hooks. Complexity counts and the gate
        # analysis rely on these hooks.
        return self(x, y, scale)

    def forward(self, x: Tensor, y: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """Return ``gate(x) * x`` or, if ``y`` is given, ``scale * gate(x) * x + y``."""
        gate = self.gate(x)
        return x * gate if y is None else torch.addcmul(y, x, gate, value=scale)

    def extra_repr(self) -> str:
        """Return the squeeze and excitation variants for the module's repr."""
        return f"squeeze={self.squeeze}, excitation={self.excitation}"


def mean_of_maps(x: Tensor) -> Tensor:
    """Average feature maps ``(N, C, H, W)`` over all positions, and return ``(N, C)``."""
    # Reduce each axis separately. The loops that the compiler generates then follow the memory
    # layout and need no synchronisation between threads.
    return x.mean(3).mean(2) if _generated(x) else x.mean((2, 3))


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """Apply a linear layer.

    If :func:`_generated` returns True and the dtypes are equal, the product is computed with
    elementwise operations, so ``torch.compile`` generates code instead of calling a library such as
    MKL.
    """
    if not _generated(x) or x.dtype != layer.weight.dtype:
        return layer(x)
    out = (x[:, None] * layer.weight).sum(-1)
    return out if layer.bias is None else out + layer.bias


def _generated(x: Tensor) -> bool:
    """Return whether ``torch.compile`` is compiling inference with a small batch on a CPU.

    In this case, it is faster if the compiler generates loops for the whole SE block, from the
    pooling to the residual addition. Calls to a matrix multiplication library between these loops
    would cost more than the small matrix products themselves.
    """
    return (
        torch.compiler.is_dynamo_compiling()
        and not is_exporting()
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(x.device.type)
        and x.device.type == "cpu"
        and len(x) <= _FEW_IMAGES
    )


def _conv1x1(x: Tensor, fc: nn.Linear) -> Tensor:
    return F.conv2d(x, fc.weight[:, :, None, None], fc.bias)
