"""Tests for all documents: paths, links, config tables and code examples.

To update the tables in configs/README.md from the headers of the configs, run

    python tests/test_documents.py
"""

import re
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from detectron2.data import DatasetCatalog

from senet_transfer import list_catalogue
from senet_transfer.data.shapes.generate import make_shapes
from senet_transfer.models.registry import _MODELS
from senet_transfer.weights.families.registry import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("[!.]*/README.md"), *ROOT.glob("docs/**/*.md")]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
TABLE = ROOT / "configs" / "README.md"
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
# Title of each table, and the prefixes of the config names in the table.
TASKS = {
    "COCO": ("faster_rcnn_", "mask_rcnn_", "cascade_rcnn_", "keypoint_rcnn_", "retinanet_"),
    "Places365 and your own images": ("places365_", "finetune_", "scratch_"),
    "ImageNet": ("imagenet_",),
    "CIFAR": ("cifar10_", "cifar100_"),
    "Blood cells, and pretraining on small images": ("bccd_", "transfer_"),
    "Demos": ("demo_",),
}
COLUMNS = "| config | description | command | expected result | hardware |\n|---|---|---|---|---|"


def header(path):
    """Return the description, command, expected result and hardware in a config's header."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    what, rest = " ".join(lines).split("Command:")
    command, rest = rest.split("Expected:")
    expected, rest = rest.split("Hardware:")
    hardware = rest.split("Source:")[0]
    return tuple(part.strip().removesuffix(".") for part in (what, command, expected, hardware))


def row(path):
    what, command, expected, hardware = header(path)
    # The text above the tables describes the adaptation to fewer GPUs for all recipes.
    hardware = hardware.partition(". With fewer GPUs, divide")[0]
    command = command.replace("\\ ", "")
    return f"| [{path.stem}]({path.name}) | {what} | `{command}` | {expected} | {hardware} |"


def tables():
    """Yield one table of configs per task, with each baseline above its SE counterpart."""
    for title, beginnings in TASKS.items():
        found = [path for path in CONFIGS if path.name.startswith(beginnings)]
        found.sort(key=lambda path: (path.stem.replace("_se_", "_"), len(path.stem)))
        yield "\n".join([f"## {title}", "", COLUMNS, *map(row, found)])


def test_the_tables_of_configs_match_the_configs_headers():
    text = TABLE.read_text()
    assert text.endswith("\n\n".join(tables()) + "\n"), "run python tests/test_documents.py"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_in_one_of_the_tables(path):
    assert TABLE.read_text().splitlines().count(row(path)) == 1


def test_the_tables_of_configs_have_no_other_rows():
    found = re.findall(r"^\| \[\w+\]\((.+?)\)", TABLE.read_text(), re.M)
    assert sorted(found) == [path.name for path in CONFIGS]


@pytest.fixture
def registered_examples():
    """Unregister, after the test, what the examples in CONTRIBUTING.md register.

    The examples register two models, a weight family and a dataset.
    """
    yield
    for name in ("tiny", "se_tiny"):
        _MODELS.pop(name, None)
    FAMILIES.pop("my_lab", None)
    if "my_val" in DatasetCatalog:
        DatasetCatalog.remove("my_val")


@pytest.mark.long
def test_the_worked_example_of_contributing_runs(registered_examples, tmp_path, monkeypatch):
    shapes = make_shapes(tmp_path / "shapes", train=1, val=1)
    (tmp_path / "annotations.json").symlink_to(shapes / "annotations" / "instances_tiny.json")
    (tmp_path / "images").symlink_to(shapes / "tiny")
    theirs = torchvision.models.resnet18()
    saved = {f"encoder.{name}": value for name, value in theirs.state_dict().items()}
    torch.save(saved, tmp_path / "my_lab_resnet18.pth")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", CONTRIBUTING, re.S):
        exec(block, names)

    image = torch.randn(2, 3, 64, 64)
    features = names["backbone"](image)
    assert {name: tuple(map.shape) for name, map in features.items()} == {
        "res3": (2, 64, 4, 4),
        "res5": (2, 256, 1, 1),
    }
    assert sum(".se." in name for name, _ in names["backbone"].named_parameters()) == 4 * 4
    assert names["classifier"](image).shape == (2, 10)
    with torch.inference_mode():
        expected = theirs.eval()(image)
        torch.testing.assert_close(names["model"].eval()(image), expected, atol=1e-5, rtol=1e-5)
    assert len(DatasetCatalog.get("my_val")) == 8


every_document = pytest.mark.parametrize(
    "page", DOCUMENTS, ids=lambda page: page.relative_to(ROOT).as_posix()
)


@every_document
def test_every_path_that_a_document_names_exists(page):
    parts = "senet_transfer|tools|tests|configs|datasets|docs"
    networks = list_catalogue("senet_transfer/*")
    for path in re.findall(rf"`((?:{parts})/[\w/.]*)`", page.read_text()):
        assert (ROOT / path).exists() or path in networks, path


def test_every_tool_has_a_section():
    titles = " ".join(re.findall("^## (.*)$", (ROOT / "tools/README.md").read_text(), re.M))
    for path in (ROOT / "tools").glob("*.py"):
        assert path.name in titles.split(), path.name


def anchors(text):
    """Return the link anchors that GitHub generates for a document's headings."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@every_document
def test_every_link_has_an_existing_file_and_heading(page):
    links = re.findall(r"\]\((?!https:)([^)\s]*)\)", page.read_text())
    for path, _, anchor in (link.partition("#") for link in links):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target.read_text()), f"{path}#{anchor}"


def test_the_citation_is_complete():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= found.keys()
    assert found["preferred-citation"]["title"] == "Squeeze-and-Excitation Networks"


if __name__ == "__main__":
    head = TABLE.read_text().partition(f"## {next(iter(TASKS))}")[0]
    TABLE.write_text(head.rstrip() + "\n\n" + "\n\n".join(tables()) + "\n")
    print(f"Wrote {TABLE}")
