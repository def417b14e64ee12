"""Tests for the HTML page about a dataset, from the command line to the browser."""

import json
import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from senet_transfer.analysis.dataset_page import data_config, write_data_page
from senet_transfer.cli.data import prepare
from senet_transfer.data.shapes.generate import make_shapes
from senet_transfer.errors import UserError
from tests.analysis.report.run_folders import HOSTILE

NAME = HOSTILE.replace("/", "\N{FRACTION SLASH}")
SMALL = ["INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MIN_SIZE_TEST", "96"]


def embedded(page):
    text = page.read_text()
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Write a shapes dataset with an annotation error and with unusual names.

    A class name and an image's file name contain HTML and JavaScript.
    """
    root = make_shapes(tmp_path_factory.mktemp("data") / "shapes", train=12, val=4)
    path = root / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    content["categories"][0]["name"] = NAME
    content["images"][0]["file_name"] = f"{NAME}.jpg"
    os.rename(root / "train" / "000001.jpg", root / "train" / f"{NAME}.jpg")
    item = content["annotations"][0]
    item["bbox"] = [*item["bbox"][:2], 1, 1]
    path.write_text(json.dumps(content))
    val = root / "annotations" / "instances_val.json"
    content = json.loads(val.read_text())
    content["categories"][0]["name"] = NAME
    val.write_text(json.dumps(content))
    # The training and validation sets contain the same image.
    shutil.copy(root / "train" / "000002.jpg", root / "val" / "000002.jpg")
    return root


@pytest.fixture(scope="module")
def detection_page(shapes):
    page = shapes / "data.html"
    words = []
    for part in ("train", "val"):
        words += ["--dataset", f"my_{part}", shapes / "annotations" / f"instances_{part}.json"]
        words += [shapes / part]
    prepare("show", [str(word) for word in [*words, "--output", page, "--quiet", *SMALL]])
    return page


@pytest.mark.long
def test_a_detection_page_shows_the_mistakes_and_loads_nothing(detection_page):
    data, text = embedded(detection_page), detection_page.read_text()
    assert data["classes"][0] == NAME
    assert len(data["inputs"]) == 12
    assert f"training data: {NAME}.jpg" in [card["name"] for card in data["unusual"]]
    assert any("is 1 x 1 pixels" in card["why"] for card in data["unusual"])
    [group] = [card for card in data["duplicates"] if card["kind"] == "2 identical files"]
    names = [member["name"] for member in group["members"]]
    assert names == ["training data: 000002.jpg", "evaluation data: 000002.jpg"]
    assert "which makes the evaluation too optimistic: 1." in text
    assert HOSTILE not in text
    assert NAME not in text
    assert not re.search(r"""(src|href)\s*=\s*["']?(?!data:|#)\w""", text.partition("<script>")[0])


@pytest.mark.long
def test_a_classifier_s_page_shows_copies_with_different_labels(tmp_path, tree):
    root = shutil.copytree(tree, tmp_path / "images")
    shutil.copy(root / "bark" / "0.png", root / "sand" / "copy.png")
    Image.fromarray(np.full((36, 40, 3), 9, np.uint8)).save(root / "bark" / "blank.png")
    (root / "sand" / "broken.png").write_bytes(b"\x89PNG broken")
    (root / "moss" / "dry").rename(root / NAME)
    (root / "moss").rmdir()
    said = []
    options = ["INPUT.CLASSIFICATION.CROP", "32", "INPUT.CLASSIFICATION.TEST_CROP", "32"]
    cfg = data_config(str(root), options=[*options, "DATALOADER.MAX_SKIP_RATIO", "1.0"])
    page = tmp_path / "data.html"
    write_data_page(cfg, page, inputs=4, workers=1, say=said.append, quiet=True)
    data, text = embedded(page), page.read_text()
    assert [len(said), "broken.png" in said[0]] == [1, True]
    [group] = data["duplicates"]
    assert [member["name"] for member in group["members"]] == [
        "training data: bark/0.png (bark)", "training data: sand/copy.png (sand)"
    ]  # fmt: skip
    assert "with different labels: 1." in text
    assert [card["name"] for card in data["unusual"]] == ["training data: bark/blank.png"]
    assert "<th>bark</th>" in text
    assert HOSTILE not in text


def test_missing_data_is_an_error_that_names_the_arguments():
    with pytest.raises(UserError, match="--data, register datasets with --dataset"):
        data_config()
    with pytest.raises(UserError, match=r"nowhere"):
        data_config("nowhere")


@pytest.mark.long
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_on_a_screen_and_a_phone(browser, detection_page, width):
    page = browser.new_page(viewport={"width": width, "height": 900})
    complaints, asked = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(detection_page.as_uri())
    data = embedded(detection_page)
    assert page.locator("#inputs .card").count() == 12
    for panel, picture in zip(
        page.locator("#inputs .card").first.locator("svg").all(),
        data["inputs"][0]["panels"],
        strict=True,
    ):
        assert panel.locator("rect").count() == len(picture["boxes"])
        assert panel.locator("image").get_attribute("href") == picture["src"]
    assert page.locator("#unusual .card").count() == len(data["unusual"])
    assert page.locator("#statistics .chart svg").count() == len(data["charts"])
    page.locator("#inputs svg").first.click()
    assert page.locator("dialog svg").is_visible()
    page.keyboard.press("Escape")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert complaints == []
    assert [url for url in asked if not url.startswith("data:")] == [page.url]
    assert page.title().startswith("Data: my_train, my_val")
    page.close()
