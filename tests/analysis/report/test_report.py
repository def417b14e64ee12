"""Tests that HTML reports show the results stored in the output folders of training runs."""

import json
import os
import re
import runpy
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from senet_transfer import UserError
from senet_transfer.analysis.report import find_runs, load_run, load_runs, write_report
from senet_transfer.analysis.report.classification import Predictions
from senet_transfer.analysis.report.detection import match_detections
from tests.analysis.report.run_folders import HOSTILE, training_rows, write_run

ROOT = Path(__file__).resolve().parents[3]


class Text(HTMLParser):
    """HTML parser that collects a page's text, embedded JSON and link targets."""

    def __init__(self, html: str):
        super().__init__()
        self.words, self.data, self.within, self.references = [], {}, "", []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.within = attributes.get("id", tag) if tag == "script" else tag
        self.references += [attributes[name] for name in ("src", "href") if name in attributes]

    def handle_endtag(self, tag):
        self.within = ""

    def handle_data(self, data):
        if self.within == "data":
            self.data = json.loads(data)
        elif self.within not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def page(folders, tmp_path, **options) -> Text:
    said = []
    output = tmp_path / "report.html"
    write_report(load_runs(folders), output, say=said.append, quiet=True, **options)
    found = Text(output.read_text())
    found.said = said
    return found


# ---- reading run folders


def test_a_resumed_run_uses_its_later_lines_and_the_total_time(tmp_path):
    first, again = training_rows(100, 0.9), training_rows(140, 0.5)[2:]
    for row in again:
        row["elapsed_seconds"] -= 30.0  # the resumed run counts its time from iteration 60
    run = write_run(tmp_path / "run", [], [*first, *again])
    loaded = load_run(run)
    assert [point[0] for point in loaded.curves["total_loss"]] == [19, 39, 59, 79, 99, 119, 139]
    assert loaded.curves["total_loss"][3][1] == again[1]["total_loss"]
    assert loaded.seconds == pytest.approx(50.0 + 40.0)
    assert loaded.memory_mb == 939.0
    assert loaded.is_finished


def test_an_incomplete_last_line_is_skipped(tmp_path):
    run = write_run(tmp_path / "run", [], training_rows(100, 0.9)[:3])
    with open(run / "metrics.json", "a") as file:
        file.write('{"iteration": 79, "total_lo')
    loaded = load_run(run)
    assert loaded.iterations == 60
    assert not loaded.is_finished
    text = page([run], tmp_path).text
    assert "60 iterations done, about 40 s remaining" in text
    assert "Nothing has been evaluated yet" in text


def test_a_run_that_ended_early_is_finished(tmp_path):
    folder = write_run(tmp_path / "run", [], training_rows(200, 0.99)[:5])
    assert not load_run(folder).is_finished
    for iterations, finished in ((80, False), (100, True)):
        (folder / "results.json").write_text(json.dumps({"training": {"iterations": iterations}}))
        assert load_run(folder).is_finished == finished


def test_an_evaluation_after_the_last_step_is_not_counted_as_a_step(tmp_path):
    rows = [*training_rows(100, 0.9), {"iteration": 100, "bbox/AP": 20.0}]
    loaded = load_run(write_run(tmp_path / "run", [], rows))
    assert loaded.iterations == 100


def test_an_evaluation_after_training_is_included(tmp_path):
    rows = [{"iteration": 9, "bbox/AP": 20.0}]
    run = write_run(tmp_path / "run", ["DATASETS.TEST", ("own",)], rows)
    (run / "results.json").write_text(json.dumps({"bbox": {"AP": 30.0}, "bbox_TTA": {"AP": 31.0}}))
    os.utime(run / "metrics.json", (1, 1))
    loaded = load_run(run)
    assert loaded.value("own", "bbox", "AP") == 30.0
    assert loaded.value("own", "bbox_TTA", "AP") == 31.0


def test_runs_are_labelled_by_their_shortest_unique_path(tmp_path):
    folders = [write_run(tmp_path / name / "run", [], []) for name in ("a", "b")]
    assert [run.name for run in load_runs(folders)] == ["a/run", "b/run"]
    assert find_runs([tmp_path / "a", tmp_path / "b" / "run", tmp_path / "a"]) == folders
    with pytest.raises(UserError, match="contains no config.yaml"):
        find_runs([tmp_path])
    (tmp_path / "a" / "run" / "config.yaml").write_text("[")
    with pytest.raises(UserError, match="can't be read"):
        load_runs(folders)


# ---- results


def test_the_papers_row_is_next_to_this_projects_with_the_difference(tmp_path):
    keys = ["MODEL.BACKBONE.NAME", "build_senet_fpn_backbone", "MODEL.SE.ENABLED", True]
    keys += ["DATASETS.TEST", ("coco_2017_val",)]
    rows = [{"iteration": 9, "bbox/AP": 39.9, "bbox/AP50": 61.25}]
    text = page([write_run(tmp_path / "se", keys, rows)], tmp_path).text
    assert "AP 39.90 40.40 -0.50" in text
    assert "AP50 61.25 61.00 +0.25" in text
    assert "Table VII" in text
    other = write_run(tmp_path / "c4", [*keys, "MODEL.RESNETS.DEPTH", 152], rows)
    assert "The paper reports no results" in page([other], tmp_path).text


def test_cifar_rows_are_found_by_dataset_name(tmp_path):
    keys = ["MODEL.META_ARCHITECTURE", "ImageClassifier", "MODEL.SE.ENABLED", True]
    keys += ["MODEL.BACKBONE.ARCH", "cifar_resnet110", "DATASETS.TEST", ("cifar10_test",)]
    rows = [{"iteration": 9, "classification/top1_error": 6.0}]
    assert "6.00 5.21 +0.79" in page([write_run(tmp_path / "run", keys, rows)], tmp_path).text


def test_a_subset_of_places365_is_reported_as_a_subset(tmp_path):
    keys = ["MODEL.META_ARCHITECTURE", "ImageClassifier", "MODEL.BACKBONE.ARCH", "resnet152"]
    keys += ["DATASETS.CLASSES", [str(k) for k in range(365)], "DATASETS.TEST", ("val",)]
    rows = [{"iteration": 9, "classification/top1_error": 42.0, "classification/images": 800}]
    text = page([write_run(tmp_path / "run", keys, rows)], tmp_path).text
    assert "top-1 error 42.00 41.15 +0.85" in text
    assert "paper: 36,500 images, this run: 800" in text


def test_imagenet_rows_are_found_by_class_names(tmp_path):
    keys = ["MODEL.META_ARCHITECTURE", "ImageClassifier", "MODEL.SE.ENABLED", True]
    keys += ["MODEL.BACKBONE.ARCH", "mobilenet", "DATASETS.TEST", ("val",)]
    keys += ["DATASETS.CLASSES", [f"n{number:08d}" for number in range(1000)]]
    rows = [{"iteration": 9, "classification/top1_error": 25.0, "classification/images": 50_000}]
    text = page([write_run(tmp_path / "run", keys, rows)], tmp_path).text
    assert "25.00 25.30 -0.30" in text
    assert "Table III" in text


def test_long_curves_are_thinned_and_keep_their_last_point(tmp_path):
    rows = [{"iteration": k, "total_loss": float(k)} for k in range(4321)]
    curve = page([write_run(tmp_path / "run", [], rows)], tmp_path).data["curves"]["total_loss"][
        "0"
    ]
    assert len(curve) <= 401
    assert curve[0] == [0, 0]
    assert curve[-1] == [4320, 4320]


def test_config_differences_match_the_runs(tmp_path):
    folders = [write_run(tmp_path / str(rate), ["SOLVER.BASE_LR", rate], []) for rate in (0.1, 0.2)]
    text = page(folders, tmp_path).text
    assert "SOLVER.BASE_LR 0.1 0.2" in text
    assert "SOLVER.MOMENTUM" not in text
    assert "SOLVER.BASE_LR 0.001 0.1" in page(folders[:1], tmp_path).text


def test_class_errors_and_calibration_equal_a_simple_count():
    random = np.random.RandomState(3)
    labels, best = random.randint(0, 4, (2, 500))
    labels[labels == 3] = 0
    probability = random.rand(500)
    probability[0] = 1.0
    found = Predictions(np.arange(500), labels, best, probability)
    for label, error in enumerate(found.class_errors(4)):
        rows = [k for k in range(500) if labels[k] == label]
        if not rows:
            assert np.isnan(error)
        else:
            assert error == pytest.approx(100 * sum(best[k] != label for k in rows) / len(rows))
    points, error = found.calibration()
    expected = 0.0
    for low in range(15):
        inside = [k for k in range(500) if low == min(int(probability[k] * 15), 14)]
        right = sum(bool(best[k] == labels[k]) for k in inside)
        expected += abs(right - sum(probability[k] for k in inside)) / 500
    assert error == pytest.approx(100 * expected)
    assert sum(count for _, _, count in points) == 500
    label, taken, rows = found.confused()[0]
    assert len(rows) == max(
        sum((labels == a) & (best == b)) for a in range(4) for b in range(4) if a != b
    )
    assert set(labels[rows]) == {label}
    assert set(best[rows]) == {taken}
    assert (np.diff(probability[rows]) <= 0).all()


def crowded_images(images):
    """Return random COCO annotations, including crowds, and random detections."""
    random = np.random.RandomState(5)

    def boxes(count):
        return np.concatenate(
            [random.randint(0, 40, (count, 2)), random.randint(8, 40, (count, 2))], 1
        )

    truth, found = [], []
    for image in images:
        for box in boxes(6):
            truth.append({
                "id": len(truth) + 1, "image_id": image, "category_id": random.randint(1, 3),
                "bbox": box.tolist(), "area": int(box[2] * box[3]),
                "iscrowd": int(random.rand() < 0.2),
            })  # fmt: skip
        for box in boxes(12):
            found.append({
                "image_id": image, "category_id": random.randint(1, 3), "bbox": box.tolist(),
                "score": float(random.rand()),
            })  # fmt: skip
    return truth, found


def test_matched_detections_equal_those_of_coco_evaluation():
    images = range(1, 61)
    truth, found = crowded_images(images)
    coco = COCO()
    coco.dataset = {
        "info": {}, "images": [{"id": image} for image in images], "annotations": truth,
        "categories": [{"id": 1}, {"id": 2}],
    }  # fmt: skip
    coco.createIndex()
    evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
    evaluation.params.iouThrs = np.array([0.5])
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
    evaluation.evaluate()
    expected = {}
    for part in filter(None, evaluation.evalImgs):
        ignored, hits = part["dtIgnore"][0].astype(bool), part["dtMatches"][0]
        for score, crowd, hit in zip(part["dtScores"], ignored, hits, strict=True):
            expected[part["image_id"], score] = -2 if crowd else (int(hit) or -1)
    for image in images:
        objects = sorted((o for o in truth if o["image_id"] == image), key=lambda o: o["iscrowd"])
        mine = sorted((f for f in found if f["image_id"] == image), key=lambda f: -f["score"])
        matches = match_detections(
            np.array([f["bbox"] for f in mine], float),
            np.array([f["category_id"] for f in mine]),
            {
                "boxes": np.array([o["bbox"] for o in objects], float),
                "classes": np.array([o["category_id"] for o in objects]),
                "crowd": np.array([o["iscrowd"] for o in objects], np.uint8),
            },
        )
        for detection, hit in zip(mine, matches.tolist(), strict=True):
            same = objects[hit]["id"] if hit >= 0 else hit
            assert expected[image, detection["score"]] == same
    assert {-2, -1} < set(expected.values())


# ---- diagnostics


@pytest.mark.long
def test_diagnostics_equal_the_evaluations_and_start_with_a_sentence(detection_run, tmp_path):
    folder = detection_run(tmp_path / "run", noise=0.3)
    path = folder / "inference" / "own" / "diagnostics.json"
    written = json.loads(path.read_text())["bbox"]
    found = page([folder], tmp_path)
    part = found.data["diagnostics"][0]
    assert (part["data"], part["task"]) == ("own", "boxes")
    assert part["runs"]["0"]["errors"] == written["errors"]
    assert part["runs"]["0"]["confusion"]["matrix"] == written["confusion"]["matrix"]
    assert f"Diagnostics own, boxes {written['summary']}" in found.text
    path.write_text('{"bbox": {}}')
    found = page([folder], tmp_path)
    assert found.data["diagnostics"] == []
    assert any("diagnostics.json contains no diagnostics" in text for text in found.said)


@pytest.mark.long
def test_the_confusion_matrix_has_the_most_confused_of_many_classes(detection_run, tmp_path):
    folder = detection_run(tmp_path / "run")
    path = folder / "inference" / "own" / "diagnostics.json"
    content = json.loads(path.read_text())
    matrix = np.diag(np.full(61, 9))
    matrix[50, 7], matrix[60, 3] = 4, 100  # index 60 is the background
    content["bbox"]["confusion"]["matrix"] = matrix.tolist()
    path.write_text(json.dumps(content))
    confusion = page([folder], tmp_path).data["diagnostics"][0]["runs"]["0"]["confusion"]
    assert {7, 50} < set(confusion["labels"])
    assert confusion["classes"] == 60
    kept = [*confusion["labels"], 60]
    assert confusion["matrix"] == matrix[np.ix_(kept, kept)].tolist()


def test_constant_metrics_are_listed_but_not_plotted(tmp_path):
    rows = [{"iteration": k, "lr": 0.01, "total_loss": 1 / (k + 1)} for k in range(9)]
    rows[-1] |= {"bbox/AP": 20.0}
    found = page([write_run(tmp_path / "run", [], rows)], tmp_path)
    assert list(found.data["curves"]) == ["total_loss"]
    assert "Not drawn, because they never change: lr 0.01." in found.text
    other = [{**row, "lr": 0.02} for row in rows]
    folders = [tmp_path / "run", write_run(tmp_path / "other", [], other)]
    assert set(page(folders, tmp_path).data["curves"]) == {"total_loss", "lr"}


def test_diagnostics_in_the_results_file_are_not_metrics(tmp_path):
    run = write_run(tmp_path / "run", ["DATASETS.TEST", ("own",)], [])
    results = {"bbox": {"AP": 30.0}, "diagnostics": {"bbox": {"AP": 30.0}}}
    (run / "results.json").write_text(json.dumps(results))
    os.utime(run / "metrics.json", (1, 1))
    assert load_run(run).results == {("", "bbox", "AP"): 30.0}


# ---- galleries


@pytest.mark.long
def test_the_gallery_has_the_worst_and_best_images_of_all_runs(detection_run, tmp_path):
    folders = [detection_run(tmp_path / str(noise), noise=noise) for noise in (0.05, 0.4)]
    whole = page(folders, tmp_path).data["detection"][0]
    assert whole["total"] == len(whole["images"]) == 30
    assert whole["runs"] == [0, 1]
    part = page(folders, tmp_path, images=10).data["detection"][0]

    def quality(image):
        found = []
        for run in ("0", "1"):
            shown = [box for box in image["found"][run] if box[5] >= 50]
            hits = sum(box[6] >= 0 for box in shown)
            found.append(2 * hits / (len(shown) + len(image["truth"])))
        return sum(found)

    ranks = sorted(quality(image) for image in whole["images"])
    kept = sorted(quality(image) for image in part["images"])
    # The page rounds scores to percent, so a score near the threshold may count differently.
    assert np.allclose(kept, [*ranks[:5], *ranks[-5:]], atol=0.2)
    first = part["images"][0]
    assert first["src"].startswith("data:image/jpeg;base64,")
    assert max(first["width"], first["height"]) <= 320


def test_confusions_show_the_most_confident_errors(classification_run, tmp_path):
    data = page([classification_run(tmp_path / "run")], tmp_path).data["classification"][0]
    assert {pair["count"] for pair in data["pairs"]} == {4}
    for pair in data["pairs"]:
        assert (pair["taken"] - pair["label"]) % 3 == 1
        assert pair["of"] == 12
        for place, _ in pair["examples"]:
            assert place // 12 == pair["label"]
            assert data["images"][str(place)].startswith("data:image/jpeg;base64,")
    assert data["errors"]["0"] == pytest.approx([100 / 3] * 3)


def test_gate_figures_are_shown_if_they_exist(tmp_path):
    with_gates = ["MODEL.SE.ENABLED", True]
    drawn = write_run(tmp_path / "drawn", with_gates, [])
    (drawn / "excitations").mkdir()
    Image.new("RGB", (1200, 400), "red").save(drawn / "excitations" / "blocks.png")
    found = page([drawn, write_run(tmp_path / "not", with_gates, [])], tmp_path)
    assert "drawn: blocks" in found.text
    assert f"--output {tmp_path / 'not'}/excitations" in found.text
    assert f"--output {drawn}/excitations" not in found.text
    assert sum(source.startswith("data:image/jpeg") for source in found.references) == 1
    plain = write_run(tmp_path / "plain", [], [])
    assert "Excitations" not in page([plain], tmp_path).text


@pytest.mark.long
def test_names_are_html_escaped(detection_run, classification_run, tmp_path):
    bold = os.fsdecode(b"<b>bold \xe9")  # a name that is not valid UTF-8
    folders = [
        detection_run(tmp_path / "bold", data=HOSTILE).rename(tmp_path / bold),
        classification_run(tmp_path / "run", options=["SOLVER.LR_SCHEDULER_NAME", HOSTILE]),
    ]
    output = tmp_path / "report.html"
    found = page(folders, tmp_path)
    assert HOSTILE in found.text
    assert "<b>bold ?" in found.text
    html = output.read_text()
    assert "<script>document" not in html
    assert "<b>bold" not in html
    assert found.data["detection"][0]["data"] == HOSTILE
    assert found.data["runs"][0] == bold
    # The page loads nothing from other files or servers.
    assert {name[:1] for name in found.references} == {"#", "d"}
    assert "http" not in re.sub(r"http://www.w3.org/2000/svg|http-equiv", "", html)


@pytest.mark.long
def test_a_page_without_the_data_reports_it_and_has_all_other_sections(
    detection_run, classification_run, tmp_path
):
    options = ["DATASETS.REGISTER", [["own", str(tmp_path / "gone.json"), str(tmp_path)]]]
    folders = [
        detection_run(tmp_path / "a", options=options),
        classification_run(tmp_path / "b", options=["DATASETS.CLASSES", ["x", "y", "z"]]),
    ]
    found = page(folders, tmp_path)
    assert any("images of own can't be shown" in text for text in found.said)
    assert any("images of" in text and "classes" in text for text in found.said)
    assert all(re.sub(r"\s+", " ", text) in found.text for text in found.said)
    assert "bbox AP on own" in found.text


# ---- the command


def test_the_command_prints_only_the_path_of_the_page(tmp_path, monkeypatch, capsys):
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, words)])
        runpy.run_path(str(ROOT / "tools" / "report.py"), run_name="__main__")

    run = write_run(tmp_path / "run", [], training_rows(60, 0.9))
    call(run)
    assert capsys.readouterr() == (f"{run / 'report.html'}\n", "")
    call(run, write_run(tmp_path / "other", [], []))
    assert capsys.readouterr().out == f"2 runs: {tmp_path / 'report.html'}\n"
    with pytest.raises(SystemExit, match="2"):
        call(tmp_path / "none")
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'none'} is not a folder")
