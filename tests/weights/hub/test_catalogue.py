"""Tests for the catalogue of published weights, and for loading weights by name."""

import hashlib
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch

from senet_transfer import (
    UserError,
    apply_file_geometry,
    create_backbone,
    create_classifier,
    get_senet_config,
    list_catalogue,
    list_models,
    load_weights,
)
from senet_transfer.engine.checkpoints.checkpointer import Checkpointer
from senet_transfer.engine.run_checks import check_run
from senet_transfer.weights import FAMILIES, resolve
from senet_transfer.weights.hub import catalogue
from senet_transfer.weights.hub.catalogue import Entry, load_catalogue
from tests.weights.peers import peer, save
from tests.weights.web import serving

CATALOGUE = load_catalogue()


# Weights that are part of the package are tested in tests/engine/predictor/test_bundled.py.
@pytest.mark.parametrize("name", [name for name, entry in CATALOGUE.items() if not entry.folder])
def test_an_entry_is_well_formed(name):
    entry = CATALOGUE[name]
    assert entry.name == name
    assert re.fullmatch(r"[a-z0-9_]+/[\w.-]+", name)
    assert entry.family in FAMILIES
    assert name.startswith(entry.family) or entry.family.startswith(name.partition("/")[0])
    assert entry.model in list_models()
    parts = urlsplit(entry.url)
    assert parts.scheme == "https" or entry.by_hand
    assert parts.hostname
    assert not parts.query
    assert entry.note or not entry.by_hand
    assert entry.file == Path(entry.file).name
    if entry.verified:
        assert re.search(rf"-{entry.sha256}\.", entry.url.rpartition("/")[2])
        assert re.fullmatch("[0-9a-f]{8,64}", entry.sha256)
    else:
        assert not re.search(r"-[0-9a-f]{8}\.", entry.url)


def test_each_cache_name_belongs_to_one_url():
    addresses = {}
    for entry in CATALOGUE.values():
        assert addresses.setdefault(entry.file, entry.url) == entry.url


def test_torchvision_has_the_same_urls():
    models = pytest.importorskip("torchvision").models
    for version in ("v1", "v2"):
        for name in list_catalogue(f"torchvision_{version}/*"):
            weights = models.get_model_weights(name.partition("/")[2])
            assert CATALOGUE[name].url == weights[f"IMAGENET1K_{version.upper()}"].url


@pytest.mark.long
def test_timm_and_pretrainedmodels_have_the_same_files():
    timm_models = pytest.importorskip("timm").models
    names = {name: name.partition("/")[2] for name in list_catalogue("timm/*")}
    legacy = list_catalogue("timm_legacy/*")
    names |= {name: f"legacy_{name.partition('/')[2]}.in1k" for name in legacy}
    for name, theirs in names.items():
        stated = timm_models.get_pretrained_cfg(theirs).url
        # For networks that are only on the Hub, timm no longer has a URL.
        assert CATALOGUE[name].url == stated or (not stated and "inception" in name)

    stated = pytest.importorskip("pretrainedmodels").pretrained_settings
    for name in list_catalogue("cadene/*"):
        address = stated[name.partition("/")[2]]["imagenet"]["url"]
        assert CATALOGUE[name].file == address.rpartition("/")[2]


def test_names_are_listed_by_pattern():
    assert list_catalogue("cadene/se_resnet*") == [
        f"cadene/se_resnet{depth}" for depth in (101, 152, 50)
    ]
    assert len(list_catalogue()) == len(CATALOGUE)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Serve a timm weight file that has two names in the catalogue.

    The entry timm_legacy/test is correct; cadene/wrong specifies the wrong weight family.
    """
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    body = save(peer("timm", "legacy_seresnet18"), tmp_path / "x.pth").read_bytes()
    digest = hashlib.sha256(body).hexdigest()[:8]
    with serving() as site:
        url = site.add(f"x-{digest}.pth", body)
        file = f"x-{digest}.pth"
        entries = {
            "timm_legacy/test": Entry(
                "timm_legacy/test", url, file, digest, "timm_legacy", "se_resnet18"
            ),
            "cadene/wrong": Entry("cadene/wrong", url, file, digest, "cadene", "se_resnet18"),
        }
        for name, entry in entries.items():
            monkeypatch.setitem(CATALOGUE, name, entry)
        yield site


@pytest.mark.long
def test_a_name_works_like_a_path_and_is_downloaded_once(published, tmp_path):
    name = "timm_legacy/test"
    backbone = create_backbone("se_resnet18", weights=name)
    assert backbone.res2[0].relu_before
    assert backbone.weights_source["family"] == "timm_legacy"
    options = {"stem_pool": "ceil", "se_relu_before": True}
    assert load_weights(create_classifier("se_resnet18", **options), name).family == "timm_legacy"
    checkpointer = Checkpointer(create_classifier("se_resnet18", **options))
    checkpointer.load(name, [])
    assert checkpointer.report.family == "timm_legacy"

    cfg = get_senet_config()
    cfg.MODEL.WEIGHTS = name
    cfg.MODEL.BACKBONE.ARCH = "se_resnet18"
    cfg.OUTPUT_DIR = str(tmp_path)
    check_run(cfg, eval_only=False, resume=False)
    assert "MODEL.RESNETS.STEM_POOL" in {change.key for change in apply_file_geometry(cfg)}
    assert name == cfg.MODEL.WEIGHTS
    assert len(published.asked) == 1
    assert resolve(name) == Path(torch.hub.get_dir()) / "checkpoints" / CATALOGUE[name].file


@pytest.mark.long
def test_the_users_family_takes_precedence(published):
    with pytest.raises(UserError, match="does not belong to the weight family cadene"):
        create_backbone("se_resnet18", weights="cadene/wrong")
    backbone = create_backbone("se_resnet18", weights="cadene/wrong", family="timm_legacy")
    assert backbone.weights_source["family"] == "timm_legacy"


@pytest.mark.long
def test_a_cached_file_is_used_if_its_hash_matches(published):
    entry = CATALOGUE["timm_legacy/test"]
    path = resolve(entry.name)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match="not the expected file: its SHA-256 is .*Delete the file"):
        create_backbone("se_resnet18", weights=entry.name)
    assert len(published.asked) == 1


@pytest.mark.long
def test_a_local_file_of_that_name_takes_precedence(published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "timm_legacy").mkdir()
    save(peer("timm", "seresnet18"), tmp_path / "timm_legacy" / "test")
    backbone = create_backbone("se_resnet18", weights=os.path.join("timm_legacy", "test"))
    assert backbone.weights_source["family"] == "timm"
    assert not published.asked


@pytest.mark.parametrize("name", ["cadene/se_resnet5O", "timm/seresnet50", "places365/resnet34"])
def test_an_unknown_name_error_suggests_the_nearest(name):
    with pytest.raises(UserError, match=rf"neither an existing file.*Did you mean {name[:6]}"):
        create_backbone("se_resnet50", weights=name)
    cfg = get_senet_config()
    cfg.MODEL.WEIGHTS = name
    with pytest.raises(UserError, match="Did you mean"):
        check_run(cfg, eval_only=False, resume=False)
    with pytest.raises(UserError, match="Did you mean"):
        apply_file_geometry(cfg)


def test_a_misspelt_publisher_is_reported_like_a_missing_file():
    cfg = get_senet_config()
    cfg.MODEL.WEIGHTS = "cadenne/se_resnet50"
    with pytest.raises(UserError, match="does not exist.*a similar name: cadene/se_resnet50"):
        check_run(cfg, eval_only=False, resume=False)
    with pytest.raises(
        UserError, match="weight file .*does not exist.*in the catalogue: .*cadene/se_resnet50"
    ):
        apply_file_geometry(cfg)


@pytest.mark.parametrize("name", [name for name, e in CATALOGUE.items() if e.by_hand])
def test_a_manual_download_error_names_the_source_and_destination(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    entry = CATALOGUE[name]
    with pytest.raises(UserError) as error:
        resolve(name)
    for word in (entry.url, str(entry.path), "by hand"):
        assert word in str(error.value)
    entry.path.parent.mkdir(parents=True)
    entry.path.write_bytes(b"x")
    assert resolve(name) == entry.path


@pytest.mark.long
def test_a_cached_file_is_hashed_once_until_it_changes(published, monkeypatch):
    hashed = []
    monkeypatch.setattr(catalogue, "check_sha256", lambda path, *_: hashed.append(path))
    path = resolve("timm_legacy/test")
    for _ in range(3):
        resolve("timm_legacy/test")
    assert len(hashed) == 1
    os.utime(path, ns=(1, 1))
    resolve("timm_legacy/test")
    assert len(hashed) == 2
