"""Tests for the shake-shake operator and for the blocks that use it."""

import pytest
import torch

from senet_transfer import create_backbone
from senet_transfer.layers import SEOptions, ShakeMix
from senet_transfer.models.backbones.shake_resnet import ShakeBasicBlock, ShakeBottleneckBlock

BLOCKS = [ShakeBasicBlock, ShakeBottleneckBlock]


def coefficients(mix: ShakeMix, images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each image's weight of the first branch in the forward and backward passes.

    These are alpha and beta in the Shake-Shake paper. They are computed from the outputs and
    gradients of ``mix`` on constant inputs.
    """
    a = torch.ones(images, 3, 2, 2, requires_grad=True)
    b = torch.zeros(images, 3, 2, 2, requires_grad=True)
    out = mix(a, b)
    out.sum().backward()
    torch.testing.assert_close(a.grad + b.grad, torch.ones_like(a))
    for values in (out, a.grad):
        assert (values == values[:, :1, :1, :1]).all()  # one value per image
    return out[:, 0, 0, 0].detach(), a.grad[:, 0, 0, 0]


def test_coefficients_are_uniform_and_differ_between_images_forward_and_backward():
    torch.manual_seed(0)
    alpha, beta = coefficients(ShakeMix(), 4000)
    for drawn in (alpha, beta):
        assert len(drawn.unique()) > 3900
        assert 0 <= drawn.min() < 0.01
        assert 0.99 < drawn.max() <= 1
        assert drawn.mean() == pytest.approx(0.5, abs=0.02)
        assert drawn.std() == pytest.approx(12**-0.5, abs=0.02)
    assert abs(torch.corrcoef(torch.stack((alpha, beta)))[0, 1]) < 0.06


def test_even_uses_one_half_only_in_the_backward_pass():
    alpha, beta = coefficients(ShakeMix(even=True), 100)
    assert len(alpha.unique()) > 90
    assert (beta == 0.5).all()


def test_evaluation_uses_one_half_forward_and_backward():
    alpha, beta = coefficients(ShakeMix().eval(), 10)
    assert (alpha == 0.5).all()
    assert (beta == 0.5).all()


def test_a_seed_reproduces_forward_and_backward():
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(torch.stack(coefficients(ShakeMix(), 8)))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_stays_reduced(dtype):
    a = torch.ones(4, 2, 2, 2, dtype=dtype, requires_grad=True)
    out = ShakeMix()(a, torch.zeros_like(a))
    out.sum().backward()
    assert out.dtype == a.grad.dtype == dtype


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("placement", [None, "standard", "identity"])
@pytest.mark.long
def test_the_expectation_over_draws_equals_the_test_time_block(kind, placement):
    """Check that the mean output over many random draws approaches the test-time output."""
    torch.manual_seed(0)
    se = SEOptions(placement=placement) if placement else None
    block = kind(16, 32, stride=2, se=se).eval()
    x = torch.randn(2, 16, 8, 8)
    if kind is ShakeBottleneckBlock:
        block.shortcut.norm.bias.data.fill_(100.0)  # so that the final ReLU clips no values
    with torch.no_grad():
        expected = block(x)
        block.mix.train()  # only the mix, so that norms keep their statistics
        # The mix draws a value for each image in the batch.
        many = block(x.repeat(3000, 1, 1, 1)).unflatten(0, (3000, 2))
    assert many.std(0).max() > 0.1
    error = (many.mean(0) - expected).abs() / (many.std(0) / 3000**0.5 + 1e-5)
    assert error.max() < 6  # maximum of 2 x 32 x 16 values, in standard errors


@pytest.mark.parametrize("kind", BLOCKS)
def test_gradients_reach_the_branches_with_beta(kind):
    torch.manual_seed(0)
    block = kind(32, 32)
    gradients = {}
    for number in (1, 2):
        branch = getattr(block, f"branch{number}")
        branch.register_full_backward_hook(
            lambda _, __, grad, number=number: gradients.update({number: grad[0]})
        )
    block(torch.randn(5, 32, 8, 8, requires_grad=True)).square().sum().backward()
    total = gradients[1] + gradients[2]
    beta = [(g / t)[t.abs() > 1e-2].mean() for g, t in zip(gradients[1], total, strict=True)]
    for g, t, share in zip(gradients[1], total, beta, strict=True):
        torch.testing.assert_close(g, t * share, rtol=1e-3, atol=1e-4)
    assert len({round(float(share), 4) for share in beta}) == 5


def test_a_frozen_stage_does_not_shake():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    backbone = create_backbone("shake_shake26_2x96d", width=8, freeze_at=2, out_features=["res2"])
    with torch.no_grad():
        assert torch.equal(backbone.train()(x)["res2"], backbone(x)["res2"])
        backbone = create_backbone("shake_shake26_2x96d", width=8, out_features=["res2"])
        assert not torch.equal(backbone.train()(x)["res2"], backbone(x)["res2"])


@pytest.mark.parametrize("name", ["se_shake_shake26_2x96d", "shake_even29_2x4x64d"])
@pytest.mark.long
def test_a_network_trains_under_autocast(name):
    torch.manual_seed(0)
    backbone = create_backbone(name, **({"width": 16} if "26" in name else {}))
    with torch.autocast("cpu", torch.bfloat16):
        out = backbone(torch.randn(2, 3, 8, 8))["res4"]
        out.float().square().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in backbone.parameters())


@pytest.mark.long
def test_the_operator_compiles_in_training():
    mix = ShakeMix()
    a = torch.randn(4, 2, 3, 3, requires_grad=True)
    b = torch.randn(4, 2, 3, 3)
    torch.manual_seed(0)
    expected = mix(a, b)
    expected.sum().backward()
    grad, a.grad = a.grad, None
    torch.manual_seed(0)
    found = torch.compile(mix, backend="aot_eager", fullgraph=True)(a, b)
    found.sum().backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(a.grad, grad)
