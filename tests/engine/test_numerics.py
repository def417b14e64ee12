"""Tests for numerical settings, such as AMP, whose value "auto" depends on the device."""

from pathlib import Path

import pytest
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from senet_transfer import UserError
from senet_transfer.config import AUTO_KEYS, config_value
from senet_transfer.config.load import load_config
from senet_transfer.engine import numerics
from senet_transfer.engine.setup import setup
from senet_transfer.engine.trainer import Trainer

AUTO = [word for key in AUTO_KEYS for word in (key, "auto")]
CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))


@pytest.fixture
def supports_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)


def resolved(config, device, *options, before=None):
    cfg = load_config(config, [*options, "MODEL.DEVICE", device])
    numerics.resolve_auto(cfg, before)
    return numerics.settings(cfg)


def test_auto_changes_nothing_on_a_cpu():
    found = resolved("cifar10_se_resnet110", "cpu", *AUTO)
    assert found == dict.fromkeys(AUTO_KEYS, False) | {
        "SOLVER.AMP.DTYPE": "",
        "DETERMINISTIC": False,
    }


@pytest.mark.parametrize(
    ("config", "deterministic", "benchmark"),
    [
        ("cifar10_se_resnet110", "False", True),
        ("cifar10_se_resnet110", "True", False),
        ("faster_rcnn_se_r50", "False", False),
    ],
)
def test_auto_is_fast_on_a_gpu(supports_bfloat16, config, deterministic, benchmark):
    found = resolved(config, "cuda:0", *AUTO, "DETERMINISTIC", deterministic)
    assert found.pop("DETERMINISTIC") == (deterministic == "True")
    assert found.pop("SOLVER.AMP.DTYPE") == "bfloat16"
    assert found.pop("CUDNN_BENCHMARK") == benchmark
    assert set(found.values()) == {True}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.long
def test_the_configs_of_this_project_keep_their_precision(path, supports_bfloat16):
    cfg = load_config(str(path), ["MODEL.DEVICE", "cuda"])
    before = numerics.settings(cfg)
    numerics.resolve_auto(cfg)
    assert numerics.settings(cfg) == before
    assert before["SOLVER.TF32"] is None


def test_a_resumed_run_keeps_its_initial_settings(supports_bfloat16):
    for amp, dtype in (("False", ""), ("True", ""), ("True", "bfloat16")):
        before = load_config("", ["SOLVER.AMP.ENABLED", amp, "SOLVER.AMP.DTYPE", dtype])
        found = resolved("", "cuda", *AUTO, before=before)
        assert found == numerics.settings(before)


@pytest.mark.parametrize("key", AUTO_KEYS)
def test_values_other_than_auto_true_and_false_are_rejected(key, tmp_path):
    file = tmp_path / "own.yaml"
    tree = value = {}
    for part in key.split("."):
        value[part] = value = {}
    for word in ("yes", "1", "0.5", "(True,)"):
        with pytest.raises(UserError, match=f"{key} is .*expected True, False or auto"):
            load_config("", [key, word])
    for word, expected in (("auto", "auto"), ("True", True), ("False", False)):
        assert config_value(load_config("", [key, word]), key) == expected
        text = str(tree).replace("{}", word).replace("'", '"')
        file.write_text(text)
        assert config_value(load_config(str(file)), key) == expected


@pytest.mark.long
def test_a_run_saves_its_settings_and_prints_them_on_one_line(command, tmp_path, caplog):
    options = dict(zip(AUTO[::2], AUTO[1::2], strict=True))
    with caplog.at_level("INFO", "detectron2"):
        cfg = setup(command("--deterministic", **options))
    saved = load_config(str(tmp_path / "run" / "config.yaml"))
    assert numerics.settings(saved) == numerics.settings(cfg)
    assert cfg.DETERMINISTIC
    assert not torch.are_deterministic_algorithms_enabled()  # only on a GPU
    assert "SOLVER.AMP.ENABLED False" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.long
def test_channels_last_does_not_change_the_result_of_detectors(command):
    losses, gradients, images = [], [], torch.randint(256, (1, 3, 64, 96), dtype=torch.uint8)
    boxes = Boxes(torch.tensor([[8.0, 8.0, 40.0, 50.0]]))
    truth = Instances((64, 96), gt_boxes=boxes, gt_classes=torch.zeros(1, dtype=torch.int64))
    for layout in ("False", "True"):
        cfg = setup(command(**{"MODEL.CHANNELS_LAST": layout}))
        torch.manual_seed(0)
        model = Trainer.build_model(cfg)
        with EventStorage():
            found = model([{"image": images[0], "instances": truth}])
        losses.append(torch.stack(list(found.values())).detach())
        # Use float64, because normalising a single image amplifies float32 rounding errors.
        features = model.backbone.double()(images.double())
        sum(feature.square().mean() for feature in features.values()).backward()
        gradients.append(model.backbone.bottom_up.res2[0].conv1.weight.grad)
        for level in ("p2", "p5"):
            last = features[level].is_contiguous(memory_format=torch.channels_last)
            assert last == (layout == "True")
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-7, atol=1e-12)


def test_on_a_gpu_deterministic_algorithms_are_used(monkeypatch):
    cfg = load_config("", ["DETERMINISTIC", "True", "MODEL.DEVICE", "cuda", "SOLVER.TF32", "True"])
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    try:
        numerics.apply_settings(cfg)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert (matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark) == (True, True, False)
    finally:
        torch.use_deterministic_algorithms(False)
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before
