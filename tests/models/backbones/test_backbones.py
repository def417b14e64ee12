"""Tests for every registered backbone."""

import functools
import inspect

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import Backbone

from senet_transfer import UserError, create_backbone, create_classifier, list_models
from senet_transfer.layers import SqueezeExcitation
from senet_transfer.models.backbones import builder
from senet_transfer.models.backbones.vgg import VGGBlock
from senet_transfer.models.registry import ModelEntry, build_backbone, model_entry

STAGES = ["res2", "res3", "res4", "res5"]

# Numbers of parameters (weights, biases, affine norms) of the paper's networks, for 1000 classes.
PARAMETERS = {
    "resnet50": 25_557_032,
    "se_resnet50": 28_088_024,
    "resnet101": 44_549_160,
    "se_resnet101": 49_326_872,
    "resnet152": 60_192_808,
    "se_resnet152": 66_821_848,
    "resnext50_32x4d": 25_028_904,
    "se_resnext50_32x4d": 27_559_896,
    "resnext101_32x4d": 44_177_704,
    "se_resnext101_32x4d": 48_955_416,
    "senet154": 115_088_984,
}

# Networks for 32x32 images have three stages, with strides of 1, 2 and 4.
CIFAR_STAGES = STAGES[:3]


def is_cifar(name: str) -> bool:
    return name.removeprefix("se_").startswith(("cifar", "wrn", "shake"))


def is_residual(name: str) -> bool:
    """Return whether a model is a ResNet, ResNeXt or SENet-154."""
    others = ("inception", "wideresnet18")
    named = "resn" in name and not any(other in name for other in others) and not is_cifar(name)
    return named or name == "senet154"


def aligned(name: str) -> dict[str, str]:
    """Return ``{"padding": "same"}`` for an Inception-ResNet, and an empty dict for other models.

    By default, the feature maps of Inception-ResNets are not aligned with the image.
    """
    return {"padding": "same"} if "inception_resnet" in name else {}


CIFAR_MODELS = [name for name in list_models() if is_cifar(name)]

# Networks that have the same block types as those with 50 layers, but more blocks.
DEEPER = [name for name in list_models() if name.endswith(("t101", "t152", "101_32x4d"))]


def mostly_fast(names: list[str], slow: list[str] = ()) -> list:
    """Return pytest parameters for model names; mark those in ``DEEPER`` or ``slow`` as slow."""
    marks = dict.fromkeys([*DEEPER, *slow], pytest.mark.slow)
    return [pytest.param(name, marks=marks.get(name, ())) for name in names]


every_model = pytest.mark.parametrize("name", mostly_fast(list_models()))
every_se_model = pytest.mark.parametrize("name", mostly_fast([*list_models("se_*"), "senet154"]))


def stages_of(name: str) -> list[str]:
    return CIFAR_STAGES if is_cifar(name) else STAGES


@functools.cache
def structure(name: str, **options: object) -> Backbone:
    """Return a backbone on the meta device. Its tensors have shapes but no values."""
    with torch.device("meta"):
        return create_backbone(name, **options)


def with_all_stages(name: str, **options: object) -> Backbone:
    """Return a backbone on the meta device that outputs the feature maps of all stages.

    Inception-ResNets are built with ``padding="same"``; see :func:`aligned`.
    """
    return structure(name, out_features=tuple(stages_of(name)), **aligned(name), **options)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_all_networks_of_the_paper_are_registered():
    names = [f"resnet{depth}" for depth in (18, 34, 50, 101, 152)]
    names += ["resnext50_32x4d", "resnext101_32x4d", "cifar_resnet110", "cifar_resnet164"]
    names += ["wrn16_8", "shake_shake26_2x96d", "shake_even29_2x4x64d"]
    names += ["vgg16_bn", "bn_inception", "inception_resnet_v2", "mobilenet", "shufflenet_g3"]
    assert {*names, *(f"se_{name}" for name in names), "senet154"} <= set(list_models())
    assert set(list_models("se_*")) == {name for name in list_models() if name.startswith("se_")}


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
@pytest.mark.long
def test_parameter_counts_equal_those_of_the_released_networks(name, parameters):
    with torch.device("meta"):
        assert count(create_classifier(name)) == parameters


def test_bias_free_se_has_the_papers_parameter_count():
    with torch.device("meta"):
        assert count(create_classifier("se_resnet50", se_bias=False)) == 28_071_976


def has_gates(block: torch.nn.Module) -> bool:
    return any(key.endswith("se.fc1.weight") for key in block.state_dict())


@pytest.mark.parametrize(
    "name", [name for name in list_models("se_*") if is_residual(name) or is_cifar(name)]
)
@pytest.mark.long
def test_se_adds_the_parameters_of_the_formula(name):
    """Compare the number of parameters of SE with equation 5 of the SE paper, plus biases."""
    backbone, plain = structure(name), structure(name.removeprefix("se_"))
    widths = [
        block.out_channels for stage in backbone.stages for block in stage if has_gates(block)
    ]
    if "shake" in name:
        widths *= 2  # both branches have a gate
    assert widths
    expected = sum(2 * width * (width // 16) + width + width // 16 for width in widths)
    assert count(backbone) - count(plain) == expected


@every_se_model
@pytest.mark.long
def test_every_gate_has_the_requested_variant(name):
    options = {"squeeze": "none", "excitation": "tanh", "bias": False, "ratio": 8}
    backbone = structure(name, **{f"se_{key}": value for key, value in options.items()})
    gates = [module for module in backbone.modules() if isinstance(module, SqueezeExcitation)]
    assert gates
    for gate in gates:
        assert (gate.squeeze, gate.excitation) == ("none", "tanh")
        assert gate.fc1.bias is gate.fc2.bias is None
        assert gate.fc1.out_features == gate.channels // 8


@every_model
@pytest.mark.long
def test_features_have_the_declared_shapes(name):
    stages = stages_of(name)
    backbone = create_backbone(name, out_features=stages, **aligned(name)).eval()
    assert isinstance(backbone, Backbone)
    first = 1 if is_cifar(name) else 2 if "wideresnet18" in name else 4
    height, width = 16 * first, 24 * first
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, height, width))
    assert list(features) == stages
    for index, (key, shape) in enumerate(backbone.output_shape().items()):
        stride = shape.stride
        assert stride == first * 2**index
        assert features[key].shape == (1, shape.channels, height // stride, width // stride)


# VGG is slow because its hidden layers have 120 million parameters.
VGG = [name for name in list_models() if "vgg" in name]


@pytest.mark.parametrize("name", mostly_fast(list_models(), VGG))
@pytest.mark.long
def test_every_parameter_gets_a_gradient(name):
    torch.manual_seed(0)
    model = create_classifier(name, num_classes=3, **aligned(name))
    for module in model.modules():
        # The initial weight of fc2 is 0, which would block all gradients of fc1.
        if hasattr(module, "fc2"):
            torch.nn.init.normal_(module.fc2.weight, std=0.1)
            # A gate for 16 channels has only one hidden unit, which must be active.
            torch.nn.init.constant_(module.fc1.bias, 10.0)
    side = 8 if is_cifar(name) else 32
    model(torch.randn(2, 3, side, side)).square().sum().backward()
    without = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # fc1 has no gradient if its hidden units are inactive for both images. The bias of ShuffleNet's
    # depthwise norm has none because the next norm cancels it.
    known = ("se.fc1", "depthwise.norm.bias" if "shufflenet" in name else "se.fc1")
    assert not [key for key in without if not any(part in key for part in known)]
    assert len(without) < 0.2 * len(list(model.parameters()))


@every_model
@pytest.mark.long
def test_freezing_covers_only_and_all_of_the_frozen_stages(name):
    backbone = with_all_stages(name, freeze_at=3)
    for stage in ("stem", "res2", "res3"):
        module = getattr(backbone, stage)
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in module.modules())
    for stage in stages_of(name)[2:]:
        module = getattr(backbone, stage)
        assert all(parameter.requires_grad for parameter in module.parameters())
        assert not any(isinstance(m, FrozenBatchNorm2d) for m in module.modules())


@every_se_model
@pytest.mark.long
def test_freezing_covers_the_gates(name):
    backbone = with_all_stages(name, freeze_at=3)
    frozen = {
        key for key, p in backbone.named_parameters() if ".se." in key and not p.requires_grad
    }
    gates = {key for key, _ in backbone.named_parameters() if ".se." in key}
    assert frozen == {key for key in gates if key.startswith(("stem.", "res2.", "res3."))} != set()


@every_model
@pytest.mark.long
def test_invalid_arguments_are_rejected_by_name(name):
    with torch.device("meta"):
        check_bad_arguments(name)


def check_bad_arguments(name: str) -> None:
    with pytest.raises(UserError, match="has no option 'freeze_to'.*freeze_at"):
        create_backbone(name, freeze_to=2)
    with pytest.raises(UserError, match="The norm is 'BatchNorm'; expected one of"):
        create_backbone(name, norm="BatchNorm")
    with pytest.raises(UserError, match="out_features"):
        create_backbone(name, out_features=["res6"])
    with pytest.raises(UserError, match="freeze_at is 7"):
        create_backbone(name, freeze_at=7)
    if is_residual(name):
        with pytest.raises(UserError, match="The stem pool is 'same'; expected one of: pad, ceil"):
            create_backbone(name, stem_pool="same")


def test_an_unknown_name_error_suggests_similar_names():
    with pytest.raises(UserError, match="se_resnet50"):
        create_backbone("seresnet50")


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("resnet50", {"se_ratio": 8}, "has no SE"),
        ("se_resnet18", {"se_placement": "3x3"}, "bottleneck"),
        ("se_resnet18", {"stride_in_1x1": True}, "no bottlenecks"),
        ("se_resnet50", {"se_ratio": 4096}, "expected an integer from 1 to 256"),
        ("se_resnet50", {"res5_dilation": 3}, "expected 1 or 2"),
        ("senet154", {"se_stages": (2, 3)}, "SE in every stage"),
        ("se_resnet50", {"se_placement": "mixture"}, "one branch per block"),
        ("se_cifar_resnet164", {"se_placement": "mixture"}, "one branch per block"),
        ("se_cifar_resnet110", {"se_placement": "3x3"}, "basic blocks"),
        ("se_wrn16_8", {"se_placement": "3x3"}, "basic blocks"),
        ("se_shake_shake26_2x96d", {"se_placement": "3x3"}, "26 has basic blocks"),
        ("se_cifar_resnet110", {"se_stages": (5,)}, "stages 2, 3 and 4"),
        ("se_shake_even29_2x4x64d", {"se_stages": (5,)}, "stages 2, 3 and 4"),
        ("se_cifar_resnet110", {"se_ratio": 32}, "expected an integer from 1 to 16"),
        ("se_wrn16_8", {"se_relu_before": True}, "but CIFAR networks do not"),
        ("cifar_resnet110", {"block": "wide"}, "expected one of: basic, bottleneck"),
        ("cifar_resnet32", {"block": "bottleneck"}, "depth is 32.* 9n . 2 layers.*is 29"),
        ("cifar_resnet110", {"out_features": ["res5"]}, "stem, res2, res3, res4"),
        ("cifar_resnet110", {"freeze_at": 5}, "0 .freeze nothing. to 4"),
        ("cifar_resnet21", {}, "depth is 21.* 6n . 2 layers.*is 20"),
        ("wrn17_8", {}, "6n . 4 layers.*The nearest valid depth is 16"),
        ("shake_shake26_2x96d", {"width": 15}, "even number"),
    ],
)
def test_options_that_a_network_does_not_support_are_rejected(name, overrides, words):
    with pytest.raises(UserError, match=words):
        create_backbone(name, **overrides)


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        (["resnet18"], {}, "There is no model"),
        (5, {}, "There is no model called 5"),
        ("resnet18", {"in_channels": "3"}, "in_channels is '3'; expected an integer"),
        ("resnet18", {"in_channels": 0}, "in_channels is 0; expected an integer >= 1"),
        ("resnet18", {"in_channels": True}, "in_channels is True; expected an integer"),
        ("resnet18", {"out_features": 5}, "out_features is 5; expected a list"),
        ("resnet18", {"out_features": [["res2"]]}, "expected a list of names"),
        ("resnet18", {"weights": 5}, "weights is 5; expected a path"),
        ("resnet18", {"freeze_at": 2.0}, "freeze_at is 2.0; expected an integer >= 0"),
        ("resnet18", {"freeze_at": [2]}, "freeze_at is .2.; expected an integer >= 0"),
        ("resnet50", {"num_groups": "2"}, "num_groups is '2'"),
        ("resnet50", {"res2_out_channels": 0}, "res2_out_channels is 0.* or None"),
        ("se_resnet50", {"se_ratio": "3"}, "ratio is '3'"),
        ("se_resnet50", {"se_stages": (2.0, 3)}, r"stages with SE are \(2.0, 3\)"),
        ("cifar_resnet20", {"in_channels": "3"}, "in_channels is '3'"),
        ("shake_shake26_2x96d", {"width": "96"}, "width is '96'"),
    ],
)
def test_values_of_another_type_are_rejected_by_name(name, overrides, words):
    with pytest.raises(UserError, match=words):
        create_backbone(name, **overrides)


@pytest.mark.parametrize("norm", ["GN", "FrozenBN"])
@every_model
@pytest.mark.long
def test_the_norm_is_the_requested_one(name, norm):
    few = "cifar", "wrn", "shake_shake", "shufflenet", "inception_resnet"
    if norm == "GN" and name.removeprefix("se_").startswith(few):
        words = "multiple of 32 channels, but the network has layers with (16|24|80) channels"
        with pytest.raises(UserError, match=words):
            create_backbone(name, norm=norm)
        return
    kind = {"GN": torch.nn.GroupNorm, "FrozenBN": FrozenBatchNorm2d}[norm]
    backbone = structure(name, norm=norm)
    assert any(isinstance(module, kind) for module in backbone.modules())
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in backbone.modules())


def test_without_weights_preprocessing_equals_torchvisions():
    preprocessing = create_backbone("se_resnet18").preprocessing
    assert (preprocessing.format, preprocessing.resize, preprocessing.crop) == ("RGB", 256, 224)
    mean = [value / 255 for value in preprocessing.mean]
    std = [value / 255 for value in preprocessing.std]
    assert mean == pytest.approx([0.485, 0.456, 0.406])
    assert std == pytest.approx([0.229, 0.224, 0.225])


def test_a_builder_of_version_0_1_is_registered_with_a_warning():
    with pytest.warns(DeprecationWarning, match="return build_backbone"):
        decorate = builder.trunk_builder(("stem", "res2", "res3"))

    @decorate
    def build_old(*, se, norm, in_channels, width):
        gates = [builder.stage_se(se, stage) for stage in (2, 3)]
        blocks = [VGGBlock(width, width, pool=True, norm=norm, se=gate) for gate in gates]
        return VGGBlock(in_channels, width, norm=norm), [[block] for block in blocks]

    entry = ModelEntry("old", build_old, {"width": 4}, has_se=True)
    backbone = build_backbone(entry, out_features=["res2", "res3"], freeze_at=1, se_ratio=2)
    assert list(backbone.output_shape()) == ["res2", "res3"]
    assert [any(p.requires_grad for p in part.parameters()) for part in backbone.children()] == [
        False,
        True,
        True,
    ]
    assert entry.options() == ["norm", "in_channels", "out_features", "freeze_at"]
    with pytest.raises(UserError, match="no option 'depth'"):
        build_backbone(entry, depth=3)


@pytest.mark.parametrize("name", list_models())
def test_the_options_of_a_model_match_its_builders_signature(name):
    entry = model_entry(name)
    stated = inspect.signature(entry.build).parameters.values()
    assert all(option.kind is option.KEYWORD_ONLY for option in stated)
    assert {"norm", "in_channels", "out_features", "freeze_at"} <= set(entry.options())
