"""Tests that compare VGG, Inception, MobileNet and ShuffleNet with plain-PyTorch versions.

These tests cover networks that no other package contains, mainly variants with SE. Other networks
are compared with torchvision, timm and pretrainedmodels in ``tests/weights``.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from senet_transfer import UserError, create_backbone, create_classifier
from senet_transfer.layers import SqueezeExcitation

STAGES = ["res2", "res3", "res4", "res5"]

# Channels of all gates, from the input to the output, derived from the tables in the papers.
GATED = {
    "vgg16_bn": [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6,
    "bn_inception": [256, 320, 576, 576, 576, 608, 608, 1056, 1024, 1024],
    "inception_resnet_v2": [320] * 10 + [1088] * 20 + [2080] * 10,
    "mobilenet": [64, 128, 128, 256, 256] + [512] * 6 + [1024] * 2,
    # In units with stride 2, SE gates only the channels that are concatenated to the shortcut.
    "shufflenet_g3": [240 - 24] + [240] * 3 + [480 - 240] + [480] * 7 + [960 - 480] + [960] * 3,
}

# Numbers of weights, biases and affine norm parameters, for 1000 classes. They are from the
# authors' file, from other packages (without biases that norms cancel), or sums over the papers'
# tables.
PARAMETERS = {
    "vgg16_bn": 138_365_992 - 4_224,
    "bn_inception": 11_285_224,
    "se_bn_inception": 11_931_622,
    "inception_resnet_v2": 55_843_464,
    "mobilenet": 4_231_976,
    "shufflenet_g3": 1_865_728,
}
# Millions of parameters in Table III of the SENet paper, which truncates ShuffleNet's numbers.
MILLIONS = {"mobilenet": 4.2, "se_mobilenet": 4.7, "shufflenet_g3": 1.8, "se_shufflenet_g3": 2.4}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def classifier_on(backbone: nn.Module, name: str) -> int:
    """Return the number of parameters that a classifier with 1000 classes adds to a backbone."""
    if "vgg" in name:
        return 25_088 * 4096 + 4096 + 4096 * 4096 + 4096 + 4096 * 1000 + 1000
    ((_, shape),) = backbone.output_shape().items()
    return shape.channels * 1000 + 1000


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.long
def test_parameter_counts_equal_the_published_networks(name):
    with torch.device("meta"):
        backbone = create_backbone(name)
    assert count(backbone) + classifier_on(backbone, name) == PARAMETERS[name]


@pytest.mark.parametrize("name", MILLIONS)
def test_parameter_counts_equal_the_papers_table(name):
    with torch.device("meta"):
        found = count(create_classifier(name)) / 1e6
    assert found == pytest.approx(MILLIONS[name], abs=0.1)


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("options", [{}, {"se_ratio": 8, "se_bias": False}], ids=["r16", "r8"])
@pytest.mark.long
def test_se_adds_only_the_gates_described_in_the_paper(name, options):
    with torch.device("meta"):
        plain, gated = create_backbone(name), create_backbone(f"se_{name}", **options)
    found = [m.fc1.in_features for m in gated.modules() if isinstance(m, SqueezeExcitation)]
    assert found == GATED[name]
    ratio, bias = options.get("se_ratio", 16), options.get("se_bias", True)
    expected = sum(2 * c * (c // ratio) + (c + c // ratio if bias else 0) for c in GATED[name])
    assert count(gated) - count(plain) == expected
    assert set(plain.state_dict()) < set(gated.state_dict())


# Plain-PyTorch implementations, which use a state dict.


def randomise(model: nn.Module) -> dict[str, Tensor]:
    """Set a model's weights and norm statistics to random values, and return its state dict."""
    generator = torch.Generator().manual_seed(0)
    for key, tensor in model.state_dict().items():
        if key.endswith("running_var"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.dim() > 1:
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
        elif tensor.is_floating_point():
            low = 0.5 if key.endswith("norm.weight") else -0.3
            tensor.uniform_(low, low + 0.6, generator=generator)
    model.eval()
    return model.state_dict()


def conv_norm(state, key: str, x: Tensor, *, stride=1, groups=1, relu=True, pad=True) -> Tensor:
    weight = state[f"{key}.weight"]
    padding = [side // 2 if pad else 0 for side in weight.shape[2:]]
    x = F.conv2d(x, weight, stride=stride, padding=padding, groups=groups)
    mean, var, scale, shift = (
        state[f"{key}.norm.{name}"].view(1, -1, 1, 1)
        for name in ("running_mean", "running_var", "weight", "bias")
    )
    x = (x - mean) / (var + 1e-5).sqrt() * scale + shift
    return x.clamp(min=0) if relu else x


def gate(state, key: str, x: Tensor) -> Tensor:
    """Apply an SE gate, computed with equations 2 to 4 of the SENet paper."""
    z = x.flatten(2).mean(2)
    z = (z @ state[f"{key}.fc1.weight"].T + state[f"{key}.fc1.bias"]).clamp(min=0)
    s = 1 / (1 + (-(z @ state[f"{key}.fc2.weight"].T + state[f"{key}.fc2.bias"])).exp())
    return torch.einsum("nchw,nc->nchw", x, s)


def stated_mobilenet(state, x: Tensor, placement: str | None) -> dict[str, Tensor]:
    """Return the stage outputs of the network in Table 1 of the MobileNet paper."""
    x = conv_norm(state, "stem.conv1", x, stride=2)
    strides = {"res2": (1, 2, 1), "res3": (2, 1), "res4": (2, 1, 1, 1, 1, 1), "res5": (2, 1)}
    features = {}
    for stage, steps in strides.items():
        for block, stride in enumerate(steps):
            key = f"{stage}.{block}"
            x = conv_norm(state, f"{key}.depthwise", x, stride=stride, groups=x.shape[1])
            x = conv_norm(state, f"{key}.pointwise", x)
            x = gate(state, f"{key}.se", x) if placement else x
        features[stage] = x
    return features


def stated_shufflenet(state, x: Tensor, placement: str | None) -> dict[str, Tensor]:
    """Return the stage outputs of ShuffleNet with SE.

    The network is that of Table 1 and Figure 2 in the ShuffleNet paper. ``placement`` is one of the
    SE placements in Figure 5 of the SENet paper.
    """

    def gated(x: Tensor, key: str, where: str) -> Tensor:
        return gate(state, f"{key}.se", x) if placement == where else x

    x = conv_norm(state, "stem.conv1", x, stride=2)
    x = F.pad(x, (1, 1, 1, 1), value=-torch.inf).unfold(2, 3, 2).unfold(3, 3, 2).amax((-1, -2))
    features = {"res2": x}
    for stage, units in (("res3", 4), ("res4", 8), ("res5", 4)):
        for unit in range(units):
            key, stride = f"{stage}.{unit}", 2 if unit == 0 else 1
            out = gated(x, key, "pre")
            out = conv_norm(state, f"{key}.compress", out, groups=1 if key == "res3.0" else 3)
            # Shuffle: the channels with index i in each of the three groups become neighbours.
            per_group = out.shape[1] // 3
            order = [g * per_group + i for i in range(per_group) for g in range(3)]
            out = out[:, order]
            depthwise = {"stride": stride, "groups": out.shape[1], "relu": False}
            out = conv_norm(state, f"{key}.depthwise", out, **depthwise)
            out = conv_norm(state, f"{key}.expand", out, groups=3, relu=False)
            out, shortcut = gated(out, key, "standard"), x
            if stride == 2:
                nine = torch.full((x.shape[1], 1, 3, 3), 1 / 9)
                shortcut = F.conv2d(x, nine, stride=2, padding=1, groups=x.shape[1])
            shortcut = gated(shortcut, key, "identity")
            out = torch.cat([shortcut, out], 1) if stride == 2 else shortcut + out
            x = gated(out.clamp(min=0), key, "post")
        features[stage] = x
    return features


@pytest.mark.parametrize(
    ("name", "stated", "placement"),
    [
        ("mobilenet", stated_mobilenet, None),
        ("se_mobilenet", stated_mobilenet, "standard"),
        ("shufflenet_g3", stated_shufflenet, None),
        *(
            ("se_shufflenet_g3", stated_shufflenet, placement)
            for placement in ("standard", "pre", "post", "identity")
        ),
    ],
)
@pytest.mark.long
def test_the_small_networks_match_their_papers_tables(name, stated, placement):
    options = {"se_placement": placement} if placement else {}
    backbone = create_backbone(name, out_features=STAGES, **options)
    state = randomise(backbone)
    x = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = backbone(x), stated(state, x, placement)
    for key in STAGES:
        worst = (found[key] - expected[key]).abs().max() / expected[key].abs().max()
        assert worst < 1e-5, key


def gated_peer(peer: nn.Module, backbone: nn.Module, places: list[tuple[nn.Module, str]]) -> None:
    """Add hooks that apply a backbone's gates to the outputs of another network's modules."""
    state = backbone.state_dict()

    def hook(key: str) -> Callable[..., Tensor]:
        return lambda module, args, out: gate(state, key, out)

    for module, key in places:
        module.register_forward_hook(hook(key))


def randomise_gates(backbone: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    for key, parameter in backbone.named_parameters():
        if ".se." in key:
            parameter.data.uniform_(-0.3, 0.3, generator=generator)


@pytest.mark.long
def test_se_vgg_gates_torchvisions_network_after_each_relu(tmp_path):
    """Compare the SE backbone with torchvision's network plus gates, using the same weights."""
    features = pytest.importorskip("torchvision").models.vgg16_bn(init_weights=False).features
    randomise(features)
    file = {f"features.{key}": value for key, value in features.state_dict().items()}
    torch.save(file, tmp_path / "vgg.pth")
    backbone = create_backbone("se_vgg16_bn", weights=tmp_path / "vgg.pth").eval()
    randomise_gates(backbone)
    relus = [module for module in features if isinstance(module, nn.ReLU)]
    for relu in relus:
        relu.inplace = False
    places = [f"stem.{i}" for i in range(4)]
    places += [f"res{stage}.{i}" for stage in (2, 3, 4) for i in range(3)]
    gated_peer(features, backbone, [(r, f"{p}.se") for r, p in zip(relus, places, strict=True)])
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected, found = features(x), backbone(x)["res5"]
    assert (found - expected).abs().max() / expected.abs().max() < 1e-5


@pytest.mark.long
def test_se_inception_resnet_gates_timms_network_on_its_residual_branches(tmp_path):
    peer = pytest.importorskip("timm").create_model("inception_resnet_v2", num_classes=0)
    randomise(peer)
    torch.save(peer.state_dict(), tmp_path / "inception.pth")
    backbone = create_backbone(
        "se_inception_resnet_v2", weights=tmp_path / "inception.pth", family="timm"
    ).eval()
    randomise_gates(backbone)
    blocks = [(3, 2, [*peer.repeat]), (4, 1, [*peer.repeat_1])]
    blocks.append((5, 1, [*peer.repeat_2, peer.block8]))
    gated_peer(
        peer,
        backbone,
        [
            (block.conv2d, f"res{stage}.{first + index}.se")
            for stage, first, row in blocks
            for index, block in enumerate(row)
        ],
    )
    x = torch.randn(2, 3, 80, 99)
    with torch.no_grad():
        expected, found = peer.forward_features(x), backbone(x)["res5"]
    assert (found - expected).abs().max() / expected.abs().max() < 1e-5


@pytest.mark.parametrize("placement", ["pre", "post", "identity"])
@pytest.mark.parametrize("relu", [True, False])
def test_the_other_placements_in_an_inception_residual_block(placement, relu):
    from senet_transfer.layers import SEOptions
    from senet_transfer.models.backbones.inception_resnet import InceptionResidualBlock

    branches = (((1, 8),), ((1, 8), ((1, 7), 12), ((7, 1), 16)))
    se = SEOptions(ratio=4, placement=placement)
    block = InceptionResidualBlock(32, branches, scale=0.3, relu=relu, se=se)
    randomise(block)
    x = torch.randn(2, 32, 9, 9)
    with torch.no_grad():
        entered = gate(block.state_dict(), "se", x) if placement == "pre" else x
        parts = [branch(entered) for branch in block.branches]
        residual = F.conv2d(torch.cat(parts, 1), block.project.weight, block.project.bias)
        shortcut = gate(block.state_dict(), "se", x) if placement == "identity" else x
        out = shortcut + 0.3 * residual
        out = out.clamp(min=0) if relu else out
        expected = gate(block.state_dict(), "se", out) if placement == "post" else out
        torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_padding_changes_only_values_near_the_border():
    """Compare the feature maps of networks with and without padding that have the same weights.

    The network without padding gets the image without its first 3 rows and columns. Its values at
    ``(i, j)`` equal those of the padded network at ``(i + 3, j + 3)``, except near the border.
    """
    valid = create_backbone("inception_resnet_v2", out_features=["res2"])
    same = create_backbone("inception_resnet_v2", out_features=["res2"], padding="same")
    same.load_state_dict(randomise(valid))
    same.eval()
    x = torch.randn(1, 3, 100, 132)
    with torch.no_grad():
        lost, kept = valid(x[:, :, 3:, 3:])["res2"], same(x)["res2"]
    assert kept.shape[2:] == (25, 33)
    height, width = lost.shape[2] - 2, lost.shape[3] - 2
    inner = kept[:, :, 5 : 3 + height, 5 : 3 + width]
    torch.testing.assert_close(lost[:, :, 2:height, 2:width], inner, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", [75, 97])
@pytest.mark.parametrize("name", ["vgg16_bn", "bn_inception", "mobilenet", "shufflenet_g3"])
@pytest.mark.long
def test_images_of_odd_sizes_are_accepted(name, side):
    backbone = create_backbone(name).eval()
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, side, side))["res5"]
    assert features.shape[-1] in (side // 32, side // 32 + 1)


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("se_vgg16_bn", {"se_placement": "pre"}, "VGG-16 supports only: standard"),
        ("se_bn_inception", {"se_placement": "3x3"}, "BN-Inception supports only: standard"),
        ("se_mobilenet", {"se_placement": "identity"}, "MobileNet supports only: standard"),
        ("se_shufflenet_g3", {"se_placement": "3x3"}, "standard, pre, post, identity"),
        ("se_inception_resnet_v2", {"se_placement": "mixture"}, "standard, pre, post, identity"),
        ("se_vgg16_bn", {"se_stages": (5,)}, "SE only in stages 2, 3, 4"),
        ("se_bn_inception", {"se_stages": (2,)}, "SE only in stages 3, 4, 5"),
        ("se_shufflenet_g3", {"se_stages": (2,)}, "SE only in stages 3, 4, 5"),
        ("se_inception_resnet_v2", {"se_relu_before": True}, "but Inception-ResNet-v2 does not"),
        ("se_mobilenet", {"se_ratio": 65}, "expected an integer from 1 to 64"),
        ("inception_resnet_v2", {"padding": "full"}, "expected one of: valid, same"),
        ("vgg16_bn", {"padding": "same"}, "has no option 'padding'"),
        ("mobilenet", {"stem_pool": "ceil"}, "has no option 'stem_pool'"),
        ("bn_inception", {"stride_in_1x1": True}, "has no option 'stride_in_1x1'"),
        (
            "shufflenet_g3",
            {"norm": "GN"},
            "multiple of 32 channels, but the network has layers with 24 channels",
        ),
    ],
)
def test_options_that_these_networks_do_not_support_are_rejected(name, overrides, words):
    with pytest.raises(UserError, match=words):
        create_backbone(name, **overrides)
