"""Browser tests for reports, which must work without external resources."""

import json
import os
import re
import time

import pytest

from senet_transfer.analysis.report import load_runs, write_report
from tests.analysis.report.run_folders import HOSTILE, write_run

PHONE, DESKTOP = (390, 844), (1280, 900)


@pytest.fixture(params=[DESKTOP, PHONE], ids=["desktop", "phone"])
def show(request, browser):
    """Return a function that opens a page. After the test, check that the page had no errors."""
    width, height = request.param
    page = browser.new_page(viewport={"width": width, "height": height})
    complaints, asked = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))

    def load(path):
        page.goto(path.as_uri())
        return page

    yield load
    assert complaints == []
    assert [url for url in asked if not url.startswith("data:")] == [page.url]
    # The page must fit the screen width. Only tables and code may scroll horizontally.
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


@pytest.fixture(scope="module")
def compared(detection_run, classification_run, tmp_path_factory):
    """Write a report on two detectors and a classifier, and return its path."""
    root = tmp_path_factory.mktemp("runs")
    folders = [
        detection_run(root / HOSTILE.replace("/", "_")),
        detection_run(root / "other", noise=0.3),
        classification_run(root / "scenes"),
    ]
    write_report(load_runs(folders), root / "report.html", say=lambda text: None, quiet=True)
    return root / "report.html"


def names(gallery):
    return gallery.locator(".card > p").all_inner_texts()


def means(gallery):
    """Return the mean F1 score of two runs for each image in a gallery, read from the captions."""
    captions = [text for text in gallery.locator("figcaption").all_inner_texts() if "F1" in text]
    found = [float(text.rpartition(" ")[2]) for text in captions]
    return [round((a + b) / 2, 2) for a, b in zip(found[::2], found[1::2], strict=True)]


@pytest.mark.long
def test_the_gallery_of_detections_is_sorted_and_filtered(show, compared):
    page = show(compared)
    gallery = page.locator("#detection")
    cards, said = gallery.locator(".card"), gallery.locator("p[role=status]")
    assert means(gallery) == sorted(means(gallery))
    worst = names(gallery)
    gallery.get_by_label("order").select_option("best first")
    assert means(gallery) == sorted(means(gallery), reverse=True)
    assert names(gallery) != worst
    gallery.get_by_label("order").select_option("by file name")
    assert names(gallery) == [f"{number:06d}.jpg" for number in range(1, 25)]
    gallery.get_by_role("button", name="Show more (6 left)").click()
    assert len(names(gallery)) == 30

    assert said.inner_text() == "30 images."
    gallery.get_by_label("class").select_option("star")
    assert said.inner_text() == f"{cards.count()} images."
    assert 0 < cards.count() < 24
    texts = gallery.locator("svg text").all_text_contents()
    assert {text.split()[0] for text in texts} == {"star"}

    gallery.get_by_label("least score").fill("95")
    texts = gallery.locator("svg text").all_text_contents()
    scores = [int(text.split()[1]) for text in texts if " " in text]
    assert min(scores) >= 95
    gallery.get_by_label("other").uncheck()
    assert cards.first.locator("figure").count() == 2


@pytest.mark.long
def test_an_image_is_enlarged_and_its_labels_can_be_hidden(show, compared):
    page = show(compared)
    gallery = page.locator("#detection")
    first = gallery.locator(".panels svg:has(rect.wrong)").first
    labels = first.locator("text")
    assert labels.first.is_visible()
    gallery.get_by_label("labels").uncheck()
    assert not labels.first.is_visible()
    before = first.bounding_box()
    first.click()
    large = page.locator("dialog")
    assert large.locator("svg").bounding_box()["width"] > 1.5 * before["width"]
    assert large.locator("rect").count() == first.locator("rect").count()
    assert not large.locator("text").first.is_visible()
    large.get_by_label("labels").check()
    assert large.locator("text").first.is_visible()
    # The label of each false positive ends with its error type.
    wrong = large.locator("rect.wrong").count()
    texts = large.locator("text").all_text_contents()
    types = ("classification", "localisation", "both", "duplicate", "background")
    assert sum(text.endswith(types) for text in texts) == wrong > 0
    # Browsers close a dialog only after they have handled the click or key, so wait.
    large.get_by_role("button", name="Close").click()
    large.wait_for(state="detached")
    first.press("Enter")
    page.keyboard.press("Escape")
    large.wait_for(state="detached")
    page.locator("#confusions img").first.click()
    assert large.locator("img").is_visible()
    page.keyboard.press("Escape")


@pytest.mark.long
def test_detections_are_filtered_by_type_of_error(show, compared):
    page = show(compared)
    gallery = page.locator("#detection")
    gallery.get_by_label("error type").select_option("localisation")
    boxes = gallery.locator("rect.wrong")
    assert boxes.count() > 0
    assert gallery.locator("rect.hit").count() == 0
    found = json.loads(page.locator("#data").text_content())["detection"][0]["images"]
    runs = ("0", "1")
    expected = [
        sum(
            box[5] >= 50 and box[6] < 0 and box[7] == 1 for run in runs for box in one["found"][run]
        )
        for one in found
    ]
    assert gallery.locator("p[role=status]").inner_text() == f"{sum(map(bool, expected))} images."
    assert sum(expected) >= boxes.count()


@pytest.mark.long
def test_diagnostics_start_with_a_sentence_and_follow_the_selected_run(show, compared):
    page = show(compared)
    part = page.locator("#diagnostics")
    data = json.loads(page.locator("#data").text_content())["diagnostics"][0]
    sentences = part.locator("h3 + p, p:has(b)").all_inner_texts()
    assert [data["runs"][run]["summary"] in text for run, text in zip("01", sentences, strict=True)]
    assert sentences[0].count("AP50") >= 1
    costs = part.locator("table").first.locator("tbody tr").nth(1).locator("td").all_inner_texts()
    expected = []
    for run in "01":
        error = data["runs"][run]["errors"]["localisation"]
        expected += [f"{error['AP50']:.1f}", str(error["count"])]
    assert costs == expected
    for run in range(2):
        part.get_by_label("run of the tables").select_option(str(run))
        matrix = part.locator("table.confusion tbody tr")
        shown = [row.locator("td").all_inner_texts() for row in matrix.all()]
        counts = data["runs"][str(run)]["confusion"]["matrix"]
        assert [[int(text or 0) for text in row] for row in shown] == counts


@pytest.mark.long
def test_precision_curves_change_with_the_class_and_none_is_constant(show, compared):
    page = show(compared)
    part = page.locator("#diagnostics")
    assert part.locator(".chart path").count() == 2
    part.get_by_label("class of the curve").select_option("star")
    for way in part.locator(".chart path").all():
        heights = re.findall(r"[\d.]+ ([\d.]+)", way.get_attribute("d"))
        assert len(set(heights)) > 1
    listed = page.get_by_label("another metric").locator("option").all_inner_texts()
    assert "lr" not in listed
    assert "Not drawn, because they never change: lr 0.01" in page.locator("#curves").inner_text()


@pytest.mark.long
def test_confused_classes_are_filtered_and_names_are_html_escaped(show, compared):
    page = show(compared)
    gallery = page.locator("#confusions")
    assert gallery.locator(".card").count() == 3
    gallery.get_by_label("class").select_option("aisle")
    cards = gallery.locator(".card > p").all_inner_texts()
    assert len(cards) == 2
    assert all("aisle" in text for text in cards)
    assert any("<script>document.title='owned'" in text for text in cards)
    gallery.get_by_label("order").select_option("most confident first")
    assert page.title() == "3 runs \N{MIDDLE DOT} senet_transfer"
    assert page.locator("#calibration svg path").count() == 1


@pytest.mark.long
def test_curves_of_all_runs_share_a_plot_and_can_be_hidden(show, compared):
    page = show(compared)
    loss = page.locator(".chart", has=page.get_by_role("heading", name="total_loss"))
    assert loss.locator("path").count() == 3
    page.locator("#legend").get_by_label("other").uncheck()
    assert [path.is_visible() for path in loss.locator("path").all()] == [True, False, True]
    loss.locator("svg").hover()
    said = loss.locator(".readout").inner_text()
    assert "scenes: " in said
    assert "other" not in said
    page.get_by_label("another metric").select_option("time")
    assert page.get_by_role("heading", name="time").count() == 1


@pytest.fixture(scope="module")
def large(shapes, tmp_path_factory):
    """Write a report on twenty runs and 5,000 small images."""
    tmp_path = tmp_path_factory.mktemp("large")
    content = json.loads((shapes / "annotations" / "instances_val.json").read_text())
    names = [image["file_name"] for image in content["images"]]
    by_image = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    (tmp_path / "images").mkdir()
    images, annotations = [], []
    for number in range(1, 5001):
        source = content["images"][number % len(names)]
        os.link(shapes / "val" / source["file_name"], tmp_path / "images" / f"{number}.jpg")
        images.append({**source, "id": number, "file_name": f"{number}.jpg"})
        for annotation in by_image[source["id"]]:
            annotations.append({**annotation, "id": len(annotations) + 1, "image_id": number})
    own = {**content, "images": images, "annotations": annotations}
    (tmp_path / "own.json").write_text(json.dumps(own))
    register = [["many", str(tmp_path / "own.json"), str(tmp_path / "images")]]
    folders = []
    for run in range(20):
        rows = [
            {"iteration": k, "total_loss": 1 / (k + 1), "lr": 0.1} for k in range(0, 90_000, 20)
        ]
        keys = ["DATASETS.TEST", ("many",), "DATASETS.REGISTER", register]
        folders.append(write_run(tmp_path / f"run{run}", keys, rows))
        found = [
            {**{key: a[key] for key in ("image_id", "category_id", "bbox")}, "score": (k % 97) / 97}
            for k, a in enumerate(annotations * 3, start=run)
        ]
        place = folders[-1] / "inference" / "many"
        place.mkdir(parents=True)
        (place / "coco_instances_results.json").write_text(json.dumps(found))
    write_report(load_runs(folders), tmp_path / "report.html", quiet=True)
    return tmp_path / "report.html"


@pytest.mark.slow
def test_a_page_of_20_runs_on_5000_images_opens_in_3_seconds(show, large):
    assert large.stat().st_size < 20e6
    start = time.perf_counter()
    page = show(large)
    assert page.locator("#detection .card").count() == 24
    assert time.perf_counter() - start < 3
