"""Every config, without training: what it builds, and that twins differ in SE alone."""

from pathlib import Path

import pytest
import yaml
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_backbone

from senet_transfer.classification.from_config import is_classification
from senet_transfer.engine.setup import load_config
from senet_transfer.weights.architecture import Architecture
from senet_transfer.weights.catalogue import catalogue_entry

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml"))
COCO = [
    path
    for path in CONFIGS
    if "coco.yaml" in path.read_text() or "faster_rcnn_fpn" in path.read_text()
]
COCO = [path for path in COCO if not path.name.startswith("demo_")]

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
def test_a_baseline_and_its_se_twin_differ_in_the_switch_and_weights_alone(depth):
    names = f"faster_rcnn_r{depth}", f"faster_rcnn_se_r{depth}"
    assert difference(*names) == {"MODEL.SE.ENABLED", "MODEL.WEIGHTS"}


@every_config
def test_a_header_names_the_command_the_expectation_and_the_hardware(path):
    header = path.read_text()
    assert f"configs/{path.name}" in header or "make demo" in header
    assert "# Expected:" in header
    assert "# Hardware:" in header


@every_config
def test_every_config_has_an_instant_twin_that_inherits_from_it(path):
    twin = path.parent / "instant" / path.name
    bases = yaml.safe_load(twin.read_text())["_BASE_"]
    assert (twin.parent / bases[0]).resolve() == path
    cfg = load_config(str(twin))
    assert cfg.SOLVER.MAX_ITER <= 4
    assert cfg.SOLVER.EPOCHS is None
    data = "shapes_classes" if is_classification(cfg) else "shapes_tiny"
    assert cfg.DATASETS.TRAIN == cfg.DATASETS.TEST == (data,)


@every_config
def test_every_config_builds_its_trunk(path):
    cfg = load_config(str(path), ["MODEL.DEVICE", "cpu"])
    trunk = build_backbone(cfg, ShapeSpec(channels=3))
    has_se = any(".se." in key for key, _ in trunk.named_parameters())
    assert has_se == any(word in path.stem for word in ("se_", "senet", "finetune_folder"))


def test_the_places_recipe_is_the_data_sets_own():
    names = "places365_r152", "places365_se_r152"
    assert difference(*names) == {"MODEL.SE.ENABLED"}
    cfg = load_config(str(ROOT / "configs" / "places365_se_r152.yaml"))
    solver = cfg.SOLVER
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.WEIGHT_DECAY) == (256, 0.1, 1e-4)
    assert (solver.EPOCHS, list(solver.STEP_EPOCHS), solver.GAMMA) == (90, [30, 60], 0.1)
    # All parameters decay, as torch's own optimizers have it.
    assert solver.WEIGHT_DECAY_NORM == 1e-4
    assert solver.WEIGHT_DECAY_BIAS is None
    assert (cfg.MODEL.WEIGHTS, cfg.MODEL.BACKBONE.FREEZE_AT) == ("", 0)
    assert cfg.DATASETS.TRAIN == ("places365/train_challenge",)
    headers = [(ROOT / "configs" / f"{name}.yaml").read_text() for name in names]
    for header, figures in zip(headers, (("41.15", "11.61"), ("40.37", "11.01")), strict=True):
        assert all(figure in header for figure in figures)
        assert "the paper's figures" in header


@pytest.mark.parametrize("path", COCO, ids=lambda path: path.stem)
def test_every_recipe_starts_from_published_weights_of_its_own_trunk(path):
    cfg = load_config(str(path), ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.OUT_FEATURES", "['res5']"])
    entry = catalogue_entry(cfg.MODEL.WEIGHTS)
    assert entry.verified
    trunk = BACKBONE_REGISTRY.get("build_senet_backbone")(cfg, ShapeSpec(channels=3))
    assert Architecture.of(trunk.state_dict()).name == entry.model


@pytest.mark.parametrize("path", COCO, ids=lambda path: path.stem)
def test_coco_recipes_are_detectron1s_2x(path):
    cfg = load_config(str(path))
    assert cfg.DATASETS.TRAIN == ("coco_2017_train",)
    assert cfg.DATASETS.TEST == ("coco_2017_val",)
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


def test_the_fpn_recipe_has_detectron1s_heads():
    cfg = load_config(str(ROOT / "configs" / "faster_rcnn_se_r50.yaml"))
    assert pytest.approx(1 / 9, abs=1e-4) == cfg.MODEL.RPN.SMOOTH_L1_BETA
    assert cfg.MODEL.RPN.BOUNDARY_THRESH == 0
    assert cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE == 512
    box = cfg.MODEL.ROI_BOX_HEAD
    assert (box.POOLER_TYPE, box.POOLER_SAMPLING_RATIO, box.SMOOTH_L1_BETA) == ("ROIAlign", 2, 1.0)
    assert (cfg.SOLVER.WEIGHT_DECAY_BIAS, cfg.SOLVER.BIAS_LR_FACTOR) == (0.0, 2.0)
