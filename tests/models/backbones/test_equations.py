"""Tests that compare SE residual blocks with plain-PyTorch implementations."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import build_resnet_backbone
from torch import nn

from senet_transfer import create_backbone
from senet_transfer.layers import SEOptions
from senet_transfer.models.backbones.blocks import SEBasicBlock, SEBottleneckBlock, SENet154Block

STAGES = ["res2", "res3", "res4", "res5"]


def randomise(module: nn.Module) -> nn.Module:
    """Randomise all parameters and running statistics, and switch the module to eval mode.

    With the default values, such as zero biases, some errors would not change the output.
    """
    torch.manual_seed(0)
    for key, tensor in module.state_dict().items():
        if key.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif tensor.dim() == 4:
            nn.init.kaiming_normal_(tensor)
        elif tensor.is_floating_point():
            tensor.normal_(1.0 if key.endswith("norm.weight") else 0.0, 0.3)
    return module.eval()


def conv_bn(layer: nn.Module, x: torch.Tensor, stride: int, groups: int = 1) -> torch.Tensor:
    norm = layer.norm
    x = F.conv2d(x, layer.weight, stride=stride, padding=layer.weight.shape[-1] // 2, groups=groups)
    x = (x - norm.running_mean[:, None, None]) / (norm.running_var + 1e-5).sqrt()[:, None, None]
    return x * norm.weight[:, None, None] + norm.bias[:, None, None]


def gated(se: nn.Module, x: torch.Tensor) -> torch.Tensor:
    z = F.relu(F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), se.fc1.weight, se.fc1.bias))
    s = 1 / (1 + (-F.linear(z, se.fc2.weight, se.fc2.bias)).exp())
    return torch.einsum("nchw,nc->nchw", x, s)


def stated_block(
    block: nn.Module, x: torch.Tensor, strides: list[int], groups: int = 1, gated=gated
):
    """Compute the output of a residual block, as defined in the paper's Figure 5 and Table XV."""
    placement = block.placement
    out = gated(block.se, x) if placement == "pre" else x
    convs = [block.conv1, block.conv2] + ([block.conv3] if hasattr(block, "conv3") else [])
    for index, (layer, stride) in enumerate(zip(convs, strides, strict=True)):
        out = conv_bn(layer, out, stride, groups if index == 1 else 1)
        if index < len(convs) - 1:
            out = F.relu(out)
        if placement == "3x3" and index == 1:
            out = gated(block.se, out)
    shortcut = x
    if block.shortcut is not None:
        shortcut = conv_bn(block.shortcut, x, max(strides))
    if placement == "standard":
        out = gated(block.se, out)
    if placement == "identity":
        shortcut = gated(block.se, shortcut)
    out = F.relu(out + shortcut)
    return gated(block.se, out) if placement == "post" else out


@pytest.mark.parametrize("shape", [(64, 128, 2), (64, 64, 1)])
@pytest.mark.parametrize("placement", ["standard", "pre", "post", "identity"])
def test_a_basic_block_computes_the_papers_figure(placement, shape):
    inputs, outputs, stride = shape
    block = SEBasicBlock(inputs, outputs, stride=stride, se=SEOptions(placement=placement))
    randomise(block)
    x = torch.rand(2, inputs, 8, 8)
    expected = stated_block(block, x, [stride, 1])
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("in_1x1", [True, False])
@pytest.mark.parametrize("placement", ["standard", "pre", "post", "identity", "3x3"])
def test_a_bottleneck_computes_the_papers_figure(placement, in_1x1):
    block = SEBottleneckBlock(
        64,
        128,
        bottleneck_channels=32,
        stride=2,
        num_groups=4,
        stride_in_1x1=in_1x1,
        se=SEOptions(placement=placement),
    )
    randomise(block)
    x = torch.rand(2, 64, 8, 8)
    expected = stated_block(block, x, [2, 1, 1] if in_1x1 else [1, 2, 1], groups=4)
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("placement", ["standard", "pre", "post", "identity", "3x3"])
def test_without_squeeze_the_gates_are_1x1_convolutions_of_every_position(placement):
    """Compare SE without squeeze (NoSqueeze in the paper's Table XVI) with 1x1 convolutions."""
    se = SEOptions(placement=placement, squeeze="none", ratio=4)
    block = SEBottleneckBlock(64, 128, bottleneck_channels=32, stride=2, se=se)
    randomise(block)
    x = torch.rand(2, 64, 8, 8)

    def gated_by_position(se: nn.Module, x: torch.Tensor) -> torch.Tensor:
        z = F.conv2d(x, se.fc1.weight[:, :, None, None], se.fc1.bias).clamp(min=0)
        return x * F.conv2d(z, se.fc2.weight[:, :, None, None], se.fc2.bias).sigmoid()

    expected = stated_block(block, x, [1, 2, 1], gated=gated_by_position)
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("inputs", "stride", "kernel"), [(128, 2, 3), (128, 1, 1)])
def test_senet154s_block_equals_the_authors(inputs, stride, kernel):
    block = randomise(SENet154Block(inputs, 256, stride=stride))
    assert block.conv1.weight.shape == (128, inputs, 1, 1)
    assert block.conv2.weight.shape == (256, 128 // 64, 3, 3)
    assert block.shortcut.weight.shape == (256, inputs, kernel, kernel)
    x = torch.rand(2, inputs, 8, 8)
    expected = stated_block(block, x, [1, stride, 1], groups=64)
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)


def stated_pool(x: torch.Tensor, pool: str) -> torch.Tensor:
    """Compute a 3x3 max pool with stride 2, using an explicit border of minus infinity."""
    border = (1, 1, 1, 1) if pool == "pad" else (0, 2, 0, 2)
    windows = F.pad(x, border, value=-torch.inf).unfold(2, 3, 2).unfold(3, 3, 2)
    return windows.amax((-1, -2))[:, :, : -(-x.shape[2] // 2), : -(-x.shape[3] // 2)]


@pytest.mark.parametrize("pool", ["pad", "ceil"])
@pytest.mark.parametrize("side", [30, 32])
@pytest.mark.long
def test_the_stem_pool_has_the_requested_border(pool, side):
    stem = randomise(create_backbone("resnet18", stem_pool=pool, out_features=["stem"])).stem
    x = torch.randn(1, 3, 2 * side, 2 * side)
    expected = stated_pool(F.relu(F.conv2d(x, stem.conv1.weight, stride=2, padding=3)), pool)
    stem.conv1.norm = None
    torch.testing.assert_close(stem(x), expected)


@pytest.mark.long
def test_the_two_stem_pools_differ_in_values_but_not_in_shape():
    pad, ceil = (randomise(create_backbone("resnet18", stem_pool=p)) for p in ("pad", "ceil"))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        a, b = pad(x)["res5"], ceil(x)["res5"]
    assert a.shape == b.shape
    assert (a - b).abs().max() > 1e-2


# Basic blocks have no 1x1 convolution.
@pytest.mark.parametrize(("depth", "in_1x1"), [(18, False), (50, False), (50, True)])
@pytest.mark.long
def test_without_se_every_feature_map_equals_detectron2s(depth, in_1x1):
    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if depth == 18 else 256
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = in_1x1
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.OUT_FEATURES = STAGES
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    theirs = randomise(build_resnet_backbone(cfg, ShapeSpec(channels=3)))
    options = {} if depth == 18 else {"stride_in_1x1": in_1x1}
    ours = create_backbone(f"resnet{depth}", out_features=STAGES, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ours.eval()
    x = torch.randn(2, 3, 96, 128)
    with torch.no_grad():
        expected, found = theirs(x), ours(x)
    for key in STAGES:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.long
def test_plain_weights_in_an_se_backbone_give_similar_features(name):
    """Check that a plain ResNet and an SE backbone with its weights compute similar features."""
    plain = randomise(create_backbone(name, out_features=STAGES))
    gated_backbone = create_backbone(f"se_{name}", out_features=STAGES).eval()
    missing = gated_backbone.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing
    assert all(".se." in key for key in missing)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected, found = plain(x), gated_backbone(x)
    for key in STAGES:
        similarity = torch.cosine_similarity(found[key].flatten(), expected[key].flatten(), dim=0)
        assert similarity > 0.999
        # Gates start at 0.982. In the worst case, each block scales the features by this factor.
        blocks = sum(len(stage) for stage in plain.stages)
        assert 0.982**blocks < found[key].norm() / expected[key].norm() < 1.01


@pytest.mark.parametrize("stages", [(2,), (3,), (4, 5)])
@pytest.mark.long
def test_se_is_only_in_the_requested_stages(stages):
    backbone = create_backbone("se_resnet50", se_stages=stages, out_features=STAGES)
    found = {int(key[3]) for key, _ in backbone.named_parameters() if ".se." in key}
    assert found == set(stages)
