"""The Squeeze-and-Excitation operator and its variants.

Paper: "Squeeze-and-Excitation Networks", section 3 (the operator) and section 6 (the variants).
Source of the parts that the paper leaves open: the authors' released network definitions.

What differs from other implementations:

* The join with a shortcut is one fused multiply-add, as in the authors' Axpy layer, not a
  multiplication that writes a feature map and an addition that reads it again.
* ``fc1`` and ``fc2`` are linear layers on ``(N, C)``, which on a CPU cost less than 1x1
  convolutions over 1x1 maps. The parameters are the same; files with ``(O, I, 1, 1)`` weights
  are reshaped when they are loaded.
* The gates start open; see :meth:`SqueezeExcitation.reset_parameters`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from senet_transfer.errors import UserError, check_choice

SQUEEZES = ("avg", "max", "none")

EXCITATIONS = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu}

PLACEMENTS = ("standard", "pre", "post", "identity", "3x3", "mixture")

# Up to as many a gate's products are so small that generated loops beat a matrix library.
_FEW_IMAGES = 8

# The bias of fc2 at which a gate starts (nearly) open: 0.982, 0.964 and 1.
_OPEN_BIAS = {"sigmoid": 4.0, "tanh": 2.0, "relu": 1.0}


def hidden_width(channels: int, ratio: int, divisor: int = 1) -> int:
    """Units of the hidden layer: ``channels // ratio``, or that to the nearest multiple."""
    if divisor == 1:
        return channels // ratio
    return max(divisor, int(channels / ratio + divisor / 2) // divisor * divisor)


@dataclass(frozen=True)
class SEOptions:
    """How a network is equipped with SE: the operator's variant, and where it sits.

    Attributes:
        ratio: the reduction ratio r.
        squeeze: "avg", "max" or "none".
        excitation: "sigmoid", "tanh" or "relu".
        placement: where in a residual block (paper, Figure 5 and Table XV). "standard" gates the
            residual branch before the sum; "pre" its input; "post" the sum after its ReLU;
            "identity" the shortcut, after its projection where it has one; "3x3" a bottleneck's
            3x3 convolution, after its norm and ReLU; "mixture" what a shake block mixes from its
            two branches, where "standard" gates each of the two.
        stages: the stages that get SE, of 2 to 5.
        bias: whether the two layers have biases.
        divisor: the hidden width is rounded to a multiple of it (timm: 8); 1 is channels // ratio.
        relu_before: whether a ReLU stands between the residual branch and its gate, which timm's
            legacy_seresnet18 and 34 have and the paper has not; for the standard placement.

    Raises:
        UserError: a value outside of these.
    """

    ratio: int = 16
    squeeze: str = "avg"
    excitation: str = "sigmoid"
    placement: str = "standard"
    stages: tuple[int, ...] = (2, 3, 4, 5)
    bias: bool = True
    divisor: int = 1
    relu_before: bool = False

    def __post_init__(self) -> None:
        check_choice("The squeeze", self.squeeze, SQUEEZES)
        check_choice("The excitation", self.excitation, EXCITATIONS)
        check_choice("The SE placement", self.placement, PLACEMENTS)
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, int) or self.ratio < 1:
            raise UserError(f"The SE reduction ratio is {self.ratio!r}, expected 1 or more.")
        if isinstance(self.divisor, bool) or not isinstance(self.divisor, int) or self.divisor < 1:
            raise UserError(f"The SE divisor is {self.divisor!r}, expected 1 or more.")
        if self.relu_before and self.placement != "standard":
            raise UserError(
                "A ReLU before the gate (relu_before) exists in the standard SE placement only, "
                f"found {self.placement!r}. Leave one of the two at its default."
            )
        if not isinstance(self.bias, bool) or not isinstance(self.relu_before, bool):
            raise UserError(
                f"SE's bias is {self.bias!r} and relu_before {self.relu_before!r}, expected True "
                "or False."
            )
        if not self.stages or any(stage not in (2, 3, 4, 5) for stage in self.stages):
            raise UserError(
                f"The stages with SE are {self.stages!r}, expected some of 2, 3, 4, 5. "
                "For none at all, take the network without SE."
            )

    def operator(self, channels: int) -> "SqueezeExcitation":
        """The operator of this variant for a feature map of ``channels``."""
        return SqueezeExcitation(
            channels,
            ratio=self.ratio,
            bias=self.bias,
            squeeze=self.squeeze,
            excitation=self.excitation,
            divisor=self.divisor,
        )


class SqueezeExcitation(nn.Module):
    """Gates that weigh the channels of a feature map by its global context.

    ``gate(x) = excitation(fc2(relu(fc1(squeeze(x)))))``.
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
    ):
        """
        Args:
            channels: channels of the feature map that is gated.
            ratio: the reduction ratio r; the hidden layer has ``channels // ratio`` units.
            bias: whether fc1 and fc2 have biases. The authors' released networks have them, the
                networks of the paper's ablations (section 6) don't.
            squeeze: "avg" or "max" pooling over all positions; "none" keeps the positions, so
                that the two layers act as 1x1 convolutions (the paper's NoSqueeze).
            excitation: the non-linearity of the gate: "sigmoid", "tanh" or "relu".
            divisor: the hidden width is rounded to a multiple of it; see :class:`SEOptions`.

        Raises:
            UserError: a value that makes no sense, such as a ratio above the channels.
        """
        super().__init__()
        check_choice("The squeeze", squeeze, SQUEEZES)
        check_choice("The excitation", excitation, EXCITATIONS)
        if not 1 <= ratio <= channels:
            raise UserError(
                f"The SE reduction ratio is {ratio}, expected 1 to {channels}: a layer of "
                f"{channels} channels would be left without a hidden unit. Lower the ratio."
            )
        hidden = hidden_width(channels, ratio, divisor)
        self.channels = channels
        self.squeeze = squeeze
        self.excitation = excitation
        self.fc1 = nn.Linear(channels, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, channels, bias=bias)
        # Set where fc1 starts from the input of the convolution before: `fold_squeeze`.
        self.takes_input = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Starts fc1 from He's initialisation and the gates open.

        With biases, fc2 starts from weight 0 and a bias at which every gate is 0.98 (sigmoid),
        whatever the input. A backbone that takes over the weights of a plain ResNet then computes
        what that ResNet computes to within 2% a residual branch, and training moves the gates
        from there: half-open gates, which random weights around zero give, would halve every
        residual branch and ruin the features, which frozen batch norms can't repair. From
        scratch the network starts as its plain counterpart does. Without biases no weights open
        a sigmoid for every input: both layers start from He's initialisation, gates near one
        half, and pretrained plain weights should not be expected to survive.
        """
        nn.init.kaiming_normal_(self.fc1.weight, nonlinearity="relu")
        if self.fc1.bias is None:
            nn.init.kaiming_normal_(self.fc2.weight, nonlinearity="relu")
            return
        nn.init.zeros_(self.fc1.bias)
        nn.init.zeros_(self.fc2.weight)
        nn.init.constant_(self.fc2.bias, _OPEN_BIAS[self.excitation])

    def gate(self, x: Tensor) -> Tensor:
        """The gates of a feature map.

        Args:
            x: ``(N, C, H, W)``.

        Returns:
            ``(N, C, 1, 1)``, or ``(N, C, H, W)`` without squeeze.
        """
        if self.squeeze == "none":
            hidden = F.relu(_conv1x1(x, self.fc1))
            return EXCITATIONS[self.excitation](_conv1x1(hidden, self.fc2))
        pooled = mean_of_maps(x) if self.squeeze == "avg" else x.amax((2, 3))
        return self.excite(pooled)[:, :, None, None]

    def excite(self, squeezed: Tensor) -> Tensor:
        """The gates of squeezed maps: ``(N, C)`` to ``(N, C)``."""
        hidden = F.relu(_linear(self.fc1, squeezed))
        return EXCITATIONS[self.excitation](_linear(self.fc2, hidden))

    def join(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        """``scale * gate(x) * x + y`` in one pass over the feature maps.

        Args:
            x: ``(N, C, H, W)``, gated by its own context (the residual branch).
            y: ``(N, C, H, W)``, added as it is (the shortcut).
            scale: of the sum's first part.
        """
        # A call of the module, so that hooks see it: counters and observers of gates rely on it.
        return self(x, y, scale)

    def forward(self, x: Tensor, y: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """``gate(x) * x``, of the shape of ``x``; with ``y``, as :meth:`join`."""
        gate = self.gate(x)
        return x * gate if y is None else torch.addcmul(y, x, gate, value=scale)

    def extra_repr(self) -> str:
        """The variant, where it is not the paper's standard."""
        return f"squeeze={self.squeeze}, excitation={self.excitation}"


def mean_of_maps(x: Tensor) -> Tensor:
    """The squeeze: ``(N, C, H, W)`` to ``(N, C)``."""
    # One side after the other, the compiler's loops take a map in the order of its memory, and
    # threads have shares of it that add up without waiting.
    return x.mean(3).mean(2) if _generated(x) else x.mean((2, 3))


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """``layer(x)``."""
    if not _generated(x) or x.dtype != layer.weight.dtype:
        return layer(x)
    out = (x[:, None] * layer.weight).sum(-1)
    return out if layer.bias is None else out + layer.bias


def _generated(x: Tensor) -> bool:
    """Whether the compiler writes code for a CPU that infers on a few images.

    It makes one loop after another of a gate then, from the map to the sum. Calls of a matrix
    library between them cost more than these small products do.
    """
    return (
        torch.compiler.is_dynamo_compiling()
        and not torch.compiler.is_exporting()
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(x.device.type)
        and x.device.type == "cpu"
        and len(x) <= _FEW_IMAGES
    )


def _conv1x1(x: Tensor, fc: nn.Linear) -> Tensor:
    return F.conv2d(x, fc.weight[:, :, None, None], fc.bias)
