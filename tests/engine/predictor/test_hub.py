"""Tests for models on the Hugging Face Hub, using a local server with the Hub's API."""

import functools
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import yaml

import senet_transfer
from senet_transfer import UserError
from senet_transfer.cli.push import main, parser
from senet_transfer.config.load import load_config
from senet_transfer.engine.publish.contents import contents_of
from senet_transfer.engine.publish.push import push
from senet_transfer.engine.run_checks import _check_weights
from senet_transfer.export.conversion import convert_file
from senet_transfer.weights.hub.repositories import hub_weights
from tests.engine.predictor.conftest import CLASSES
from tests.weights.hub.server import TOKEN, serving_hub

pytestmark = pytest.mark.long


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Return a function that clears the cache of downloaded weights and sets a new cache folder."""

    def new(name: str) -> Path:
        hub_weights.cache_clear()
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / name))
        return tmp_path / name

    new("first_cache")
    yield new
    hub_weights.cache_clear()


@pytest.fixture
def hub(cache, monkeypatch):
    """Start a local server with the Hub's API; make huggingface_hub use it with a token."""
    constants = huggingface_hub.constants
    with serving_hub() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.address)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            served.address + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield served


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory):
    """Return a function that saves a timm network with timm's ``save_for_hf``."""
    import timm
    from timm.models._hub import save_for_hf

    @functools.cache
    def save(name: str) -> tuple[Path, torch.nn.Module]:
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=3).eval()
        folder = tmp_path_factory.mktemp("timm") / name
        config = {"label_names": ["ant", "bee", "cow"]}
        save_for_hf(model, folder, model_config=config, safe_serialization=True)
        return folder, model

    return save


def run_command(*words: str) -> None:
    main(parser().parse_args(words))


def test_a_pushed_classifier_gives_the_same_probabilities(classifier, photos, hub, cache):
    path = classifier / "model_final.pth"
    run_command(str(path), "me/scenes", "--license", "cc-by-4.0", "--data", "my | photos")
    assert set(hub.files("me/scenes")) == {
        ".gitattributes",
        "README.md",
        "config.json",
        "config.yaml",
        "model.safetensors",
    }
    cache("empty_cache")
    expected = senet_transfer.load(path)(photos / "a.jpg")
    found = senet_transfer.load("hf-hub:me/scenes")(photos / "a.jpg")
    np.testing.assert_array_equal(found.probabilities, expected.probabilities)
    assert found.names == expected.names
    described = json.loads(hub.files("me/scenes")["config.json"])
    assert described["classes"] == CLASSES
    assert (
        described["preprocessing"]["crop"]
        == load_config(str(classifier / "config.yaml")).INPUT.CLASSIFICATION.TEST_CROP
    )


@pytest.mark.slow
def test_a_pushed_detector_gives_the_same_objects_in_a_new_process(detector, photos, hub, tmp_path):
    push(detector, "me/objects", private=True)
    expected = senet_transfer.load(detector, threshold=0)(photos / "a.jpg")
    assert len(expected) == 4
    script = (
        "import sys, numpy, senet_transfer\n"
        "found = senet_transfer.load('hf-hub:me/objects', threshold=0)(sys.argv[1])\n"
        "numpy.savez(sys.argv[2], boxes=found.boxes, scores=found.scores, masks=found.masks)\n"
    )
    settings = {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    subprocess.run(
        [sys.executable, "-c", script, photos / "a.jpg", tmp_path / "found.npz"],
        env={**os.environ, **settings, "HF_HOME": str(tmp_path / "home")},
        check=True,
    )
    found = np.load(tmp_path / "found.npz")
    for name in ("boxes", "scores", "masks"):
        np.testing.assert_array_equal(found[name], getattr(expected, name))


def test_weights_of_a_repository_are_accepted_wherever_weights_are(classifier, hub, tmp_path):
    push(classifier, "me/scenes")
    push(classifier, "me/scenes")  # the repository exists already
    name = "hf-hub:me/scenes"
    saved = torch.load(classifier / "model_final.pth", weights_only=True)["model"]
    options = {"stem_out_channels": 16, "res2_out_channels": 16}
    model = senet_transfer.create_classifier("se_resnet18", 3, weights=name, **options)
    assert torch.equal(model.linear.weight, saved["linear.weight"])
    convert_file(name, tmp_path / "converted.pth")
    converted = torch.load(tmp_path / "converted.pth", weights_only=True)["model"]
    assert torch.equal(converted["linear.weight"], saved["linear.weight"])
    cfg = load_config(str(classifier / "config.yaml"), ["MODEL.WEIGHTS", name])
    _check_weights(cfg, eval_only=True)
    senet_transfer.apply_file_geometry(cfg)


def test_the_model_card_and_the_config_contain_only_what_is_known(
    classifier, hub, tmp_path, monkeypatch
):
    run = tmp_path / "secret_folder"
    run.mkdir()
    cfg = load_config(str(classifier / "config.yaml"))
    cfg.merge_from_list(["OUTPUT_DIR", str(run), "MODEL.WEIGHTS", str(run / "first.pth")])
    cfg.merge_from_list(["DATASETS.TEST", (str(run / "val"),), "DATALOADER.CACHE_DIR", str(run)])
    (run / "train").mkdir()
    (tmp_path / CLASSES[0]).mkdir(parents=True)  # a folder with the name of a class
    monkeypatch.chdir(tmp_path)
    cfg.DATASETS.TRAIN = ("secret_folder/train", "../secret/more", "./secret_set")
    (run / "config.yaml").write_text(cfg.dump())
    (run / "model_final.pth").symlink_to(classifier / "model_final.pth")
    results = {"classification": {"top1_error": 12.34, "top1_error_per_class": float("nan")}}
    (run / "results.json").write_text(json.dumps(results))
    out = tmp_path / "repository"
    run_command(str(run), "me/scenes", "--folder", str(out))
    # These results come from a separate evaluation, possibly of other weights, so they are omitted.
    assert "12.3" not in (out / "README.md").read_text()
    (run / "results.json").write_text(json.dumps({**results, "training": {"iterations": 9}}))
    words = ["--license", "mit", "--data", "me/photos", "--folder", str(out)]
    run_command(str(run), "me/scenes", *words)
    card = (out / "README.md").read_text()
    _, header, text = card.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "senet_transfer",
        "license": "mit",
        "datasets": ["me/photos"],
        "pipeline_tag": "image-classification",
        "tags": ["senet_transfer", "detectron2", "pytorch"],
    }
    assert "| classification/top1_error | 12.34 |" in text
    assert "Evaluation data: val." in text
    assert 'senet_transfer.load("hf-hub:me/scenes")' in text
    assert "a/airfield, b/bar, c/canyon" in text
    published = load_config(str(out / "config.yaml"))
    assert published.DATASETS.TRAIN == ("train", "more", "secret_set")
    assert published.DATASETS.CLASSES == CLASSES
    assert "secret_folder" not in card + (out / "config.yaml").read_text()
    run_command(str(run), "Scenes", "--card", str(tmp_path / "card.md"), *words[:4])
    alone = (tmp_path / "card.md").read_text()
    assert "\n# Scenes\n" in alone
    assert "The weights are not published" in alone
    assert str(tmp_path) not in alone
    assert text.partition("## Training")[2].partition("## File")[0] in alone
    hashed = hashlib.sha256((run / "model_final.pth").read_bytes()).hexdigest()
    assert f"| SHA-256 | `{hashed}` |" in alone
    assert not hub.asked  # with --folder, nothing is uploaded


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--opts", "DATASETS.TEST", "('val',)"], "--opts has an effect only with --evaluate"),
        (["--private", "--folder", "out"], "--private has no effect"),
        (["--card", "card.md", "--bundle"], "--card writes no weights"),
        (["--card", "card.md", "--half"], "--card writes no weights"),
    ],
)
def test_options_without_effect_are_errors(words, message):
    with pytest.raises(UserError, match=message):
        run_command("run", "me/scenes", *words)


@pytest.mark.long
def test_a_published_detector_is_not_merged_with_others(detector, tmp_path):
    cfg = load_config(str(detector / "config.yaml"))
    cfg.TEST.ENSEMBLE.WEIGHTS = ("output/other.pth",)
    config = tmp_path / "config.yaml"
    config.write_text(cfg.dump())
    contents = contents_of(detector / "model_final.pth", str(config))
    assert contents.cfg.TEST.ENSEMBLE.WEIGHTS == ()
    assert contents.tensors.keys() == contents_of(detector / "model_final.pth").tensors.keys()


@pytest.mark.parametrize("architecture", ["resnet18", "legacy_seresnet18"])
def test_files_of_timm_load_as_timm_states(architecture, timm_folder, hub, photos):
    from timm.data import create_transform, resolve_data_config

    folder, model = timm_folder(architecture)
    sha = hub.add("timm/net.one", folder)
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for source in (f"hf-hub:timm/net.one@{sha}", folder):
        found = senet_transfer.load(source, top=3)(photos / "a.jpg")
        assert set(found.names) == {"ant", "bee", "cow"}
    built = senet_transfer.create_classifier(
        f"se_{architecture[-8:]}" if "se" in architecture else architecture,
        3,
        weights="hf-hub:timm/net.one",
    ).eval()
    with torch.no_grad():
        assert torch.allclose(built(image), model(image), atol=1e-5)
    resize, crop, *_ = create_transform(**resolve_data_config({}, model=model)).transforms
    pixels = built.preprocessing
    assert (pixels.resize, pixels.crop) == (resize.size, crop.size[0])
    assert pixels.interpolation == resize.interpolation.value
    np.testing.assert_allclose(np.divide(pixels.mean, 255), model.default_cfg["mean"], atol=1e-6)


def test_a_file_of_a_timm_only_network_loads_as_that_network(timm_folder, photos):
    folder, model = timm_folder("regnety_002")
    predictor = senet_transfer.load(folder, top=3)
    assert set(predictor(photos / "a.jpg").names) == {"ant", "bee", "cow"}
    built = senet_transfer.create_classifier(
        "timm/regnety_002", 3, weights=folder / "model.safetensors"
    ).eval()
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(built(image), model(image))
    with pytest.raises(UserError, match="contains the network regnety_002"):
        senet_transfer.create_classifier(
            "timm/regnety_004", 3, weights=folder / "model.safetensors"
        )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"architecture": "resnet34"}, "its tensors are those of resnet18"),
        ({"model_args": {"block_args": {}}}, "model_args contains block_args"),
        ({"model_args": {"global_pool": "catavgmax"}}, "global_pool is not avg"),
        ({"pretrained_cfg": {"mean": [0.5]}}, "input_size"),
        ({"label_names": [1, 2, 3]}, "label_names"),
    ],
)
def test_timm_settings_that_no_model_supports_are_errors(values, expected, timm_folder, tmp_path):
    folder, _ = timm_folder("resnet18")
    content = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, **values}))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(UserError, match=expected):
        senet_transfer.load(tmp_path)


def test_a_cached_repository_loads_without_network(classifier, hub, monkeypatch):
    push(classifier, "me/scenes")
    first = hub_weights("hf-hub:me/scenes")
    hub_weights.cache_clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    assert hub_weights("hf-hub:me/scenes") == first
    with pytest.raises(UserError, match=r"hf-hub:me/other is not completely cached"):
        hub_weights("hf-hub:me/other")
    assert len(hub.asked) == asked


def test_a_repository_without_access_is_a_clear_error(classifier, hub, tmp_path, monkeypatch):
    push(classifier, "me/hidden", private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    for name, expected in {
        "hf-hub:me/absent": "does not exist",
        "hf-hub:me/hidden": "is private and the token has no access",
        "hf-hub:me": "is not the name of a Hugging Face Hub repository",
        "hf-hub:me/a/b": "is not the name of a Hugging Face Hub repository",
        "hf-hub:me/a@": "is not the name of a Hugging Face Hub repository",
    }.items():
        with pytest.raises(UserError, match=expected) as caught:
            senet_transfer.load(name)
        assert "hf_wrong" not in str(caught.value)
    with pytest.raises(UserError, match="rejected the request for me/new with status 401"):
        push(classifier, "me/new")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match="requires a Hugging Face token"):
        push(classifier, "me/new")


def test_a_repository_of_another_layout_is_a_clear_error(hub):
    hub.create("me/other")
    sha = hub.commit("me/other", {"tf_model.h5": b"1", "run.py": b"raise SystemExit"})
    with pytest.raises(UserError, match=r"contains no model.safetensors.*tf_model.h5"):
        hub_weights("hf-hub:me/other")
    with pytest.raises(UserError, match="The revision in .* does not exist"):
        hub_weights("hf-hub:me/other@v2")
    # Code files are not downloaded.
    assert not any(f"{sha}/run.py" in path for _, path, _ in hub.asked)
