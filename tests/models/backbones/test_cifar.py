"""Tests that compare CIFAR networks with plain-PyTorch implementations of their equations."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from torch import Tensor

from senet_transfer import UserError, create_backbone, create_classifier, get_senet_config
from senet_transfer.models.registry import model_entry
from senet_transfer.preprocessing import CIFAR10, CIFAR100

STAGES = ["stem", "res2", "res3", "res4"]

# Number of classes, millions of parameters in the paper, and exact number of parameters.
PARAMETERS = {
    "cifar_resnet110": (10, 1.73, 1_727_962),
    "cifar_resnet164": (10, 1.70, 1_703_258),
    "wrn16_8": (10, 10.96, 10_961_370),
    "shake_shake26_2x96d": (10, 26.2, 26_192_922),
    "shake_even29_2x4x64d": (100, 34.5, 34_529_700),
}


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def norm(channels: int) -> int:
    return 2 * channels


def preact_count(widths: list[int], blocks: int, *, bottleneck: bool, projection: bool) -> int:
    """Compute the number of parameters in a pre-activation network's stages and final norm."""
    total, inputs = 0, 16
    for width in widths:
        for _ in range(blocks):
            if bottleneck:
                inner = width // 4
                total += inputs * inner + 9 * inner * inner + inner * width
                total += norm(inputs) + 2 * norm(inner)
            else:
                total += 9 * inputs * width + 9 * width * width + norm(inputs) + norm(width)
            if projection and inputs != width:
                total += inputs * width
            inputs = width
    return total + norm(inputs)


def shake_count(stem: int, widths: list[int], blocks: int, branch) -> int:
    total, inputs = 27 * stem + norm(stem), stem
    for width in widths:
        for _ in range(blocks):
            total += 2 * branch(inputs, width)
            if inputs != width:
                total += inputs * width + norm(width)
            inputs = width
    return total


def formula(name: str) -> int:
    """Compute the number of parameters of a backbone from its published structure."""
    if name == "cifar_resnet110":
        return 27 * 16 + preact_count([16, 32, 64], 18, bottleneck=False, projection=False)
    if name == "cifar_resnet164":
        return 27 * 16 + preact_count([64, 128, 256], 18, bottleneck=True, projection=True)
    if name == "wrn16_8":
        return 27 * 16 + preact_count([128, 256, 512], 2, bottleneck=False, projection=True)
    if name == "shake_shake26_2x96d":
        return shake_count(16, [96, 192, 384], 4, lambda i, o: 9 * i * o + 9 * o * o + 2 * norm(o))
    return shake_count(
        64, [256, 512, 1024], 3, lambda i, o: i * o + 9 * o * o // 4 + o * o + 3 * norm(o)
    )


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_equal_the_published_ones(name):
    classes, millions, exact = PARAMETERS[name]
    with torch.device("meta"):
        found = count(create_classifier(name, classes))
    features = {"c": 64, "w": 512}[name[0]] if name[0] in "cw" else 384
    features = {"cifar_resnet164": 256, "shake_even29_2x4x64d": 1024}.get(name, features)
    assert found == exact == formula(name) + features * classes + classes
    assert found / 1e6 == pytest.approx(millions, abs=0.05 if millions > 20 else 0.005)


def gate_parameters(channels: int, ratio: int = 16, bias: bool = True) -> int:
    hidden = channels // ratio
    return 2 * channels * hidden + (channels + hidden if bias else 0)


@pytest.mark.parametrize(
    ("name", "options", "gates"),
    [
        ("cifar_resnet20", {}, [16, 32, 64] * 3),
        ("cifar_resnet20", {"se_ratio": 4, "se_bias": False}, [16, 32, 64] * 3),
        ("cifar_resnet20", {"se_placement": "pre"}, [16, 16, 16, 16, 32, 32, 32, 64, 64]),
        ("cifar_resnet20", {"se_stages": (3,), "se_placement": "post"}, [32] * 3),
        ("cifar_resnet164", {"se_placement": "identity"}, [64, 128, 256] * 18),
        ("cifar_resnet164", {"se_placement": "3x3"}, [16, 32, 64] * 18),
        ("wrn16_8", {}, [128, 256, 512] * 2),
        ("wrn16_8", {"se_placement": "pre"}, [16, 128, 128, 256, 256, 512]),
        ("shake_shake26_2x96d", {}, [96, 192, 384] * 8),
        ("shake_shake26_2x96d", {"se_placement": "mixture"}, [96, 192, 384] * 4),
        ("shake_shake26_2x96d", {"se_placement": "pre", "se_stages": (2,)}, [16] + [96] * 3),
        ("shake_even29_2x4x64d", {}, [256, 512, 1024] * 6),
        ("shake_even29_2x4x64d", {"se_placement": "mixture"}, [256, 512, 1024] * 3),
        ("shake_even29_2x4x64d", {"se_placement": "3x3"}, [256, 512, 1024] * 6),
    ],
)
@pytest.mark.long
def test_se_adds_exactly_the_gates_of_its_placement(name, options, gates):
    with torch.device("meta"):
        added = count(create_backbone(f"se_{name}", **options)) - count(create_backbone(name))
    ratio, bias = options.get("se_ratio", 16), options.get("se_bias", True)
    assert added == sum(gate_parameters(channels, ratio, bias) for channels in gates)


# Plain-PyTorch implementations of the networks, which use a state dict.


class Statement:
    def __init__(self, state: dict[str, Tensor], placement: str = ""):
        self.state = state
        self.placement = placement

    def conv(self, x: Tensor, key: str, stride: int = 1, groups: int = 1) -> Tensor:
        weight = self.state[f"{key}.weight"]
        padding = (weight.shape[-1] - 1) // 2
        x = F.conv2d(x, weight, stride=stride, padding=padding, groups=groups)
        return self.norm(x, f"{key}.norm") if f"{key}.norm.weight" in self.state else x

    def norm(self, x: Tensor, key: str) -> Tensor:
        shape = (1, -1, 1, 1)
        mean, var, weight, bias = (
            self.state[f"{key}.{name}"].view(shape)
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def act(self, x: Tensor, key: str) -> Tensor:
        return self.norm(x, key).clamp(min=0)

    def gate(self, x: Tensor, key: str) -> Tensor:
        """Multiply ``x`` by its gate, which is ``s`` in the paper's equation 3."""
        state = self.state
        z = x.flatten(2).mean(2) @ state[f"{key}.fc1.weight"].T + state[f"{key}.fc1.bias"]
        z = z.clamp(min=0) @ state[f"{key}.fc2.weight"].T + state[f"{key}.fc2.bias"]
        return x * z.sigmoid()[:, :, None, None]

    def placed(self, x: Tensor, key: str, *placements: str) -> Tensor:
        return self.gate(x, f"{key}.se") if self.placement in placements else x

    def preact_block(self, x: Tensor, key: str, stride: int, shared: bool) -> Tensor:
        if shared:
            x = self.act(x, f"{key}.norm1")
        out = self.placed(x, key, "pre")
        if not shared:
            out = self.act(out, f"{key}.norm1")
        out = self.act(self.conv(out, f"{key}.conv1", stride), f"{key}.norm2")
        out = self.conv(out, f"{key}.conv2")
        if f"{key}.conv3.weight" in self.state:
            out = self.placed(self.act(out, f"{key}.norm3"), key, "3x3")
            out = self.conv(out, f"{key}.conv3")
        if f"{key}.shortcut.weight" in self.state:
            x = self.conv(x, f"{key}.shortcut", stride)
        elif stride > 1 or x.shape[1] != out.shape[1]:
            padded = torch.zeros_like(out)
            padded[:, : x.shape[1]] = x[:, :, ::stride, ::stride]
            x = padded
        out = self.placed(out, key, "standard") + self.placed(x, key, "identity")
        return self.placed(out, key, "post")

    def preact(self, x: Tensor, blocks: int, always_shared: bool) -> dict[str, Tensor]:
        features = {"stem": self.conv(x, "stem.conv1")}
        x = features["stem"]
        for stage in (2, 3, 4):
            for block in range(blocks):
                key = f"res{stage}.{block}"
                shared = block == 0 and (always_shared or f"{key}.shortcut.weight" in self.state)
                stride = 2 if stage > 2 and block == 0 else 1
                x = self.preact_block(x, key, stride, shared)
            features[f"res{stage}"] = x
        features["res4"] = self.act(x, f"res4.{blocks}.norm")
        return features

    def branch(self, x: Tensor, key: str, stride: int, groups: int) -> Tensor:
        if f"{key}.conv3.weight" in self.state:
            x = self.conv(x, f"{key}.conv1").clamp(min=0)
            x = self.conv(x, f"{key}.conv2", stride, groups).clamp(min=0)
            x = self.conv(self.placed(x, key, "3x3"), f"{key}.conv3")
        else:
            x = self.conv(self.conv(x, f"{key}.conv1", stride).clamp(min=0), f"{key}.conv2")
        return self.placed(x, key, "standard")

    def shake_block(self, x: Tensor, key: str, stride: int, bottleneck: bool) -> Tensor:
        out = self.placed(x, key, "pre")
        out = out if bottleneck else out.clamp(min=0)
        branches = [self.branch(out, f"{key}.branch{b}", stride, 4) for b in (1, 2)]
        out = self.placed(sum(branches) / 2, key, "mixture")
        if f"{key}.shortcut.weight" in self.state:
            x = self.conv(x, f"{key}.shortcut", stride)
        elif f"{key}.shortcut.conv1.weight" in self.state:
            x = x.clamp(min=0)
            moved = torch.zeros_like(x)
            moved[:, :, 1:, 1:] = x[:, :, :-1, :-1]
            paths = [
                self.conv(p[:, :, ::stride, ::stride], f"{key}.shortcut.conv{c}")
                for c, p in ((1, x), (2, moved))
            ]
            x = self.norm(torch.cat(paths, 1), f"{key}.shortcut.norm")
        out = out + self.placed(x, key, "identity")
        return self.placed(out.clamp(min=0) if bottleneck else out, key, "post")

    def shake(self, x: Tensor, blocks: int, bottleneck: bool) -> dict[str, Tensor]:
        x = self.conv(x, "stem.conv1")
        features = {"stem": x.clamp(min=0) if bottleneck else x}
        x = features["stem"]
        for stage in (2, 3, 4):
            for block in range(blocks):
                stride = 2 if stage > 2 and block == 0 else 1
                x = self.shake_block(x, f"res{stage}.{block}", stride, bottleneck)
            features[f"res{stage}"] = x
        features["res4"] = x.clamp(min=0)
        return features

    def network(self, name: str, x: Tensor) -> dict[str, Tensor]:
        if name.startswith("cifar_resnet"):
            depth = int(name.removeprefix("cifar_resnet"))
            return self.preact(x, (depth - 2) // (9 if depth in (29, 164) else 6), True)
        if name.startswith("wrn"):
            return self.preact(x, (int(name[3:].split("_")[0]) - 4) // 6, False)
        return self.shake(x, 4, False) if "26" in name else self.shake(x, 3, True)


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    """Randomise weights, norms and batch statistics, so that default values can't hide errors."""
    torch.manual_seed(0)
    for key, tensor in module.state_dict().items():
        if key.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif tensor.dim() == 1:
            # Small biases and norm weights around 0.3 keep the sum over 54 blocks small.
            scale = "norm" in key.split(".")[-2] and key.endswith("weight")
            tensor.normal_(0.3 if scale else 0.0, 0.1)
    for key, tensor in module.state_dict().items():
        if ".se." in key:
            tensor.normal_(0.0, 0.5)
    return module.eval()


ALL_PLACEMENTS = ["standard", "pre", "post", "identity"]
CASES = [
    *((name, {}) for name in ("cifar_resnet110", "cifar_resnet164", "wrn16_8", "wrn10_1")),
    *((name, {}) for name in ("shake_shake26_2x96d", "shake_even29_2x4x64d", "cifar_resnet20")),
    *((f"se_{name}", {}) for name in PARAMETERS),
    *(("se_cifar_resnet20", {"se_placement": p}) for p in ALL_PLACEMENTS),
    *(("se_cifar_resnet29", {"se_placement": p}) for p in [*ALL_PLACEMENTS, "3x3"]),
    *(("se_wrn10_1", {"se_placement": p}) for p in ALL_PLACEMENTS),
    *(("se_shake_shake26_2x96d", {"se_placement": p}) for p in [*ALL_PLACEMENTS[1:], "mixture"]),
    *(
        ("se_shake_even29_2x4x64d", {"se_placement": p})
        for p in [*ALL_PLACEMENTS[1:], "mixture", "3x3"]
    ),
]


def case_id(value: str | dict[str, str]) -> str:
    return value if isinstance(value, str) else "-".join(value.values())


@pytest.mark.parametrize(("name", "options"), CASES, ids=case_id)
@pytest.mark.long
def test_a_network_computes_its_equations(name, options):
    extra = {"width": 16} if "shake_shake26" in name and options else {}
    extra |= {"block": "bottleneck"} if "resnet29" in name else {}
    backbone = randomise(create_backbone(name, out_features=STAGES, **options, **extra).double())
    placement = options.get("se_placement", "standard") if name.startswith("se_") else ""
    x = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    with torch.no_grad():
        found = backbone(x)
        expected = Statement(backbone.state_dict(), placement).network(name.removeprefix("se_"), x)
    for key in STAGES:
        assert found[key].abs().max() > 1e-2
        torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-5)


def test_the_classifier_pools_the_output_of_the_final_norm_and_relu():
    model = randomise(create_classifier("se_cifar_resnet20", 10))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = model.backbone(x)["res4"]
        expected = F.linear(features.mean((2, 3)), model.linear.weight, model.linear.bias)
        torch.testing.assert_close(model(x), expected)
    assert features.shape == (2, 64, 8, 8)
    assert features.min() == 0


# Tests of names and configs, and tests that apply to every network.


@pytest.mark.parametrize(
    ("name", "million"),
    [("cifar_resnet20", 0.27), ("cifar_resnet56", 0.85), ("wrn28_10", 36.5), ("wrn40_4", 8.9)],
)
def test_other_depths_are_available_by_name(name, million):
    with torch.device("meta"):
        found = count(create_classifier(name, 10))
    assert found / 1e6 == pytest.approx(million, abs=0.05)
    assert model_entry(f"se_{name}").has_se


def test_the_block_can_be_specified():
    assert create_backbone("cifar_resnet164", block="basic").res2[0].depth == 2
    assert create_backbone("cifar_resnet110", block="bottleneck").res2[0].depth == 3


@pytest.mark.parametrize("name", ["cifar_resnet", "cifar_resnet020", "wrn16", "se_se_wrn16_8"])
def test_invalid_names_of_a_family_are_rejected(name):
    with pytest.raises(UserError, match="There is no model"):
        create_backbone(name)


@pytest.mark.long
def test_preprocessing_equals_the_data_sets():
    assert create_backbone("se_cifar_resnet20").preprocessing == CIFAR10
    assert create_backbone("shake_even29_2x4x64d").preprocessing == CIFAR100
    assert (CIFAR10.resize, CIFAR10.crop, CIFAR10.format) == (32, 32, "RGB")


def config(**keys: object) -> CfgNode:
    cfg = get_senet_config()
    cfg.MODEL.BACKBONE.NAME = "build_senet_backbone"
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.merge_from_list([word for item in keys.items() for word in item])
    return cfg


@pytest.mark.parametrize(
    ("arch", "placement"),
    [("cifar_resnet20", "pre"), ("wrn16_8", "post"), ("shake_shake26_2x96d", "mixture")],
)
@pytest.mark.long
def test_a_config_builds_the_same_network(arch, placement):
    keys = {"MODEL.BACKBONE.ARCH": arch, "MODEL.SE.ENABLED": True}
    keys |= {"MODEL.SE.PLACEMENT": placement, "MODEL.SE.RATIO": 8}
    backbone = build_backbone(config(**keys), ShapeSpec(channels=3))
    expected = create_backbone(f"se_{arch}", se_placement=placement, se_ratio=8)
    assert list(backbone.output_shape()) == ["res4"]
    assert backbone.preprocessing.crop == 32
    assert {key: value.shape for key, value in backbone.state_dict().items()} == {
        key: value.shape for key, value in expected.state_dict().items()
    }


@pytest.mark.parametrize("name", ["se_cifar_resnet20", "se_wrn10_1"])
def test_gates_start_open(name):
    """Check that a new SE network computes nearly the same features as its plain counterpart."""
    torch.manual_seed(0)
    plain = create_backbone(name.removeprefix("se_"))
    gated = create_backbone(name)
    assert all(".se." in k for k in gated.load_state_dict(plain.state_dict(), False).missing_keys)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        similarity = F.cosine_similarity(plain(x)["res4"].flatten(), gated(x)["res4"].flatten(), 0)
    assert similarity > 0.99
