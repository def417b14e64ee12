"""Tests for networks whose weights are included in the package, and for their model cards."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import senet_transfer
from senet_transfer import UserError, list_catalogue
from senet_transfer.cli import export, predict, push
from senet_transfer.config.load import load_config
from senet_transfer.engine.publish.bundle import index
from senet_transfer.engine.run_checks import _check_weights
from senet_transfer.utils.hashing import file_sha256
from senet_transfer.weights.hub import bundled
from senet_transfer.weights.hub.bundled import MAX_BYTES, bundled_files
from senet_transfer.weights.hub.catalogue import catalogue_entry, load_catalogue
from tests.engine.predictor.conftest import CLASSES


def bundle(source: Path, name: str, folder: Path, *words: str) -> Path:
    """Bundle a trained model with ``senet push`` and return the path of the bundled weights."""
    flags = ["--bundle", "--half", "--folder", str(folder)]
    push.main(push.parser().parse_args([str(source), name, *flags, *words]))
    return bundled_files(folder)[name.partition("/")[2]][0]


@pytest.fixture
def use_folder(monkeypatch):
    """Return a function that sets the folder in which the package looks for bundled weights."""

    def use(folder: Path) -> None:
        monkeypatch.setattr(bundled, "FOLDER", folder)
        load_catalogue.cache_clear()

    yield use
    load_catalogue.cache_clear()


@pytest.fixture
def folder(classifier, detector, tmp_path, use_folder) -> Path:
    """Bundle a classifier and a detector into a folder; make the package load weights from it."""
    place = tmp_path / "pretrained"
    bundle(classifier, "senet_transfer/scenes", place, "--license", "mit", "--data", "my photos")
    bundle(detector, "senet_transfer/objects", place)
    use_folder(place)
    return place


@pytest.mark.long
def test_only_a_network_in_the_packages_folder_is_said_to_be_loaded_by_name(
    classifier, tmp_path, use_folder, capsys
):
    use_folder(tmp_path / "own")
    for name in ("own", "other"):
        path = bundle(classifier, "senet_transfer/scenes", tmp_path / name)
        printed = capsys.readouterr().out
        assert f"Wrote {path}\n" in printed
        assert ("--weights senet_transfer/scenes" in printed) == (name == "own")


def test_every_bundled_network_is_complete_and_small():
    files = bundled_files()
    stored = list(bundled.FOLDER.glob("*.safetensors"))
    assert {path for path, _ in files.values()} == set(stored)
    assert sum(path.stat().st_size for path in stored) <= MAX_BYTES
    for name, (path, sha256) in files.items():
        assert file_sha256(path).startswith(sha256)
        assert load_config(bundled.bundled_config(f"senet_transfer/{name}")).DATASETS.CLASSES
        assert file_sha256(path) in path.with_name(f"{name}.md").read_text()
    assert (bundled.FOLDER / "README.md").read_text() == index(bundled.FOLDER)


@pytest.mark.long
def test_a_bundled_network_is_loaded_by_name(folder, classifier, detector, photos, tmp_path):
    assert list_catalogue("senet_transfer/*") == ["senet_transfer/objects", "senet_transfer/scenes"]
    name = "senet_transfer/scenes"
    assert catalogue_entry(name).licence == "mit"
    expected = senet_transfer.load(classifier)(photos / "a.jpg")
    found = senet_transfer.load(name)(photos / "a.jpg")
    assert sorted(found.names) == CLASSES
    np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=1e-3)
    objects = senet_transfer.load("senet_transfer/objects", threshold=0)(photos / "a.jpg")
    first = senet_transfer.load(detector, threshold=0)(photos / "a.jpg")
    np.testing.assert_allclose(objects.scores, first.scores, atol=1e-3)

    narrow = {"stem_out_channels": 16, "res2_out_channels": 16}
    built = senet_transfer.create_classifier("se_resnet18", 3, weights=name, **narrow)
    saved = torch.load(classifier / "model_final.pth", weights_only=True)["model"]
    assert torch.equal(built.linear.weight, saved["linear.weight"].half().float())
    assert torch.equal(built.linear.bias, saved["linear.bias"])
    backbone = senet_transfer.create_backbone("se_resnet18", weights=name, **narrow)
    assert backbone.preprocessing == built.preprocessing
    _check_weights(load_config("", ["MODEL.WEIGHTS", name]), eval_only=False)

    words = ["--weights", name, "--output", str(tmp_path / "scenes.ts"), "--quiet"]
    export.main(export.parser().parse_args(words))
    exported = senet_transfer.load(tmp_path / "scenes.ts")(photos / "a.jpg")
    assert exported.names == found.names
    words = ["--input", str(photos / "a.jpg"), "--output", str(tmp_path / "found"), "--quiet"]
    predict.main(predict.parser().parse_args(["--weights", name, *words]))
    assert "a/airfield" in (tmp_path / "found" / "predictions.json").read_text()


@pytest.mark.long
def test_a_file_depends_only_on_the_model_and_replaces_the_old_one(classifier, tmp_path):
    shutil.copytree(classifier, tmp_path / "copy")
    place = tmp_path / "pretrained"
    first = bundle(classifier, "senet_transfer/scenes", place)
    content = first.read_bytes()
    assert bundle(tmp_path / "copy", "senet_transfer/scenes", place) == first
    assert first.read_bytes() == content
    other = bundle(classifier, "senet_transfer/scenes", place, "--license", "mit")
    assert other != first
    assert list(place.glob("*.safetensors")) == [other]
    assert (place / "README.md").read_text() == index(place)


@pytest.mark.long
def test_a_damaged_or_unknown_network_is_a_clear_error(folder, use_folder, tmp_path):
    (path,) = folder.glob("scenes-*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"its SHA-256 is .*Reinstall senet_transfer"):
        senet_transfer.load("senet_transfer/scenes")
    path.write_bytes(content[:5])
    load_catalogue.cache_clear()
    with pytest.raises(UserError, match=r"its SHA-256 is .*Reinstall senet_transfer"):
        senet_transfer.create_backbone("se_resnet18", weights="senet_transfer/scenes")
    known = "The package contains: senet_transfer/objects, senet_transfer/scenes"
    with pytest.raises(UserError, match=known):
        senet_transfer.load("senet_transfer/absent")
    use_folder(tmp_path / "empty")
    with pytest.raises(UserError, match="The package contains: none"):
        senet_transfer.load("senet_transfer/scenes")
    assert not list_catalogue("senet_transfer/*")
    assert list_catalogue("cadene/*")


@pytest.mark.long
def test_a_network_that_exceeds_the_limit_is_not_added(classifier, tmp_path, monkeypatch):
    monkeypatch.setattr("senet_transfer.engine.publish.bundle.MAX_BYTES", 1000)
    with pytest.raises(UserError, match="expected at most 1,000"):
        bundle(classifier, "senet_transfer/scenes", tmp_path / "pretrained")
    assert not list((tmp_path / "pretrained").iterdir())
    with pytest.raises(UserError, match="expected senet_transfer/NAME"):
        bundle(classifier, "me/scenes", tmp_path / "pretrained")


@pytest.mark.long
def test_a_card_states_the_metrics_of_the_file_and_of_all_seeds(classifier, photos, tmp_path):
    for name in CLASSES:
        (tmp_path / "val" / name).mkdir(parents=True)
        shutil.copy(photos / "a.jpg", tmp_path / "val" / name)
    for seed, error in ((2, 30.0), (10, 32.0)):
        record = {
            "metrics": {"classification/top1_error": error, "bbox/AP-cat": 1.0},
            "seed": seed,
            "machine": {"device": "a GPU", "cores": 2},
            "command": f"senet train SEED {seed}",
            "weights_sha256": file_sha256(classifier / "model_final.pth") if seed == 10 else "",
        }
        (tmp_path / f"seed{seed}.json").write_text(json.dumps(record))
    words = ["--evaluate", "--runs", str(tmp_path), "--opts", "DATASETS.TEST"]
    place = tmp_path / "pretrained"
    bundle(classifier, "senet_transfer/scenes", place, *words, f"('{tmp_path / 'val'}',)")
    card = (place / "scenes.md").read_text()
    # All three class folders contain the same image, so exactly one prediction is right.
    assert "| metric | this file | all runs (n = 2) |" in card
    assert "| classification/top1_error | 66.67 | 31.00 ± 1.41 |" in card
    assert "with the seeds 2, 10. The first run was started with `senet train SEED 2`." in card
    assert "from the run with seed 10." in card
    assert "| machine | device: a GPU, cores: 2 |" in card
    assert "AP-cat" not in card
    assert "| `SOLVER.BASE_LR` | `0.0005` |" in card
    with pytest.raises(UserError, match="contains no run records"):
        bundle(classifier, "senet_transfer/scenes", place, "--runs", str(place))
