"""What the README shows in Python works."""

import re
from pathlib import Path

import torch
from detectron2.config import instantiate

from senet_transfer.weights import FAMILIES
from senet_transfer.weights.hub.catalogue import load_catalogue

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_the_python_example_runs():
    names: dict = {}
    exec(BLOCKS[0], names)
    assert set(names["trunk"](torch.randn(1, 3, 64, 64))) == {"res2", "res5"}


def test_the_lazy_config_builds_an_fpn_over_our_trunk():
    names: dict = {}
    exec(BLOCKS[1], names)
    fpn = instantiate(names["backbone"])
    assert list(fpn(torch.randn(1, 3, 64, 64))) == ["p2", "p3", "p4", "p5", "p6"]
    assert any(".se." in key for key, _ in fpn.bottom_up.named_parameters())


def section(title):
    """What stands under a title, up to the next."""
    text = (ROOT / "README.md").read_text()
    return re.search(rf"\n## {title}\n(.*?)\n## ", text, re.DOTALL)[1]


def test_every_family_has_a_line_and_every_name_in_it_is_in_the_catalogue():
    rows = [
        line.split("|")[1:4] for line in section("I have this file").splitlines() if "|" in line
    ]
    assert {row[0].strip(" `") for row in rows[2:]} == set(FAMILIES)
    for family, _, name in rows[2:]:
        if found := re.match(r" `([^`]+)`", name):
            assert load_catalogue()[found[1]].family == family.strip(" `")


def test_every_config_that_is_named_for_a_kind_of_data_exists():
    named = re.findall(r"`(\w+)`", section("Classification").partition("|---")[2])
    assert len(named) == 4
    assert set(named) <= {path.stem for path in (ROOT / "configs").glob("*.yaml")}


def test_the_papers_results_are_those_of_the_configs_headers():
    lines = [line for line in section("Results").splitlines() if line.endswith("the paper's |")]
    headers = "".join(path.read_text() for path in sorted((ROOT / "configs").glob("*.yaml")))
    assert len(lines) == 11
    for line in lines:
        for figure in re.findall(r"\d+\.\d+", " ".join(line.split(" | ")[2:4])):
            assert re.search(rf"\b{re.escape(figure)}\b", headers), figure


def test_every_fault_has_a_test_that_exists():
    text = (ROOT / "README.md").read_text()
    rows = text.partition("| fault | what happens |")[2].partition("\n\n")[0].splitlines()[2:]
    written = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(rows) > 10
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row.split("|")[3])
        assert named, row
        assert all(f"def {name}(" in written for name in named), row
