"""Tests that compare the SE module with plain implementations of the paper's equations."""

import pytest
import torch
from torch import nn

from senet_transfer.errors import UserError
from senet_transfer.layers import SEOptions, SqueezeExcitation


def randomised(channels: int = 32, **options) -> SqueezeExcitation:
    torch.manual_seed(0)
    se = SqueezeExcitation(channels, **options)
    for parameter in se.parameters():
        nn.init.normal_(parameter, std=0.5)
    return se


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()


def stated_gate(se: SqueezeExcitation, x: torch.Tensor) -> torch.Tensor:
    """Compute gates with equations 2 and 3 of the paper, or their variants, image by image."""
    gates = []
    for image in x.double():
        if se.squeeze == "avg":
            z = image.flatten(1).mean(1, keepdim=True)
        elif se.squeeze == "max":
            z = image.flatten(1).max(1, keepdim=True).values
        else:
            z = image.flatten(1)
        for fc, delta in ((se.fc1, "relu"), (se.fc2, se.excitation)):
            z = fc.weight.double() @ z
            if fc.bias is not None:
                z = z + fc.bias.double()[:, None]
            z = {"relu": z.clamp(min=0), "sigmoid": 1 / (1 + (-z).exp()), "tanh": z.tanh()}[delta]
        gates.append(z.reshape(-1, *(image.shape[1:] if se.squeeze == "none" else (1, 1))))
    return torch.stack(gates)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("excitation", ["sigmoid", "tanh", "relu"])
@pytest.mark.parametrize("squeeze", ["avg", "max", "none"])
def test_every_variant_computes_the_papers_equations(squeeze, excitation, bias):
    se = randomised(ratio=4, bias=bias, squeeze=squeeze, excitation=excitation)
    x, y = torch.randn(3, 32, 5, 7), torch.randn(3, 32, 5, 7)
    gate = stated_gate(se, x)
    torch.testing.assert_close(se.gate(x).double(), gate, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(se(x).double(), gate * x, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(se.gate_and_add(x, y).double(), gate * x + y, rtol=1e-5, atol=1e-5)


def test_gate_and_add_is_one_fused_multiply_add():
    se, x = randomised().eval(), torch.randn(2, 32, 4, 4)
    with torch.profiler.profile() as profile, torch.no_grad():
        se.gate_and_add(x, x)
    names = [event.name for event in profile.events()]
    assert names.count("aten::addcmul") == 1
    assert "aten::mul" not in names


@pytest.mark.parametrize("squeeze", ["avg", "max", "none"])
def test_gradients_equal_finite_differences(squeeze):
    se = randomised(6, ratio=2, squeeze=squeeze).double()
    x = torch.randn(2, 6, 3, 3, dtype=torch.double, requires_grad=True)
    y = torch.randn(2, 6, 3, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(se.gate_and_add, (x, y))


def test_random_gates_start_near_a_half_and_have_hes_standard_deviations():
    torch.manual_seed(0)
    se = SqueezeExcitation(1024, ratio=4, init="random")
    assert se.fc1.weight.std().item() == pytest.approx((2 / 1024) ** 0.5, rel=0.02)
    assert se.fc2.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.02)
    assert not se.fc1.bias.any()
    assert not se.fc2.bias.any()
    gates = se.gate(torch.rand(16, 1024, 2, 2))
    assert gates.mean().item() == pytest.approx(0.5, abs=0.02)
    assert (SqueezeExcitation(64).gate(torch.rand(4, 64, 2, 2)) > 0.98).all()
    with pytest.raises(UserError, match=r"initialisation is .*shut.* expected .*open.*random"):
        SEOptions(init="shut")


@pytest.mark.parametrize(("channels", "ratio", "hidden"), [(64, 16, 4), (608, 16, 38), (16, 16, 1)])
def test_the_hidden_layer_has_channels_over_ratio_units(channels, ratio, hidden):
    se = SqueezeExcitation(channels, ratio=ratio)
    assert se.fc1.weight.shape == (hidden, channels)
    assert se.fc2.weight.shape == (channels, hidden)


@pytest.mark.parametrize("excitation", ["sigmoid", "tanh", "relu"])
def test_gates_start_open_for_any_input(excitation):
    se = SqueezeExcitation(64, excitation=excitation)
    gate = se.gate(100 * torch.randn(4, 64, 3, 3))
    assert gate.min() > 0.95
    assert gate.max() <= 1


def test_gates_that_start_open_learn():
    torch.manual_seed(0)
    se = SqueezeExcitation(16, ratio=4)
    optimizer = torch.optim.SGD(se.parameters(), lr=1.0)
    x = torch.rand(8, 16, 2, 2)
    for _ in range(200):
        optimizer.zero_grad()
        loss = (se.gate(x).flatten(1)[:, :8] ** 2).mean()
        loss.backward()
        optimizer.step()
    gate = se.gate(x).flatten(1)
    assert gate[:, :8].max() < 0.5 < gate[:, 8:].min()


def test_an_empty_batch_is_supported():
    se = SqueezeExcitation(16)
    empty = torch.zeros(0, 16, 7, 7)
    assert se.gate_and_add(empty, empty).shape == empty.shape


@pytest.mark.long
def test_compiled_as_one_graph_it_computes_the_same():
    se, x = randomised(), torch.randn(2, 32, 4, 4)
    compiled = torch.compile(se.gate_and_add, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, x), se.gate_and_add(x, x))


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"squeeze": "max"}, {"squeeze": "none"}])
@pytest.mark.parametrize("images", [1, 8, 9])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.long
def test_compiled_for_inference_on_any_batch_size_it_computes_the_same(options, images, mode):
    se = randomised(**options).double()
    x = torch.randn(images, 32, 5, 7, dtype=torch.double)
    compiled = torch.compile(se.gate_and_add, backend="aot_eager", fullgraph=True)
    with mode():
        torch.testing.assert_close(compiled(x, x), se.gate_and_add(x, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("images", "calls"), [(1, 0), (8, 0), (9, 2)])
@pytest.mark.long
def test_compiled_for_inference_on_few_images_it_calls_no_matrix_library(images, calls):
    found = []

    def backend(graph, _inputs):
        found.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    se, x = randomised(), torch.randn(images, 32, 4, 4)
    with torch.no_grad():
        torch.compile(se.gate_and_add, backend=backend, fullgraph=True)(x, x)
    assert sum("linear" in name for name in found) == calls


@pytest.mark.long
def test_compiled_for_inference_under_autocast_it_computes_the_same():
    se, x = randomised(), torch.randn(2, 32, 4, 4)
    compiled = torch.compile(se.gate_and_add, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(compiled(x, x), se.gate_and_add(x, x))


def test_autocast_adds_tensors_of_two_dtypes():
    se, x = randomised(), torch.randn(2, 32, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = se.gate_and_add(x.bfloat16(), x)
    torch.testing.assert_close(out.float(), se.gate_and_add(x, x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"ratio": 0}, "ratio"),
        ({"ratio": 33}, "expected an integer from 1 to 32"),
        ({"squeeze": "sum"}, "'sum'; expected one of: avg, max, none"),
        ({"excitation": "gelu"}, "'gelu'; expected one of: sigmoid, tanh, relu"),
    ],
)
def test_an_invalid_operator_is_rejected(arguments, words):
    with pytest.raises(UserError, match=words):
        SqueezeExcitation(32, **arguments)


@pytest.mark.parametrize(
    "arguments",
    [{"placement": "before"}, {"stages": (1, 2)}, {"stages": ()}, {"ratio": 1.5}, {"ratio": True}],
)
def test_invalid_options_are_rejected(arguments):
    with pytest.raises(UserError, match="expected"):
        SEOptions(**arguments)
