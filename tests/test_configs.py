"""Tests for all configs: backbones, header comments, and agreement with papers and baselines."""

from pathlib import Path

import pytest
import torch
import yaml
from detectron2 import model_zoo
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_backbone

from senet_transfer.analysis.complexity.breakdown import report
from senet_transfer.config import is_classification
from senet_transfer.config.load import load_config
from senet_transfer.engine.model_from import build_to_count
from senet_transfer.engine.solver import build_lr_scheduler
from senet_transfer.evaluation.paper_results import TRAINED_ON_IMAGENET, published_on_cifar
from senet_transfer.models.build import backbone_name
from senet_transfer.preprocessing import CIFAR10, CIFAR100
from senet_transfer.weights.families.architecture import Architecture
from senet_transfer.weights.hub.catalogue import catalogue_entry

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml"))
COCO = [
    path
    for path in CONFIGS
    if "coco.yaml" in path.read_text() or "faster_rcnn_fpn" in path.read_text()
]
COCO = [path for path in COCO if not path.name.startswith(("demo_", "scratch_"))]

every_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def flat(cfg, prefix=""):
    for key, value in cfg.items():
        if hasattr(value, "items"):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def difference(first, second):
    a, b = (
        dict(flat(load_config(str(ROOT / "configs" / f"{name}.yaml")))) for name in (first, second)
    )
    return {key for key in a if a[key] != b[key]}


@pytest.mark.parametrize("depth", [50, 101])
def test_a_baseline_and_its_se_config_differ_only_in_se_and_weights(depth):
    names = f"faster_rcnn_r{depth}", f"faster_rcnn_se_r{depth}"
    assert difference(*names) == {"MODEL.SE.ENABLED", "MODEL.WEIGHTS"}


@every_config
def test_a_header_has_the_command_expected_result_and_hardware(path):
    header = path.read_text()
    assert f"configs/{path.name}" in header or "make demo" in header
    assert "# Expected:" in header
    assert "# Hardware:" in header


@every_config
@pytest.mark.long
def test_every_config_has_a_smoke_test_config_that_inherits_from_it(path):
    smoke = path.parent / "instant" / path.name
    bases = yaml.safe_load(smoke.read_text())["_BASE_"]
    assert (smoke.parent / bases[0]).resolve() == path
    cfg = load_config(str(smoke))
    assert cfg.SOLVER.MAX_ITER <= 4
    assert cfg.SOLVER.EPOCHS is None
    data = "shapes_classes" if is_classification(cfg) else "shapes_tiny"
    assert cfg.DATASETS.TRAIN == cfg.DATASETS.TEST == (data,)


@every_config
@pytest.mark.long
def test_every_config_builds_its_backbone(path):
    cfg = load_config(str(path), ["MODEL.DEVICE", "cpu"])
    with torch.device("meta"):
        backbone = build_backbone(cfg, ShapeSpec(channels=3))
    has_se = any(".se." in key for key, _ in backbone.named_parameters())
    assert has_se == any(word in path.stem for word in ("se_", "senet", "finetune_", "scratch_"))


def test_gates_start_open_unless_the_network_is_trained_from_scratch():
    short = {"demo_faster_rcnn_se_r18"}
    for path in CONFIGS:
        cfg = load_config(str(path))
        if "se" not in backbone_name(cfg).split("_") or path.stem in short:
            continue
        scratch = not cfg.MODEL.WEIGHTS or path.stem.startswith("transfer_")
        expected = "random" if scratch else "open"
        assert expected == cfg.MODEL.SE.INIT, path.stem


def test_the_csail_recipe_equals_the_data_sets():
    names = "places365_csail_r152", "places365_csail_se_r152"
    assert difference(*names) == {"MODEL.SE.ENABLED"}
    cfg = load_config(str(ROOT / "configs" / "places365_csail_se_r152.yaml"))
    solver = cfg.SOLVER
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.WEIGHT_DECAY) == (256, 0.1, 1e-4)
    assert (solver.EPOCHS, list(solver.STEP_EPOCHS), solver.GAMMA) == (90, [30, 60], 0.1)
    # Weight decay applies to all parameters, as by default in torch's optimizers.
    assert solver.WEIGHT_DECAY_NORM == 1e-4
    assert solver.WEIGHT_DECAY_BIAS is None
    assert (cfg.MODEL.WEIGHTS, cfg.MODEL.BACKBONE.FREEZE_AT) == ("", 0)
    assert cfg.DATASETS.TRAIN == ("places365/train_challenge",)
    assert cfg.DATALOADER.SAMPLER_TRAIN == "TrainingSampler"


def test_the_places_recipe_equals_the_papers_protocol():
    names = "places365_r152", "places365_se_r152"
    assert difference(*names) == {"MODEL.SE.ENABLED"}
    cfg = load_config(str(ROOT / "configs" / "places365_se_r152.yaml"))
    # The SENet paper trains as in its reference [74] and evaluates as in its reference [72].
    assert cfg.DATALOADER.SAMPLER_TRAIN == "ClassAwareSampler"
    view = cfg.INPUT.CLASSIFICATION
    assert (view.TEST_MODE, view.TEST_RESIZE, view.TEST_CROP) == ("squash", 256, 224)
    assert (cfg.MODEL.WEIGHTS, cfg.MODEL.BACKBONE.FREEZE_AT) == ("", 0)
    assert cfg.DATASETS.TRAIN == ("places365/train_challenge",)
    headers = [(ROOT / "configs" / f"{name}.yaml").read_text() for name in names]
    for header, figures in zip(headers, (("41.15", "11.61"), ("40.37", "11.01")), strict=True):
        assert all(figure in header for figure in figures)
        assert "the paper's results" in header


# Batch size, learning rate, epochs, label smoothing, weight decay, crop size and resize size, from
# Sections 5.1 and 6 and the appendix of the SENet paper.
TABLE_II = (1024, 0.6, 100, 0.0, 1e-4, 224, 256)
MOBILE = (256, 0.1, 400, 0.0, 4e-5, 224, 256)
IMAGENET = {
    "se_r50": TABLE_II,
    "se_x50": TABLE_II,
    "se_vgg16_bn": TABLE_II,
    "se_bn_inception": TABLE_II,
    "se_inception_resnet_v2": (*TABLE_II[:5], 299, 352),
    "se_mobilenet": MOBILE,
    "se_shufflenet_g3": MOBILE,
    "senet154": (2048, 1.0, 100, 0.1, 1e-4, 224, 256),
    "ablation_se_r50": (256, 0.1, 300, 0.1, 1e-4, 224, 256),
}
DEPTH = "MODEL.RESNETS.DEPTH"
# Networks in Tables II and III of the SENet paper, with the config and options that train each.
IMAGENET_NETWORKS = {
    "resnet50": ("se_r50", ()),
    "resnet101": ("se_r50", (DEPTH, "101")),
    "resnet152": ("se_r50", (DEPTH, "152")),
    "resnext50_32x4d": ("se_x50", ()),
    "resnext101_32x4d": ("se_x50", (DEPTH, "101")),
    "vgg16_bn": ("se_vgg16_bn", ()),
    "bn_inception": ("se_bn_inception", ()),
    "inception_resnet_v2": ("se_inception_resnet_v2", ()),
    "mobilenet": ("se_mobilenet", ()),
    "shufflenet_g3": ("se_shufflenet_g3", ()),
}


def imagenet_config(name, *options):
    return load_config(str(ROOT / "configs" / f"imagenet_{name}.yaml"), [*options])


def test_imagenet_recipes_equal_the_papers():
    names = {path.stem for path in CONFIGS if path.stem.startswith("imagenet_")}
    assert names == {f"imagenet_{name}" for name in IMAGENET}
    for name, expected in IMAGENET.items():
        cfg = imagenet_config(name)
        solver, view = cfg.SOLVER, cfg.INPUT.CLASSIFICATION
        found = (solver.IMS_PER_BATCH, solver.BASE_LR, solver.EPOCHS)
        found += (cfg.MODEL.CLASSIFIER.LABEL_SMOOTHING, solver.WEIGHT_DECAY, view.CROP)
        assert (*found, view.TEST_RESIZE) == expected, name
        assert view.TEST_CROP == view.CROP
        assert solver.REFERENCE_LR_PER_IMAGE == solver.BASE_LR / solver.IMS_PER_BATCH
        assert (solver.MOMENTUM, solver.NESTEROV, solver.GAMMA) == (0.9, False, 0.1)
        if solver.EPOCHS == 100:
            assert (solver.LR_SCHEDULER_NAME, solver.STEP_EPOCHS) == (
                "WarmupMultiStepLR", (30, 60, 90))  # fmt: skip
        else:
            assert (solver.LR_SCHEDULER_NAME, cfg.TEST.EVAL_EPOCHS) == ("WarmupPlateauLR", 1)
            assert (solver.PLATEAU.METRIC, cfg.TEST.LOSS) == ("validation/total_loss", True)
    assert imagenet_config("ablation_se_r50").MODEL.SE.BIAS is False
    assert imagenet_config("senet154").MODEL.CLASSIFIER.DROPOUT == 0.2


def test_imagenet_headers_have_the_papers_errors_of_each_network():
    for model, (name, options) in IMAGENET_NETWORKS.items():
        header = (ROOT / "configs" / f"imagenet_{name}.yaml").read_text()
        for has_se, prefix in (("False", ""), ("True", "se_")):
            cfg = imagenet_config(name, *options, "MODEL.SE.ENABLED", has_se)
            assert backbone_name(cfg) == prefix + model
            row = TRAINED_ON_IMAGENET[backbone_name(cfg)]
            assert f"{row.top1_error:g}" in header
            assert f"{row.top5_error:g}" in header
    assert {*IMAGENET_NETWORKS, *(f"se_{model}" for model in IMAGENET_NETWORKS), "senet154"} == {
        *TRAINED_ON_IMAGENET
    }


@pytest.mark.parametrize(("name", "gmacs"), [("se_r50", 3.87), ("se_x50", 4.25)])
@pytest.mark.long
def test_residual_imagenet_recipes_have_the_strides_of_the_papers_networks(name, gmacs):
    cfg = imagenet_config(name, "MODEL.DEVICE", "cpu")
    assert report(build_to_count(cfg), cfg).total.macs / 1e9 == pytest.approx(gmacs, rel=0.005)


# Batch size, learning rate, Nesterov momentum, weight decay, iterations or epochs, learning rate
# steps, decay factor and Cutout size, from the papers and their released code.
CIFAR = {
    "resnet110": (128, 0.1, False, 1e-4, 64_000, (32_000, 48_000), 0.1, 0),
    "resnet164": (128, 0.1, False, 1e-4, 64_000, (32_000, 48_000), 0.1, 0),
    "wrn16_8": (128, 0.1, True, 5e-4, 200, (60, 120, 160), 0.2, 0),
    "shake_shake26_2x96d": (128, 0.2, True, 1e-4, 1800, "cosine", None, 16),
    "shake_even29_2x4x64d": (32, 0.025, True, 5e-4, 1800, "cosine", None, 8),
}
CIFAR_RECIPES = [
    (data, net)
    for net in CIFAR
    for data in ("cifar10", "cifar100")
    if "shake" not in net or ("even" in net) == (data == "cifar100")
]


@pytest.mark.parametrize(("data", "net"), CIFAR_RECIPES)
@pytest.mark.long
def test_cifar_recipes_equal_the_original_papers(data, net):
    names = f"{data}_{net}", f"{data}_se_{net}"
    assert difference(*names) == {"MODEL.SE.ENABLED"}
    cfg = load_config(str(ROOT / "configs" / f"{names[1]}.yaml"))
    batch, rate, nesterov, decay, length, steps, factor, cutout = CIFAR[net]
    solver, image = cfg.SOLVER, cfg.INPUT.CLASSIFICATION
    assert (batch, rate, nesterov) == (solver.IMS_PER_BATCH, solver.BASE_LR, solver.NESTEROV)
    assert (0.9, decay, decay) == (solver.MOMENTUM, solver.WEIGHT_DECAY, solver.WEIGHT_DECAY_NORM)
    assert solver.WEIGHT_DECAY_BIAS is None
    assert (solver.EPOCHS or solver.MAX_ITER) == length
    if steps == "cosine":
        assert (solver.LR_SCHEDULER_NAME, solver.BASE_LR_END) == ("WarmupCosineLR", 0)
    else:
        assert (solver.STEP_EPOCHS if solver.EPOCHS else solver.STEPS) == steps
        assert factor == solver.GAMMA
    assert (cutout, 4, "zero", 0.5) == (image.CUTOUT, image.PAD, image.PADDING, image.FLIP)
    assert ((f"{data}_train",), (f"{data}_test",)) == (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST)
    expected = CIFAR100 if data == "cifar100" else CIFAR10
    assert tuple(cfg.MODEL.PIXEL_MEAN) == expected.mean
    assert tuple(cfg.MODEL.PIXEL_STD) == expected.std
    assert (image.TEST_RESIZE, image.TEST_CROP) == (32, 32)
    for name in names:
        published = published_on_cifar(cfg.DATASETS.TEST[0], name.removeprefix(f"{data}_").replace(
            "resnet", "cifar_resnet"))  # fmt: skip
        header = (ROOT / "configs" / f"{name}.yaml").read_text()
        assert f"error {published.top1_error:.2f}%" in header


def test_pre_activation_resnets_warm_up_at_a_tenth_for_400_iterations():
    cfg = load_config(str(ROOT / "configs" / "cifar10_resnet110.yaml"))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
    schedule = build_lr_scheduler(cfg, optimizer)._multiplier
    changes = {0: 0.1, 399: 0.1, 400: 1, 31_999: 1, 32_000: 0.1, 47_999: 0.1, 48_000: 0.01}
    for iteration, expected in {**changes, 63_999: 0.01}.items():
        assert schedule(iteration / cfg.SOLVER.MAX_ITER) == pytest.approx(expected)


@pytest.mark.parametrize("path", COCO, ids=lambda path: path.stem)
@pytest.mark.long
def test_every_recipe_starts_from_published_weights_of_its_own_backbone(path):
    cfg = load_config(str(path), ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.OUT_FEATURES", "['res5']"])
    entry = catalogue_entry(cfg.MODEL.WEIGHTS)
    assert entry.verified
    backbone = BACKBONE_REGISTRY.get("build_senet_backbone")(cfg, ShapeSpec(channels=3))
    assert Architecture.of(backbone.state_dict()).name == entry.model


@pytest.mark.parametrize("path", COCO, ids=lambda path: path.stem)
def test_coco_recipes_equal_detectron1s_2x_schedule(path):
    cfg = load_config(str(path))
    prefix = "keypoints_" if "keypoint" in path.stem else ""
    assert (f"{prefix}coco_2017_train",) == cfg.DATASETS.TRAIN
    assert (f"{prefix}coco_2017_val",) == cfg.DATASETS.TEST
    solver = cfg.SOLVER
    assert (solver.IMS_PER_BATCH, solver.MAX_ITER) == (16, 180_000)
    assert solver.STEPS == (120_000, 160_000)
    assert pytest.approx(0.02 if "retinanet" not in path.stem else 0.01) == solver.BASE_LR
    assert (solver.WARMUP_ITERS, solver.WEIGHT_DECAY) == (500, 1e-4)
    assert pytest.approx(1 / 3, abs=1e-5) == solver.WARMUP_FACTOR
    assert (cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN) == ((800,), 1333)
    assert cfg.MODEL.BACKBONE.FREEZE_AT == 2
    assert cfg.MODEL.RESNETS.NORM == "FrozenBN"
    assert cfg.INPUT.FORMAT == "RGB"
    assert cfg.MODEL.RESNETS.STRIDE_IN_1X1 is False


@pytest.mark.parametrize(
    ("name", "theirs", "kept"),
    [
        ("cascade_rcnn_se_r50", "Misc/cascade_mask_rcnn_R_50_FPN_1x", {"MODEL.MASK_ON"}),
        ("keypoint_rcnn_se_r50", "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x", set()),
    ],
)
def test_a_recipe_changes_faster_rcnn_like_detectron2s_baseline(name, theirs, kept):
    faster = model_zoo.get_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    theirs = dict(flat(model_zoo.get_config(f"{theirs}.yaml")))
    changed = {key for key, value in flat(faster) if theirs[key] != value} - kept
    assert difference("faster_rcnn_se_r50", name) == changed
    ours = dict(flat(load_config(str(ROOT / "configs" / f"{name}.yaml"))))
    assert {key: ours[key] for key in changed} == {key: theirs[key] for key in changed}


def test_the_fpn_recipe_has_detectron1s_heads():
    cfg = load_config(str(ROOT / "configs" / "faster_rcnn_se_r50.yaml"))
    assert pytest.approx(1 / 9, abs=1e-4) == cfg.MODEL.RPN.SMOOTH_L1_BETA
    assert cfg.MODEL.RPN.BOUNDARY_THRESH == 0
    assert cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE == 512
    box = cfg.MODEL.ROI_BOX_HEAD
    assert (box.POOLER_TYPE, box.POOLER_SAMPLING_RATIO, box.SMOOTH_L1_BETA) == ("ROIAlign", 2, 1.0)
    assert (cfg.SOLVER.WEIGHT_DECAY_BIAS, cfg.SOLVER.BIAS_LR_FACTOR) == (0.0, 2.0)
