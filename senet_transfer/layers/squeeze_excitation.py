"""The Squeeze-and-Excitation operator and its variants.

Paper: "Squeeze-and-Excitation Networks", section 3 (the operator) and section 6 (the variants).
Details that the paper does not specify follow the authors' released network definitions.

Differences from other implementations:

* Gating and the sum with the shortcut are one fused multiply-add, as in the authors' Axpy layer.
  This avoids writing the gated feature map and reading it again for the addition.
* ``fc1`` and ``fc2`` are linear layers on ``(N, C)``, which are faster on a CPU than 1x1
  convolutions on 1x1 feature maps. The parameters are the same; weights of shape
  ``(O, I, 1, 1)`` in files are reshaped when they are loaded.
* The gates are initialised open; see :meth:`SqueezeExcitation.reset_parameters`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from senet_transfer.errors import UserError, check_choice

SQUEEZES = ("avg", "max", "none")

EXCITATIONS = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu}

PLACEMENTS = ("standard", "pre", "post", "identity", "3x3", "mixture")

# Maximum batch size for which the compiler's generated loops are faster than a matrix library.
_FEW_IMAGES = 8

# Initial bias of fc2, at which a gate is (nearly) open: 0.982, 0.964 and 1.
_OPEN_BIAS = {"sigmoid": 4.0, "tanh": 2.0, "relu": 1.0}


def hidden_width(channels: int, ratio: int, divisor: int = 1) -> int:
    """Return the number of hidden units: ``channels / ratio``, rounded to a multiple of divisor."""
    if divisor == 1:
        return channels // ratio
    return max(divisor, int(channels / ratio + divisor / 2) // divisor * divisor)


@dataclass(frozen=True)
class SEOptions:
    """SE configuration of a network: the operator's variant and its position in the blocks.

    Attributes:
        ratio: the reduction ratio r.
        squeeze: the pooling, "avg", "max" or "none".
        excitation: the activation of the gate, "sigmoid", "tanh" or "relu".
        placement: the position in a residual block (paper, Figure 5 and Table XV). "standard" gates
            the output of the residual branch before the sum; "pre" the input of the branch; "post"
            the sum after its ReLU; "identity" the shortcut, after its projection if it has one;
            "3x3" the output of a bottleneck's 3x3 convolution, after its norm and ReLU; "mixture"
            the mixture of the two branches of a shake block, in which "standard" gates each branch.
        stages: the stages with SE, from 2 to 5.
        bias: whether the two linear layers have biases.
        divisor: the hidden width is rounded to a multiple of this number (timm uses 8); with 1, it
            is ``channels // ratio``.
        relu_before: whether to add a ReLU between the residual branch and its gate, as in timm's
            legacy_seresnet18 and 34 but not in the paper. Only valid for the standard placement.

    Raises:
        UserError: if an option has an invalid value.
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
            raise UserError(f"The SE reduction ratio is {self.ratio!r}, expected an integer >= 1.")
        if isinstance(self.divisor, bool) or not isinstance(self.divisor, int) or self.divisor < 1:
            raise UserError(f"The SE divisor is {self.divisor!r}, expected an integer >= 1.")
        if self.relu_before and self.placement != "standard":
            raise UserError(
                "A ReLU before the gate (relu_before) is only available with the standard SE "
                f"placement, found {self.placement!r}. Set one of the two to its default."
            )
        if not isinstance(self.bias, bool) or not isinstance(self.relu_before, bool):
            raise UserError(
                f"The SE bias is {self.bias!r} and relu_before is {self.relu_before!r}, expected "
                "True or False for both."
            )
        if not self.stages or any(stage not in (2, 3, 4, 5) for stage in self.stages):
            raise UserError(
                f"The stages with SE are {self.stages!r}, expected some of 2, 3, 4, 5. "
                "For no SE at all, use the network without SE."
            )

    def operator(self, channels: int) -> "SqueezeExcitation":
        """Build the SE operator of this variant for a feature map with ``channels`` channels."""
        return SqueezeExcitation(
            channels,
            ratio=self.ratio,
            bias=self.bias,
            squeeze=self.squeeze,
            excitation=self.excitation,
            divisor=self.divisor,
        )


class SqueezeExcitation(nn.Module):
    """Squeeze-and-Excitation operator, which rescales channels according to the global context.

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
    ):
        """
        Args:
            channels: number of channels of the feature map.
            ratio: the reduction ratio r; the hidden layer has ``channels // ratio`` units.
            bias: whether fc1 and fc2 have biases. The authors' released networks have biases; the
                networks of the paper's ablations (section 6) do not.
            squeeze: "avg" or "max" pooling over all positions, or "none" for no pooling, which
                turns the two layers into 1x1 convolutions (the paper's NoSqueeze).
            excitation: the activation of the gate, "sigmoid", "tanh" or "relu".
            divisor: the hidden width is rounded to a multiple of this number; see
                :class:`SEOptions`.

        Raises:
            UserError: if a value is invalid, such as a ratio larger than the number of channels.
        """
        super().__init__()
        check_choice("The squeeze", squeeze, SQUEEZES)
        check_choice("The excitation", excitation, EXCITATIONS)
        if not 1 <= ratio <= channels:
            raise UserError(
                f"The SE reduction ratio is {ratio}, expected 1 to {channels}: with a larger one, "
                f"a layer of {channels} channels has no hidden units. Lower the ratio."
            )
        hidden = hidden_width(channels, ratio, divisor)
        self.channels = channels
        self.squeeze = squeeze
        self.excitation = excitation
        self.fc1 = nn.Linear(channels, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, channels, bias=bias)
        # True if fc1 takes the pooled input of the preceding convolution; see `fold_squeeze`.
        self.takes_input = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise fc1 with He's initialisation, and fc2 so that the gates are open.

        With biases, the weights of fc2 are zero and its bias makes every gate 0.98 (sigmoid) for
        any input. An SE backbone that is initialised from a plain ResNet then computes the same as
        this ResNet, up to 2% per residual branch, and training moves the gates from there. Random
        weights around zero would instead give gates near 0.5, which halve every residual branch;
        frozen batch norms could not compensate for that. A network trained from scratch starts
        like its plain counterpart.

        Without biases, no weights open a sigmoid for every input. Both layers then use He's
        initialisation, and the gates start near 0.5. Pretrained weights of a plain network are not
        expected to work in this case.
        """
        nn.init.kaiming_normal_(self.fc1.weight, nonlinearity="relu")
        if self.fc1.bias is None:
            nn.init.kaiming_normal_(self.fc2.weight, nonlinearity="relu")
            return
        nn.init.zeros_(self.fc1.bias)
        nn.init.zeros_(self.fc2.weight)
        nn.init.constant_(self.fc2.bias, _OPEN_BIAS[self.excitation])

    def gate(self, x: Tensor) -> Tensor:
        """Compute the gates of a feature map.

        Args:
            x: feature map ``(N, C, H, W)``.

        Returns:
            Gates ``(N, C, 1, 1)``, or ``(N, C, H, W)`` if ``squeeze`` is "none".
        """
        if self.squeeze == "none":
            hidden = F.relu(_conv1x1(x, self.fc1))
            return EXCITATIONS[self.excitation](_conv1x1(hidden, self.fc2))
        pooled = mean_of_maps(x) if self.squeeze == "avg" else x.amax((2, 3))
        return self.excite(pooled)[:, :, None, None]

    def excite(self, squeezed: Tensor) -> Tensor:
        """Compute gates ``(N, C)`` from squeezed feature maps ``(N, C)``."""
        hidden = F.relu(_linear(self.fc1, squeezed))
        return EXCITATIONS[self.excitation](_linear(self.fc2, hidden))

    def join(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        """Return ``scale * gate(x) * x + y``, computed in one pass over the feature maps.

        Args:
            x: output of the residual branch, ``(N, C, H, W)``, which is gated.
            y: output of the shortcut, ``(N, C, H, W)``.
            scale: factor of the gated branch.
        """
        # Call the module and not `forward`, so that hooks run: complexity counts and the analysis
        # of gates rely on them.
        return self(x, y, scale)

    def forward(self, x: Tensor, y: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """Return ``gate(x) * x``; with ``y``, return ``scale * gate(x) * x + y``."""
        gate = self.gate(x)
        return x * gate if y is None else torch.addcmul(y, x, gate, value=scale)

    def extra_repr(self) -> str:
        """Return the variant for the module's repr."""
        return f"squeeze={self.squeeze}, excitation={self.excitation}"


def mean_of_maps(x: Tensor) -> Tensor:
    """Average feature maps ``(N, C, H, W)`` over all positions, to ``(N, C)``."""
    # With one axis at a time, the compiler generates loops that follow the memory layout and whose
    # threads need no synchronisation.
    return x.mean(3).mean(2) if _generated(x) else x.mean((2, 3))


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """Return ``layer(x)``, as a sum of products if the compiler generates loops for it."""
    if not _generated(x) or x.dtype != layer.weight.dtype:
        return layer(x)
    out = (x[:, None] * layer.weight).sum(-1)
    return out if layer.bias is None else out + layer.bias


def _generated(x: Tensor) -> bool:
    """Return whether ``torch.compile`` generates code for inference on a CPU with a small batch.

    It then fuses the gate, from feature map to sum, into consecutive loops. Calls of a matrix
    library between these loops would cost more than such small products.
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
