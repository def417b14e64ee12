"""Tests that the files, public names and command lines of commit 394ad59 keep working.

That commit wrote the files in ``fixtures/``. The tests use only public entry points, so they do
not depend on the package's layout.
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import build_model

import senet_transfer
from senet_transfer.cli.export import parser as export_parser
from tests.compatibility.inputs import (
    FIXTURES,
    NARROW,
    ROOT,
    draw_images,
    draw_pixels,
    flatten,
    last_metrics,
    parse_options,
    tensor_sums,
)

WEIGHTS = FIXTURES / "weights"
HELP = sorted((FIXTURES / "help").glob("*.txt"))

# Tolerance relative to the largest value: the order of float32 additions depends on the SIMD width.
TOLERANCE = 1e-4


def read_json(name: str):
    return json.loads((FIXTURES / name).read_text())


@pytest.fixture(scope="module")
def expected() -> dict:
    return read_json("expected.json")


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, run_python) -> Path:
    """Resume a copy of the interrupted run, train to the end, and return the output folder."""
    work = tmp_path_factory.mktemp("resumed")
    shutil.copytree(FIXTURES / "run", work / "run")
    draw_images(work / "images")
    # Without a seed in the config, the run uses the seed in its checkpoint.
    config = work / "run/config.yaml"
    assert "\nSEED: 7\n" in config.read_text()
    config.write_text(config.read_text().replace("\nSEED: 7\n", "\nSEED: -1\n"))
    words = ["--config-file", "run/config.yaml", "--resume"]
    code = "import os, runpy, sys; os.chdir(sys.argv.pop(1)); sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    done = run_python("-c", code, work, ROOT / "tools/train_net.py", *words)
    assert done.returncode == 0, done.stderr
    return work / "run"


def test_an_old_run_resumes_from_its_checkpoint(resumed):
    assert last_metrics(FIXTURES / "run")["iteration"] == 3
    logged = [json.loads(line) for line in (resumed / "metrics.json").read_text().splitlines()]
    trained = [line["iteration"] for line in logged if "total_loss" in line]
    assert trained == [3, 5]


def test_an_old_run_ends_with_its_original_metrics(resumed, expected):
    found = last_metrics(resumed)
    for name, value in expected["run"]["metrics"].items():
        assert found[name] == pytest.approx(value, rel=TOLERANCE), name


@pytest.mark.parametrize(("kind", "file"), [("model", "model_final.pth"), ("ema", "model_ema.pth")])
def test_an_old_run_ends_with_its_original_tensors(kind, file, resumed, expected):
    found = tensor_sums(torch.load(resumed / file, weights_only=True)["model"])
    assert found.keys() == expected["run"][kind].keys()
    for name, (total, size) in expected["run"][kind].items():
        assert found[name][0] == pytest.approx(total, rel=0, abs=TOLERANCE * size), name
        assert found[name][1] == pytest.approx(size, rel=TOLERANCE), name


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_an_old_weight_file_gives_its_original_logits(suffix, expected):
    model = senet_transfer.create_classifier(
        "se_resnet50", num_classes=5, weights=WEIGHTS / f"classifier.{suffix}", **NARROW
    )
    assert_logits(logits_of(model), expected)


def test_an_old_weight_file_loads_into_a_model_that_exists(expected):
    model = senet_transfer.create_classifier("se_resnet50", num_classes=5, **NARROW)
    senet_transfer.load_weights(model, WEIGHTS / "classifier.pth")
    assert_logits(logits_of(model), expected)


def test_an_old_onnx_file_gives_its_original_logits(expected):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(WEIGHTS / "classifier.onnx")
    (entry,) = session.get_inputs()
    (found,) = session.run(None, {entry.name: draw_pixels()})
    assert_logits(found, expected)


def logits_of(model: torch.nn.Module) -> np.ndarray:
    """Normalise the images of :func:`draw_pixels` and return a classifier's logits."""
    values = model.preprocessing
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (values.mean, values.std))
    with torch.no_grad():
        return model.eval()((torch.from_numpy(draw_pixels()) - mean) / std).numpy()


def assert_logits(found: np.ndarray, expected: dict) -> None:
    logits = np.array(expected["logits"])
    # The expected logits differ between images, so a constant output fails.
    assert np.ptp(logits, axis=0).min() > 100 * TOLERANCE * np.abs(logits).max()
    np.testing.assert_allclose(found, logits, rtol=0, atol=TOLERANCE * np.abs(logits).max())


def test_an_old_config_of_a_detector_keeps_its_values_and_builds(expected):
    cfg = senet_transfer.get_senet_config()
    cfg.merge_from_file(str(FIXTURES / "detector.yaml"))
    found = flatten(cfg)
    old = expected["detector"]["keys"]
    assert {key: found.get(key, "absent") for key in old} == old
    parameters = sum(value.numel() for value in build_model(cfg).parameters())
    assert parameters == expected["detector"]["parameters"]


@pytest.mark.parametrize("place", ["senet_transfer", "senet_transfer.backbones.registry"])
@pytest.mark.long
def test_an_old_lazy_config_builds_its_backbone(place, expected, tmp_path):
    recorded = "_target_: senet_transfer.create_backbone"
    text = (FIXTURES / "lazy_config.yaml").read_text()
    assert recorded in text
    path = tmp_path / "lazy_config.yaml"
    path.write_text(text.replace(recorded, f"_target_: {place}.create_backbone"))
    backbone = instantiate(LazyConfig.load(str(path)).backbone)
    assert sum(value.numel() for value in backbone.parameters()) == expected["lazy_parameters"]
    with torch.no_grad():
        maps = backbone.eval()(torch.zeros(1, 3, 64, 64))
    assert {name: value.shape[-1] for name, value in maps.items()} == {
        f"p{level}": 64 // 2**level for level in range(2, 7)
    }


@pytest.mark.parametrize("config", read_json("configs.json"))
def test_an_old_config_name_exists(config):
    assert (ROOT / "configs" / config).is_file()


def test_every_old_config_key_keeps_its_default():
    old = flatten(yaml.unsafe_load((FIXTURES / "defaults.yaml").read_text()))
    found = flatten(senet_transfer.get_senet_config())
    assert {key: found.get(key, "absent") for key in old} == old


@pytest.fixture(scope="module")
def interface(tmp_path_factory, run_python) -> dict:
    """Return all commands' help texts, and old public names that can no longer be imported."""
    output = tmp_path_factory.mktemp("interface") / "found.json"
    script = "tests/compatibility/dump_interface.py"
    done = run_python(script, FIXTURES / "public_names.json", output)
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text())


@pytest.mark.long
def test_every_old_public_name_is_importable_from_its_old_module(interface):
    assert sum(len(names) for names in read_json("public_names.json").values()) > 60
    assert interface["missing"] == {}


# Old names of options that still work but are no longer listed in the help text.
HIDDEN = {"tools_export": {"--trunk"}}


def test_the_old_name_of_the_backbone_option_still_works():
    for option in ("--trunk", "--backbone"):
        assert export_parser().parse_args(["--output", "x.onnx", option]).backbone
    assert not export_parser().parse_args(["--output", "x.onnx"]).backbone


@pytest.mark.parametrize("path", HELP, ids=lambda path: path.stem)
def test_every_old_option_is_still_there(path, interface):
    texts = {
        re.sub(r"\.py$", "", name).replace("/", "_"): t for name, t in interface["help"].items()
    }
    old, found = parse_options(path.read_text()), parse_options(texts[path.stem])
    hidden = HIDDEN.get(path.stem, set())
    assert {option for option in old if option not in found} == hidden
    for option, words in old.items():
        if option in hidden:
            continue
        assert form(found[option]) == form(words), option
        # New choices are allowed.
        assert choices(found[option]) >= choices(words), option


def form(words: str) -> str:
    """Replace the choices in an option's metavar, such as ``{json,csv}``, with empty braces."""
    return re.sub(r"\{.*?\}", "{}", words)


def choices(words: str) -> set[str]:
    return {choice for found in re.findall(r"\{(.*?)\}", words) for choice in found.split(",")}


def test_options_are_read_from_help_texts_of_every_python_version():
    text = """usage: a [-h] [-s SIZE]

About it.

positional arguments:
  IN                    a file, of
                        a kind
  opts

options:
  -h, --help            show this
  -s SIZE, --size SIZE  pixels
  --kind {a,b} [{a,b} ...]
                        of two, --other
"""
    expected = {"IN": "IN", "opts": "opts", "-h": "", "--help": "", "-s": "SIZE", "--size": "SIZE"}
    expected |= {"--kind": "{a,b} [{a,b} ...]"}
    assert parse_options(text) == expected
    newer = text.replace("-s SIZE, --size SIZE", "-s, --size SIZE")
    assert parse_options(newer) == expected
    assert choices(expected["--kind"]) == {"a", "b"}
    assert form("{a} [{a} ...]") == form("{a,b} [{a,b} ...]")


def test_the_fixtures_contain_no_absolute_paths():
    for path in FIXTURES.rglob("*.*"):
        assert not re.search(rb"/(home|root|tmp|work|usr)/", path.read_bytes()), path
