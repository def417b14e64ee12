"""Tests that compare the fused gated sum with ``se(norm(conv(x))) + shortcut``."""

import copy

import pytest
import torch
from detectron2.layers import Conv2d, get_norm
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmark import saved_bytes
from senet_transfer import create_backbone
from senet_transfer.layers import SqueezeExcitation
from senet_transfer.layers import fused_gate as module
from senet_transfer.layers.fused_gate import gated_sum

NORMS = ["BN", "BN in evaluation", "FrozenBN"]

every_norm = pytest.mark.parametrize("norm", NORMS)
every_layout = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])


class Sum(nn.Module):
    """Last convolution, norm, SE gate and residual addition of a residual block.

    They are computed by ``gated_sum`` or, if ``stated`` is True, by separate PyTorch operators.
    """

    def __init__(self, norm: str, *, inputs: int = 6, channels: int = 8, kernel: int = 1, **se):
        super().__init__()
        torch.manual_seed(0)
        self.conv = Conv2d(
            inputs,
            channels,
            kernel,
            padding=kernel // 2,
            bias=False,
            norm=get_norm(norm.partition(" ")[0], channels),
        )
        self.se = SqueezeExcitation(channels, ratio=2, **se)
        for tensor in (*self.se.parameters(), self.conv.norm.weight, self.conv.norm.bias):
            nn.init.normal_(tensor, std=0.7)
        if self.se.fc1.bias is not None:
            nn.init.ones_(self.se.fc1.bias)  # makes some hidden units active
        nn.init.normal_(self.conv.norm.running_mean)
        nn.init.uniform_(self.conv.norm.running_var, 0.5, 2)
        self.train("evaluation" not in norm)
        self.stated = False

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if not self.stated:
            return gated_sum(self.conv, self.se, x, y)
        out = self.conv(x)
        pooled = out.mean((2, 3))
        hidden = torch.relu(nn.functional.linear(pooled, self.se.fc1.weight, self.se.fc1.bias))
        gate = nn.functional.linear(hidden, self.se.fc2.weight, self.se.fc2.bias)
        gate = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}[self.se.excitation](gate)
        return out * gate[:, :, None, None] + y


def both(norm: str, **options) -> tuple[Sum, Sum]:
    ours = Sum(norm, **options).double()
    theirs = copy.deepcopy(ours)
    theirs.stated = True
    return ours, theirs


def maps(layout=torch.contiguous_format, n: int = 3, side: int = 5, dtype=torch.double):
    torch.manual_seed(1)
    shapes = ((n, 6, side, side + 1), (n, 8, side, side + 1))
    return [
        torch.randn(shape, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
        for shape in shapes
    ]


def gradients(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    out = model(x, y)
    upstream = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
    leaves = {"x": x, "y": y, **dict(model.named_parameters())}
    found = torch.autograd.grad(out, list(leaves.values()), upstream)
    return {"out": out, **dict(zip(leaves, found, strict=True))}


@every_norm
@every_layout
@pytest.mark.parametrize(
    "options",
    [{}, {"kernel": 3}, {"excitation": "tanh", "bias": False}],
    ids=["1x1", "3x3", "tanh"],
)
def test_values_gradients_and_statistics_equal_the_reference(norm, layout, options):
    ours, theirs = both(norm, **options)
    x, y = maps(layout)
    found, expected = gradients(ours, x, y), gradients(theirs, x, y)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-10, atol=1e-10, msg=key)
    for key, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], tensor, msg=key)


@pytest.mark.parametrize(
    ("norm", "node", "few"),
    [
        ("BN", "_Norm", 256),
        ("BN in evaluation", "_Norm", 256),
        ("FrozenBN", "_SmallConv", 256),
        ("FrozenBN", "_LargeConv", 0),
    ],
)
@pytest.mark.long
def test_gradients_equal_finite_differences(norm, node, few, monkeypatch):
    monkeypatch.setattr(module, "_FEW_POSITIONS", few)
    ours = Sum(norm).double()
    x, y = maps(n=2, side=2)
    assert ours(x, y).grad_fn.name() == f"{node}SumBackward"
    assert torch.autograd.gradcheck(lambda x, y, *_: ours(x, y), (x, y, *ours.parameters()))


@every_layout
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("learns", ["all", "all but x", "the gate", "x"])
def test_small_and_large_maps_have_the_same_gradients(layout, count, learns, monkeypatch):
    """Compare the gradients of both autograd functions with those of the unfused operations.

    The cases differ in which tensors require gradients. The size of the feature map determines
    which autograd function is used.
    """
    ours, theirs = both("FrozenBN")
    x, y = maps(layout, n=count)
    for model in (ours, theirs):
        for name, parameter in model.named_parameters():
            learning = {"the gate": "se." in name, "x": False}.get(learns, True)
            parameter.requires_grad_(learning)
    x.requires_grad_(learns in ("all", "x"))
    leaves = [leaf for leaf in (x, y) if leaf.requires_grad]
    inputs = [
        [*leaves, *(p for p in model.parameters() if p.requires_grad)] for model in (ours, theirs)
    ]
    expected = torch.autograd.grad(theirs(x, y).square().sum(), inputs[1])
    for few in (0, 10**6):
        monkeypatch.setattr(module, "_FEW_POSITIONS", few)
        found = torch.autograd.grad(ours(x, y).square().sum(), inputs[0])
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("side", [1, 2, 9])
@pytest.mark.parametrize("kernel", [1, 3])
@every_layout
@pytest.mark.parametrize("norm", NORMS[1:])
def test_without_gradients_the_result_is_the_same(norm, layout, kernel, side):
    ours, theirs = both(norm, kernel=kernel)
    x, y = maps(layout, side=side)
    with torch.no_grad():
        untouched = x.clone(), y.clone()
        torch.testing.assert_close(ours(x, y), theirs(x, y), rtol=1e-10, atol=1e-10)
        assert torch.equal(x, untouched[0])
        assert torch.equal(y, untouched[1])


@every_norm
def test_a_frozen_gate_or_convolution_does_not_change_other_gradients(norm):
    for frozen in ("se", "conv"):
        ours, theirs = both(norm)
        x, y = maps()
        for model in (ours, theirs):
            getattr(model, frozen).requires_grad_(False)
            model(x, y).square().sum().backward()
        for (key, parameter), other in zip(
            ours.named_parameters(), theirs.parameters(), strict=True
        ):
            if parameter.requires_grad:
                torch.testing.assert_close(parameter.grad, other.grad, msg=key)
            else:
                assert parameter.grad is None


@every_norm
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_autocast_is_as_exact_as_the_reference_under_autocast(norm, layout):
    exact = gradients(both(norm)[1], *maps(n=8, side=12))
    errors = {}
    for stated in (False, True):
        model = Sum(norm)
        model.stated = stated
        x, y = maps(n=8, side=12, dtype=torch.float32)
        if layout == "channels_last":
            x, y = (t.detach().to(memory_format=torch.channels_last) for t in (x, y))
        x, y = (t.detach().bfloat16().requires_grad_() for t in (x, y))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = gradients(model, x, y)
        assert stated or "Sum" in found["out"].grad_fn.name()
        errors[stated] = {
            key: ((tensor.double() - exact[key]).norm() / exact[key].norm()).item()
            for key, tensor in found.items()
        }
    for key, error in errors[False].items():
        assert error < max(1.5 * errors[True][key], 5e-3), key


@every_norm
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.long
def test_compiled_as_one_graph_it_computes_the_same(norm, backend):
    ours, theirs = both(norm)
    x, y = maps()
    compiled = torch.compile(ours, backend=backend, fullgraph=True)
    out = compiled(x, y)
    torch.testing.assert_close(out, theirs(x, y))
    out.sum().backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(theirs(x, y).sum(), x)[0])


@every_norm
def test_backward_can_be_called_again_and_under_checkpointing(norm):
    ours, theirs = both(norm)
    x, y = maps()
    expected = torch.autograd.grad(theirs(x, y).square().sum(), [x, *theirs.parameters()])
    loss = ours(x, y).square().sum()
    leaves = [x, *ours.parameters()]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    recomputed = checkpoint(ours, x, y, use_reentrant=False).square().sum()
    third = torch.autograd.grad(recomputed, leaves)
    for found in (first, second, third):
        torch.testing.assert_close(found, expected)


@every_norm
def test_registered_hooks_are_called(norm):
    for name in ("conv", "conv.norm", "se.fc1", "se.fc2"):
        ours, theirs = both(norm)
        x, y = maps()
        calls = []
        ours.get_submodule(name).register_forward_hook(lambda *call, calls=calls: calls.append(1))
        torch.testing.assert_close(ours(x, y), theirs(x, y))
        assert calls, name


@pytest.mark.parametrize("norm", NORMS[1:])
def test_functional_transforms_use_plain_operators(norm):
    ours, theirs = both(norm)
    x, y = maps()
    found = torch.func.grad(lambda x: ours(x, y).square().sum())(x)
    expected = torch.autograd.grad(theirs(x, y).square().sum(), x)[0]
    torch.testing.assert_close(found, expected)


def test_a_second_derivative_is_an_error_and_not_wrong():
    x, y = maps()
    for norm in NORMS:
        out = Sum(norm).double()(x, y)
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
@pytest.mark.parametrize(("name", "plain"), [("se_resnet50", "resnet50")])
@pytest.mark.long
def test_training_saves_at_most_2_percent_more_than_without_gates(name, plain, norm):
    """Compare the size of the tensors saved for the backward pass with and without SE.

    An unfused multiplication with the gate would save 20 to 50% more than the network without SE.
    """
    kept = {}
    for model in (name, plain):
        backbone = create_backbone(model, norm=norm).train()
        outputs = []
        images = torch.randn(2, 3, 128, 128)
        kept[model] = saved_bytes(lambda: outputs.append(backbone(images)), backbone)  # noqa: B023
    assert kept[plain] > 10e6
    assert kept[name] < 1.02 * kept[plain]
