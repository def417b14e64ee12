"""Tests for the statements and examples in README.md and docs/."""

import re
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate
from detectron2.modeling import build_model

import senet_transfer
from senet_transfer.config import is_classification
from senet_transfer.config.load import load_config
from senet_transfer.data.detection.augmentation.build import check_detection_augmentation
from senet_transfer.data.images.augmentation import build_augmentation
from senet_transfer.engine.checkpoints.checkpointer import Checkpointer
from senet_transfer.weights import FAMILIES
from senet_transfer.weights.hub.catalogue import load_catalogue

ROOT = Path(__file__).resolve().parents[1]


def read(document: str) -> str:
    """Return the text of a document, given its path relative to the repository root."""
    return (ROOT / document).read_text()


def python_blocks(document: str) -> list[str]:
    """Return the code of all Python blocks in a document."""
    return re.findall(r"```python\n(.*?)```", read(document), re.S)


def block_with(word: str, document: str) -> str:
    """Return a document's first Python example that contains the given word."""
    return next(block for block in python_blocks(document) if word in block)


def rows(document: str, table: str = "") -> list[list[str]]:
    """Return the cells of all table rows in a document, without separator rows.

    Args:
        document: Path of the document.
        table: Start of a table's header. If given, only the rows of that table are returned.
    """
    text = read(document)
    if table:
        text = table + text.partition(table)[2].partition("\n\n")[0]
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_the_readme_fits_on_a_screen_and_a_half():
    assert len(read("README.md").splitlines()) <= 112


@pytest.mark.long
def test_the_python_example_of_the_readme_runs_unchanged(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = python_blocks("README.md")
    names: dict = {}
    exec(block, names)
    assert list(names["features"]) == ["res2", "res5"]
    assert names["features"]["res2"].shape == (1, 256, 56, 56)
    assert "382 tensors loaded" in capsys.readouterr().out


def test_the_names_in_the_readmes_text_are_real():
    named = re.findall(r"`weights=\"(.*?)\"`", read("README.md"))
    assert named
    assert set(named) <= set(load_catalogue())


@pytest.mark.long
def test_the_python_example_runs():
    names: dict = {}
    exec(python_blocks("docs/python.md")[1], names)
    assert set(names["backbone"](torch.randn(1, 3, 64, 64))) == {"res2", "res5"}


@pytest.mark.long
def test_the_lazy_config_builds_an_fpn_on_an_se_backbone_with_weights(
    tmp_path, zero_initial_weights
):
    names: dict = {}
    exec(block_with("LazyCall", "docs/detectron2.md"), names)
    config = names["model"].backbone.bottom_up
    assert config.weights in load_catalogue()
    trained = senet_transfer.create_backbone(config.name)
    torch.nn.init.ones_(trained.res5[2].conv3.weight)
    config.weights = str(tmp_path / "weights.pth")
    senet_transfer.save_weights(trained, config.weights)
    fpn = instantiate(names["model"].backbone)
    assert bool((fpn.bottom_up.res5[2].conv3.weight == 1).all())
    assert list(fpn(torch.randn(1, 3, 64, 64))) == ["p2", "p3", "p4", "p5", "p6"]
    assert any(".se." in key for key, _ in fpn.bottom_up.named_parameters())


@pytest.mark.long
@pytest.mark.parametrize("kind", ["weights of a backbone", "checkpoint of a detector"])
def test_three_lines_load_weights_into_a_detectron2_model(tmp_path, zero_initial_weights, kind):
    cfg = senet_transfer.get_senet_config()
    cfg.MODEL.DEVICE, cfg.MODEL.BACKBONE.ARCH = "cpu", "se_resnet18"
    cfg.MODEL.BACKBONE.NAME = "build_senet_backbone"
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    if kind == "checkpoint of a detector":
        model = build_model(cfg)
        torch.nn.init.constant_(model.proposal_generator.rpn_head.conv.weight, 3)
        Checkpointer(model, str(tmp_path)).save("weights")
    else:
        # Write weights whose stem pool and preprocessing differ from Detectron2's defaults.
        model = senet_transfer.create_backbone("se_resnet18", stem_pool="ceil")
        torch.nn.init.ones_(model.res4[1].conv2.weight)
        senet_transfer.save_weights(model, tmp_path / "weights.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    names: dict = {"cfg": cfg}
    exec(block_with("apply_file_geometry", "docs/detectron2.md"), names)
    if kind == "checkpoint of a detector":
        assert bool((names["model"].proposal_generator.rpn_head.conv.weight == 3).all())
    else:
        assert bool((names["model"].backbone.res4[1].conv2.weight == 1).all())
        assert cfg.MODEL.RESNETS.STEM_POOL == "ceil"
        assert cfg.INPUT.FORMAT == "RGB"


@pytest.mark.long
def test_three_keys_replace_the_backbone_of_a_detectron2_config(tmp_path, zero_initial_weights):
    trained = senet_transfer.create_backbone("se_resnet50")
    torch.nn.init.ones_(trained.res5[2].conv3.weight)
    senet_transfer.save_weights(trained, tmp_path / "weights.pth")
    names: dict = {}
    exec(block_with("model_zoo", "docs/detectron2.md"), names)
    cfg = names["cfg"]
    assert cfg.MODEL.WEIGHTS in load_catalogue()
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = str(tmp_path / "weights.pth"), "cpu"
    exec(block_with("apply_file_geometry", "docs/detectron2.md"), names)
    assert bool((names["model"].backbone.bottom_up.res5[2].conv3.weight == 1).all())
    assert any(".se." in name for name, _ in names["model"].named_parameters())
    assert cfg.INPUT.FORMAT == "RGB"


def test_every_family_has_a_line_and_every_name_in_it_is_in_the_catalogue():
    _, *families = rows("docs/weights.md", "| family |")
    assert {row[0].strip("`") for row in families} == set(FAMILIES)
    for family, _, name in families:
        if found := re.match(r"`([^`]+)`", name):
            assert load_catalogue()[found[1]].family == family.strip("`")


def test_every_config_recommended_for_a_kind_of_data_exists():
    table = read("docs/classification.md").partition("|---")[2].partition("\n\n")[0]
    named = re.findall(r"`(\w+)`", table)
    assert len(named) == 6
    assert set(named) <= {path.stem for path in (ROOT / "configs").glob("*.yaml")}


@pytest.mark.long
def test_the_configs_of_the_page_on_augmentation_are_valid(tmp_path):
    blocks = re.findall(r"```yaml\n(.*?)```", read("docs/augmentation.md"), re.S)
    assert len(blocks) == 2
    for block in blocks:
        (tmp_path / "mine.yaml").write_text(block.replace("configs/", f"{ROOT}/configs/"))
        cfg = load_config(str(tmp_path / "mine.yaml"))
        if not is_classification(cfg):
            check_detection_augmentation(cfg)
        assert is_classification(cfg) == (build_augmentation(cfg) is not None)


def test_the_papers_results_match_the_configs_headers():
    headers = "".join(path.read_text() for path in sorted((ROOT / "configs").glob("*.yaml")))
    quoted = rows("docs/results.md", "| data and metric | network | without SE | with SE |\n")[1:]
    assert len(quoted) == 22
    figures = re.findall(r"\d+\.\d+", " ".join(cell for row in quoted for cell in row[2:]))
    # 0.35% is SE's share of the operations.
    errors = set(re.findall(r"(\d+\.\d\d)%", read("README.md"))) - {"0.35"}
    assert errors == {"24.80", "23.29", "41.15", "40.37", "6.37", "5.21"}
    for figure in [*figures, *errors]:
        assert re.search(rf"\b{re.escape(figure)}\b", headers), figure


def test_every_documented_failure_has_an_existing_test():
    found = [row for row in rows("docs/reliability.md") if len(row) == 3][1:]
    written = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(found) > 10
    for row in found:
        named = re.findall(r"`(test_\w+)`", row[2])
        assert named, row
        assert all(f"def {name}(" in written for name in named), row


def test_the_api_reference_has_every_public_name_of_the_package():
    listed = set(re.findall(r"^::: senet_transfer\.(\w+)$", read("docs/api.md"), re.M))
    assert listed == set(senet_transfer.__all__) - {"__version__"}
