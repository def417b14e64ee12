"""Tests for backbones and detectors built from configs."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.backbone import FPN
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from senet_transfer import (
    UserError,
    add_senet_config,
    create_backbone,
    get_senet_config,
    save_weights,
)
from senet_transfer.config.load import load_config
from senet_transfer.models.build import backbone_name, weights_follow


def config(**keys):
    cfg = get_senet_config()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_senet_backbone"
    cfg.merge_from_list([word for item in keys.items() for word in item])
    return cfg


def build(cfg):
    return build_backbone(cfg, ShapeSpec(channels=3))


def small(cfg):
    """Reduce the number of proposals in a detector's config, and return the config."""
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = 50
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 10
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 8
    return cfg


def picture(objects: bool = True):
    instances = Instances((64, 64))
    instances.gt_boxes = Boxes(torch.tensor([[8.0, 8.0, 40.0, 40.0]])[: int(objects)])
    instances.gt_classes = torch.tensor([1])[: int(objects)]
    return {"image": torch.randint(0, 256, (3, 64, 64)), "instances": instances}


def test_this_projects_keys_do_not_change_detectron2s_defaults():
    ours, theirs = get_senet_config(), get_cfg()
    for key in ("RESNETS", "FPN", "RPN", "PIXEL_MEAN", "WEIGHTS"):
        found = ours.MODEL[key]
        if key == "RESNETS":
            found = found.clone()
            del found["STEM_POOL"]
        assert found == theirs.MODEL[key]


def test_adding_this_projects_keys_again_has_no_effect():
    cfg = get_senet_config()
    before = cfg.dump()
    add_senet_config(cfg)
    assert cfg.dump() == before


@pytest.mark.long
def test_the_se_key_replaces_a_described_backbone_with_its_se_variant():
    plain = build(config(**{"MODEL.RESNETS.NORM": "BN"}))
    gated = build(config(**{"MODEL.RESNETS.NORM": "BN", "MODEL.SE.ENABLED": True}))
    added = set(gated.state_dict()) - set(plain.state_dict())
    assert added
    assert all(".se." in key for key in added)
    assert set(plain.state_dict()) < set(gated.state_dict())


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({"MODEL.BACKBONE.ARCH": "se_resnet50"}, "se_resnet50"),
        ({"MODEL.BACKBONE.ARCH": "resnet50", "MODEL.SE.ENABLED": True}, "se_resnet50"),
        ({"MODEL.BACKBONE.ARCH": "resnet18"}, "resnet18"),
        (
            {
                "MODEL.RESNETS.NUM_GROUPS": 32,
                "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
                "MODEL.SE.ENABLED": True,
            },
            "se_resnext50_32x4d",
        ),
    ],
)
@pytest.mark.long
def test_a_config_names_or_describes_the_same_backbones(keys, name):
    backbone = build(config(**{"MODEL.RESNETS.OUT_FEATURES": ["res5"], **keys}))
    expected = create_backbone(name, norm="FrozenBN")
    assert {key: value.shape for key, value in backbone.state_dict().items()} == {
        key: value.shape for key, value in expected.state_dict().items()
    }


@pytest.mark.long
def test_every_se_key_reaches_the_blocks():
    backbone = build(
        config(
            **{
                "MODEL.SE.ENABLED": True,
                "MODEL.SE.RATIO": 8,
                "MODEL.SE.SQUEEZE": "max",
                "MODEL.SE.EXCITATION": "tanh",
                "MODEL.SE.PLACEMENT": "3x3",
                "MODEL.SE.STAGES": (3, 4),
                "MODEL.SE.BIAS": False,
            }
        )
    )
    assert not hasattr(backbone.res2[0], "se")
    block = backbone.res3[0]
    assert block.placement == "3x3"
    assert (block.se.squeeze, block.se.excitation) == ("max", "tanh")
    assert block.se.fc1.weight.shape == (128 // 8, 128)
    assert block.se.fc1.bias is None


@pytest.mark.parametrize(
    ("written", "given", "expected"),
    [
        ("auto", "", "auto"),
        ("true", "", True),
        ("false", "", False),
        ("true", "False", False),
        ("false", "auto", "auto"),
        ("null", "True", True),
        ("null", "", "auto"),
    ],
)
@pytest.mark.long
def test_fused_is_auto_true_or_false_in_files_and_on_the_command_line(
    written, given, expected, tmp_path
):
    path = tmp_path / "config.yaml"
    backbone = "BACKBONE: {NAME: build_senet_backbone, ARCH: se_cifar_resnet8}"
    path.write_text(f"MODEL: {{SE: {{FUSED: {written}}}, {backbone}}}\n")
    cfg = load_config(str(path), ["MODEL.SE.FUSED", given] if given else [])
    assert expected == cfg.MODEL.SE.FUSED
    (tmp_path / "saved.yaml").write_text(cfg.dump())
    assert expected == load_config(str(tmp_path / "saved.yaml")).MODEL.SE.FUSED
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2"]
    backbone = build(cfg)
    assert {block.fused for block in backbone.res2} == {expected}
    assert not any("fused" in name for name in backbone.state_dict())


@pytest.mark.parametrize("value", ["never", "1", "'True'"])
def test_other_values_of_fused_are_rejected(value):
    with pytest.raises(UserError, match="MODEL.SE.FUSED is .*expected True, False or auto"):
        load_config("", ["MODEL.SE.FUSED", value])


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"MODEL.BACKBONE.ARCH": "se_resnet50", "MODEL.SE.ENABLED": False}, "has SE, but"),
        ({"MODEL.RESNETS.DEPTH": 18}, "RES2_OUT_CHANNELS is 256"),
        ({"MODEL.RESNETS.DEPTH": 51}, "depth of the ResNet is 51"),
        ({"MODEL.RESNETS.DEFORM_ON_PER_STAGE": [False, False, False, True]}, "deformable"),
        ({"MODEL.BACKBONE.ARCH": "resnet51"}, "Did you mean"),
        ({"MODEL.SE.ENABLED": True, "MODEL.SE.PLACEMENT": "after"}, "SE placement is 'after'"),
        ({"MODEL.BACKBONE.NAME": "build_senet_fpn_backbone"}, "MODEL.FPN.IN_FEATURES"),
    ],
)
@pytest.mark.long
def test_a_config_that_contradicts_itself_is_rejected(keys, words):
    with pytest.raises(UserError, match=words):
        build(config(**keys))


def test_a_narrow_resnet18_has_the_widths_of_the_config():
    keys = {"MODEL.RESNETS.DEPTH": 18, "MODEL.RESNETS.NORM": "BN", "MODEL.BACKBONE.FREEZE_AT": 0}
    keys |= {"MODEL.RESNETS.STEM_OUT_CHANNELS": 12, "MODEL.RESNETS.RES2_OUT_CHANNELS": 16}
    keys["MODEL.RESNETS.OUT_FEATURES"] = ["res2", "res3", "res4", "res5"]
    backbone = build(config(**keys))
    features = backbone(torch.zeros(1, 3, 64, 64))
    assert [features[name].shape[1] for name in features] == [16, 32, 64, 128]
    assert backbone.stem.out_channels == 12


@pytest.mark.long
def test_freezing_equals_detectron2s():
    """Compare trainable parameters and frozen norms with those of Detectron2's backbone."""
    keys = {"MODEL.RESNETS.NORM": "BN", "MODEL.BACKBONE.FREEZE_AT": 3}
    keys["MODEL.RESNETS.OUT_FEATURES"] = ["res5"]
    ours = build(config(**keys))
    theirs = build(config(**keys, **{"MODEL.BACKBONE.NAME": "build_resnet_backbone"}))
    for module in (ours, theirs):
        module.trained = {key for key, p in module.named_parameters() if p.requires_grad}
        module.frozen = {k for k, m in module.named_modules() if isinstance(m, FrozenBatchNorm2d)}
    assert ours.trained == theirs.trained
    assert ours.frozen == theirs.frozen != set()


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.long
def test_the_c4_heads_res5_has_the_backbones_gates(enabled):
    keys = {"MODEL.ROI_HEADS.NAME": "SENetRes5ROIHeads", "MODEL.SE.ENABLED": enabled}
    model = build_model(config(**keys))
    gates = [p for key, p in model.roi_heads.res5.named_parameters() if ".se." in key]
    expected = 3 * (2 * 2048 * 128 + 2048 + 128) if enabled else 0
    assert sum(p.numel() for p in gates) == expected
    stage = create_backbone("se_resnet50" if enabled else "resnet50", norm="FrozenBN").res5
    assert set(model.roi_heads.res5.state_dict()) == set(stage.state_dict())
    assert model.roi_heads.res5[0].conv1.stride == (2, 2)  # Detectron2's default stride


@pytest.mark.long
def test_detectron2s_own_c4_head_would_drop_the_gates():
    """Check that Detectron2's ``Res5ROIHeads`` contains no SE gates, even with an SE backbone.

    Configs with SE therefore need ``SENetRes5ROIHeads``.
    """
    model = build_model(config(**{"MODEL.SE.ENABLED": True}))
    assert not [key for key, _ in model.roi_heads.named_parameters() if ".se." in key]


FPN_KEYS = {
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.SE.ENABLED": True,
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[16], [32], [64], [128], [256]],
}
RCNN_KEYS = {
    **FPN_KEYS,
    "MODEL.BACKBONE.NAME": "build_senet_fpn_backbone",
    "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
}
C4_KEYS = {
    "MODEL.BACKBONE.ARCH": "se_resnet18",
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.ROI_HEADS.NAME": "SENetRes5ROIHeads",
}
RETINANET_KEYS = {
    **FPN_KEYS,
    "MODEL.META_ARCHITECTURE": "RetinaNet",
    "MODEL.BACKBONE.NAME": "build_retinanet_senet_fpn_backbone",
}


@pytest.mark.parametrize("keys", [RCNN_KEYS, C4_KEYS, RETINANET_KEYS], ids=["fpn", "c4", "retina"])
@pytest.mark.long
def test_detectors_train_a_step_and_predict_with_and_without_objects(keys):
    torch.manual_seed(0)
    model = build_model(small(config(**keys)))
    with EventStorage():
        losses = model.train()([picture(), picture(objects=False)])
    total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()
    gates = [p.grad for key, p in model.named_parameters() if ".se.fc2" in key]
    assert gates
    assert all(grad is not None and grad.any() for grad in gates)
    with torch.no_grad():
        (output,) = model.eval()([picture()])
    assert output["instances"].image_size == (64, 64)


def test_the_fpn_uses_the_backbone_like_detectron2s():
    fpn = build(config(**RCNN_KEYS))
    assert isinstance(fpn, FPN)
    assert fpn.size_divisibility == 32
    assert {key: shape.stride for key, shape in fpn.output_shape().items()} == {
        "p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64,
    }  # fmt: skip
    assert fpn.bottom_up.preprocessing.format == "BGR"


@pytest.mark.parametrize("se", [None, False, True])
@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({"MODEL.BACKBONE.ARCH": "vgg16_bn"}, "vgg16_bn"),
        ({"MODEL.RESNETS.DEPTH": 101}, "resnet101"),
        ({"MODEL.RESNETS.NUM_GROUPS": 32, "MODEL.RESNETS.WIDTH_PER_GROUP": 4}, "resnext50_32x4d"),
    ],
)
def test_a_named_and_a_described_backbone_have_their_models_name(keys, name, se):
    cfg = config(**keys, **{"MODEL.SE.ENABLED": se})
    assert backbone_name(cfg) == (f"se_{name}" if se else name)


@pytest.mark.parametrize("se", [None, True])
@pytest.mark.parametrize("name", ["se_resnet50", "senet154"])
def test_a_name_with_se_is_unchanged(name, se):
    cfg = config(**{"MODEL.BACKBONE.ARCH": name, "MODEL.SE.ENABLED": se})
    assert backbone_name(cfg) == name


@pytest.mark.long
def test_frozen_norms_without_statistics_log_a_warning(caplog, zero_initial_weights, tmp_path):
    create_backbone("resnet18")
    assert not caplog.records
    create_backbone("resnet18", norm="FrozenBN")
    assert "norm='FrozenBN' and without weights" in caplog.text
    caplog.clear()
    save_weights(create_backbone("resnet18"), tmp_path / "weights.pth")
    create_backbone("resnet18", weights=tmp_path / "weights.pth", norm="FrozenBN")
    assert [record.levelname for record in caplog.records if record.levelno >= 30] == []
    cfg = config(**{"MODEL.BACKBONE.ARCH": "resnet18"})
    assert cfg.MODEL.RESNETS.NORM == "FrozenBN"
    with weights_follow():
        build(cfg)
    assert "DetectionCheckpointer" not in caplog.text
    build(cfg)
    assert "FrozenBN" in caplog.text
    assert "senet_transfer.load_weights(model, cfg.MODEL.WEIGHTS)" in caplog.text
