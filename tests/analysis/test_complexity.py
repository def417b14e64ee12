"""Tests that check complexity counts against forward hooks, formulas and the paper's tables."""

import pytest
import torch
from torch import nn

from senet_transfer import UserError, create_classifier, list_models, save_weights
from senet_transfer.analysis.complexity.breakdown import report
from senet_transfer.analysis.complexity.count import measure
from senet_transfer.analysis.complexity.paper_tables import (
    ROWS,
    Row,
    _shufflenet_macs,
    compare_with_paper,
)
from senet_transfer.engine.model_from import build_to_count, model_config
from senet_transfer.layers import SqueezeExcitation
from senet_transfer.models.empty import built_empty, fill_empty

DEEP = ("34", "101", "110", "152", "154", "164", "next50", "shake", "inception_resnet")


def empty(name: str, **options) -> nn.Module:
    with built_empty():
        model = create_classifier(name, **options)
    return fill_empty(model)


def side_of(name: str) -> int:
    if "inception_resnet" in name:
        return 96
    return 8 if name.removeprefix("se_").startswith(("cifar", "wrn", "shake")) else 32


def counted_by_hooks(model: nn.Module, x: torch.Tensor) -> dict[str, int]:
    """Count MACs and activations with forward hooks, from the output size of each layer."""
    found = {"macs": 0, "activations": 0, "se_macs": 0}
    gates = {fc for m in model.modules() if isinstance(m, SqueezeExcitation) for fc in m.children()}

    def layer(module, inputs, output):
        weight = module.weight
        places = output.numel() // weight.shape[0]
        found["macs"] += places * weight.numel()
        found["activations"] += output.numel()
        found["se_macs"] += places * weight.numel() * (module in gates)

    def gate(module, inputs, output):
        found["macs"] += 2 * output.numel()
        found["se_macs"] += 2 * output.numel()

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(layer)
        if isinstance(module, SqueezeExcitation):
            module.register_forward_hook(gate)
    with torch.no_grad():
        model.eval()(x)
    return found


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if any(d in name for d in DEEP) else name
        for name in list_models()
    ],
)
@pytest.mark.long
def test_the_cost_of_every_model_equals_a_count_by_layer_hooks(name):
    model, side = empty(name), side_of(name)
    # Use a batch with more than one image, and images that aren't square.
    x = torch.zeros(2, 3, side, side + side // 2)
    found = measure(model, x)
    expected = counted_by_hooks(model, x)
    assert not found.unknown
    assert {key: getattr(found.total, key) for key in expected} == expected
    assert found.total.parameters == sum(p.numel() for p in model.parameters())


def test_a_gates_cost_includes_layers_pooling_and_product():
    channels, hidden, places = 32, 4, 6 * 5
    x = torch.zeros(1, channels, 6, 5)
    cost = measure(SqueezeExcitation(channels, ratio=8), x).total
    assert cost.macs == cost.se_macs == 2 * channels * hidden + 2 * channels * places
    assert cost.parameters == cost.se_parameters == 2 * channels * hidden + channels + hidden
    cost = measure(SqueezeExcitation(channels, ratio=8, squeeze="max"), x).total
    assert cost.macs == 2 * channels * hidden + 2 * channels * places
    cost = measure(SqueezeExcitation(channels, ratio=8, squeeze="none"), x).total
    assert cost.macs == 2 * channels * hidden * places + channels * places


@pytest.mark.long
def test_the_share_of_se_follows_the_papers_formula():
    """Check Equation 5: SE adds 2/r * sum(N_s C_s^2) parameters and the same number of MACs."""
    cost = measure(empty("se_resnet50", se_bias=False), torch.zeros(1, 3, 224, 224)).total
    stages = ((3, 256, 56), (4, 512, 28), (6, 1024, 14), (3, 2048, 7))
    layers = sum(2 * blocks * width**2 // 16 for blocks, width, _ in stages)
    assert cost.se_parameters == layers
    maps = sum(blocks * width * side**2 for blocks, width, side in stages)
    assert cost.se_macs == layers + 2 * maps


def test_the_training_mode_is_left_as_it_was():
    model = empty("resnet18")
    model.backbone.res2.eval()
    before = [m.training for m in model.modules()]
    measure(model, torch.zeros(1, 3, 32, 32))
    assert [m.training for m in model.modules()] == before


SOME = [row for row in ROWS if row.name in ("ResNet-50", "SE-ResNet-50", "NoSqueeze", "SE_3x3")]


@pytest.mark.parametrize(
    "rows",
    [tuple(SOME), pytest.param(ROWS, marks=pytest.mark.slow)],
    ids=["some", "all"],
)
@pytest.mark.long
def test_the_papers_values_are_reproduced_or_the_difference_is_explained(rows):
    for one in compare_with_paper(rows, quiet=True):
        assert not any("unexplained" in reason for reason in one.reasons), one.row
        # Only values outside the tolerance need an explanation.
        off = [abs(one.gflops_off or 0) > 0.005, abs(one.parameters_off or 0) > 0.1e6]
        assert len(one.reasons) == sum(off)


def test_a_value_that_differs_from_the_papers_is_reported():
    right, less, more = compare_with_paper(
        (
            Row("II", "right", "resnet18", parameters=11.7, gflops=1.814),
            Row("II", "off", "resnet18", gflops=1.80),
            Row("X", "off", "resnet18", parameters=11.5),
        ),
        quiet=True,
    )
    assert not right.reasons
    assert less.reasons == ["off: unexplained difference in GFLOPs."]
    assert more.reasons == ["off: unexplained difference in Params."]


@pytest.mark.long
def test_a_shufflenet_has_the_cost_counted_by_hand():
    built = measure(empty("shufflenet_g3"), torch.zeros(1, 3, 224, 224)).total.macs
    assert _shufflenet_macs(3, 240) == built - 960 * 1000
    # Millions of MACs in Table 1 of the ShuffleNet paper, by number of groups and channels.
    stated = {(1, 144): 143, (2, 200): 140, (3, 240): 137, (4, 272): 133, (8, 384): 137}
    for network, millions in stated.items():
        assert abs(_shufflenet_macs(*network) / 1e6 - millions) < 1


@pytest.mark.long
def test_the_cost_of_a_checkpoint_is_that_of_its_stored_architecture(tmp_path):
    model = create_classifier("se_resnet18", num_classes=7, se_ratio=8, se_stages=(3, 4))
    save_weights(model, tmp_path / "weights.pth")
    cfg = model_config(weights=str(tmp_path / "weights.pth"))
    total = report(build_to_count(cfg), cfg).total
    assert total.parameters == sum(p.numel() for p in model.parameters())
    assert total == measure(model, torch.zeros(1, 3, 224, 224)).total


@pytest.mark.parametrize(
    "config", ["faster_rcnn_se_r50", "retinanet_se_r50", "faster_rcnn_c4_se_r50"]
)
@pytest.mark.long
def test_the_parts_of_a_detector_add_up_to_the_total(config):
    cfg = model_config(config_file=f"configs/{config}.yaml")
    model = build_to_count(cfg)
    found = report(model, cfg, (60, 100))
    backbone = getattr(model.backbone, "bottom_up", model.backbone)
    assert found.size == ((64, 128) if backbone is not model.backbone else (60, 100))
    assert found.total.parameters == sum(p.numel() for p in model.parameters())
    assert found.total.se_parameters == 2_530_992
    alone = measure(backbone, torch.zeros(1, 3, *found.size)).total
    assert sum(found.parts[n].macs for n in ("stem", "res2", "res3", "res4")) == alone.macs - (
        0 if "res5" not in found.parts else found.parts["res5"].macs
    )
    by_hooks = counted_by_hooks(backbone, torch.zeros(1, 3, *found.size))
    assert alone.macs == by_hooks["macs"]


@pytest.mark.long
def test_a_box_head_is_counted_for_every_box():
    options = ["MODEL.RPN.POST_NMS_TOPK_TEST", "10", "MODEL.ROI_HEADS.NUM_CLASSES", "3"]
    cfg = model_config(config_file="configs/faster_rcnn_r50.yaml", options=options)
    head = report(build_to_count(cfg), cfg, (64, 64)).parts["box head"]
    outputs = 3 + 1 + 4 * 3
    assert head.macs == 10 * (256 * 7 * 7 * 1024 + 1024 * 1024 + 1024 * outputs)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "No model is specified"),
        (
            {"model": "resnet18", "config_file": "configs/faster_rcnn_r50.yaml"},
            "only one of them is allowed",
        ),
        ({"model": "resnet17"}, "There is no model"),
        ({"model": "resnet18", "options": ["MODEL.SE.RATOI", "8"]}, "MODEL.SE.RATIO"),
        ({"weights": "missing.pth"}, "weight file .*does not exist"),
    ],
)
def test_files_other_than_models_are_rejected_with_a_clear_error(arguments, said):
    with pytest.raises(UserError, match=said):
        model_config(**arguments)


def test_an_invalid_image_size_is_rejected():
    cfg = model_config("resnet18")
    with pytest.raises(UserError, match="expected at least 1 x 1"):
        report(build_to_count(cfg), cfg, (0, 224))
