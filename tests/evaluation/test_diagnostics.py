"""Tests that compare diagnostics with pycocotools, tidecv and manual counts."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from senet_transfer.evaluation.coco_arrays import coco_arrays
from senet_transfer.evaluation.diagnostics import diagnose
from senet_transfer.evaluation.matching import ImageDetections, ImageObjects

CASES = json.loads(Path(__file__).with_name("fixtures").joinpath("tide.json").read_text())
CLASSES = ["a", "b", "c", "d"]
SIDE = 160


def image(objects, found, masks=False):
    """Convert an image's objects and detections from dicts to the arguments of ``diagnose``."""

    def regions(rows):
        kept = [row["region"] for row in rows]
        return kept if masks else np.array(kept, float).reshape(-1, 4)

    def values(rows, name, dtype):
        return np.array([row.get(name, 0) for row in rows], dtype)

    areas = values(objects, "area", float)
    there = ImageObjects(
        regions(objects), values(objects, "class", int), values(objects, "crowd", bool), areas
    )
    detected = ImageDetections(
        regions(found), values(found, "class", int), values(found, "score", float)
    )
    return there, detected


# ---- error types


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_error_types_and_their_costs_equal_tidecvs(case):
    images = [image(one["objects"], one["detections"], case["masks"]) for one in case["images"]]
    names = [str(label) for label in range(case["classes"])]
    found = diagnose(*zip(*images, strict=True), names)
    expected = case["expected"]
    costs = {name: error["AP50"] for name, error in found["errors"].items()}
    assert costs == pytest.approx(expected["costs"], abs=1e-6)
    counts = {name: error["count"] for name, error in found["errors"].items() if "count" in error}
    assert counts == expected["counts"]
    assert found["error_AP50"] == pytest.approx(expected["ap"], abs=1e-6)


def box(*region, label, score=1.0, crowd=False):
    return {"region": region, "class": label, "score": score, "crowd": crowd,
            "area": region[2] * region[3]}  # fmt: skip


@pytest.fixture(scope="module")
def by_hand():
    """Return the diagnostics of two images, for comparison with values derived by hand.

    In the first image, there is a true positive, a detection in a crowd, and a false positive of
    each error type. The second image contains one object and no detections.
    """
    objects = [
        box(0, 0, 10, 10, label=0),
        box(50, 50, 10, 10, label=0),
        box(20, 20, 10, 10, label=1),
        box(70, 0, 30, 30, label=0, crowd=True),
    ]
    found = [
        box(80, 80, 10, 10, label=0, score=0.95),  # background
        box(50, 50, 10, 10, label=1, score=0.92),  # classification
        box(0, 0, 10, 10, label=0, score=0.9),  # true positive
        box(0, 0, 10, 9, label=0, score=0.8),  # duplicate
        box(20, 20, 10, 4, label=1, score=0.6),  # localisation
        box(75, 5, 5, 5, label=0, score=0.4),  # on a crowd
        box(50, 50, 10, 4, label=1, score=0.3),  # both
    ]
    missed = image([box(0, 0, 10, 10, label=0)], [])
    return diagnose(*zip(image(objects, found), missed, strict=True), ["cat", "dog"])


def test_the_cost_of_each_error_equals_a_count_by_hand(by_hand):
    # There are 3 cats. Sorted by score, the cat detections are false, true, false, so the 34 of 101
    # recalls up to 1/3 have a precision of 1/2. There is 1 dog, and all dog detections are false.
    base = 100 * 34 / 101 / 2 / 2
    costs = {
        # Cat detections become false, true, true, false. Recalls up to 2/3 have a precision of 2/3.
        "classification": 100 * 67 / 101 * 2 / 3 / 2 - base,
        # Dog detections become false, true. All recalls have a precision of 1/2.
        "localisation": 100 / 2 / 2,
        "both": 0,
        "duplicate": 0,
        # Cat detections become true, false.
        "background": 100 * 34 / 101 / 2 - base,
        # Only 2 cats remain.
        "missed": 100 * 51 / 101 / 2 / 2 - base,
        "false_positive": 100 * 34 / 101 / 2 - base,
        # Only 1 cat and no dog remain. The AP of dogs is 0 because dogs are detected.
        "false_negative": 100 / 2 / 2 - base,
    }
    assert by_hand["error_AP50"] == pytest.approx(base)
    errors = by_hand["errors"]
    assert {name: error["AP50"] for name, error in errors.items()} == pytest.approx(costs)
    # The detection on the crowd matches no single object, so it is a background error without cost.
    assert [error["count"] for name, error in errors.items() if name[:5] != "false"] == [
        1, 1, 1, 1, 2, 1
    ]  # fmt: skip


def test_confusions_and_thresholds_equal_a_count_by_hand(by_hand):
    assert by_hand["best"] == pytest.approx(
        {"threshold": 0.9, "precision": 1 / 3, "recall": 1 / 4, "F1": 2 / 7}
    )
    cat, dog = by_hand["classes"]
    assert (cat["threshold"], cat["precision"]) == (0.9, 0.5)
    assert (cat["recall"], cat["F1"]) == pytest.approx((1 / 3, 2 / 5))
    assert (dog["precision"], dog["recall"], dog["F1"]) == (0, 0, 0)
    assert math.isnan(dog["threshold"])
    assert (cat["objects"], dog["objects"]) == (3, 1)
    assert by_hand["confusion"] == {"score": 0.9, "matrix": [[1, 1, 1], [0, 0, 1], [1, 0, 0]]}


def test_groups_by_count_and_size_equal_a_count_by_hand(by_hand):
    one, more = by_hand["by_count"]
    assert (one["from"], one["to"], one["images"], one["objects"]) == (1, 1, 1, 1)
    assert (more["from"], more["to"], more["images"], more["objects"]) == (2, 4, 1, 3)
    assert one["AP50"] == 0
    assert more["AP50"] == pytest.approx(100 * 51 / 101 / 2 / 2)
    assert [row["objects"] for row in by_hand["by_size"]] == [4, 0, 0]
    assert by_hand["by_size"][0]["AP"] == by_hand["AP"]
    assert math.isnan(by_hand["by_size"][1]["AP"])


# ---- the COCO metrics


def coco_data(seed, masks):
    """Return ground truth and results with crowds, empty images, an empty class and tied scores."""
    draw = np.random.default_rng(seed)

    def region():
        most = draw.choice([30, 60, 120])
        return [round(float(v), 1) for v in (*draw.uniform(0, 90, 2), *draw.uniform(3, most, 2))]

    def segmentation(where):
        left, top, right, bottom = *where[:2], where[0] + where[2], where[1] + where[3]
        return [[left, top, right, top, right, bottom, left, bottom]]

    annotations, results = [], []
    for number in range(1, 31):
        for _ in range(draw.integers(0, 12) if number % 6 else 0):
            where, label = region(), int(draw.integers(1, 4))
            crowd = int(draw.random() < 0.1)
            shape = segmentation(where)
            if crowd:
                counts = [5000, 4000, SIDE * SIDE - 9000]
                shape = {"size": [SIDE, SIDE], "counts": counts}
            annotations.append({
                "id": len(annotations) + 1, "image_id": number, "category_id": label,
                "bbox": where, "area": where[2] * where[3] * float(draw.uniform(0.5, 1)),
                "iscrowd": crowd, "segmentation": shape,
            })  # fmt: skip
            for _ in range(draw.integers(0, 3)):
                moved = np.add(where, draw.normal(0, draw.choice([1, 6]), 4)).clip(1)
                same = draw.random() < 0.8
                score = int(draw.integers(20, 60))
                results.append((number, moved, label if same else int(draw.integers(1, 5)), score))
        invented = draw.integers(0, 250 if number % 15 == 0 else 3)
        results += [
            (number, region(), int(draw.integers(1, 5)), int(draw.integers(1, 40)))
            for _ in range(invented)
        ]
    rows = [
        {"image_id": number, "category_id": label, "bbox": [float(v) for v in where],
         "score": score / 60} for number, where, label, score in results
    ]  # fmt: skip
    sizes = {"height": SIDE, "width": SIDE}
    truth = {
        "info": {}, "annotations": annotations,
        "images": [{"id": number, **sizes} for number in range(1, 31)],
        "categories": [{"id": number, "name": name} for number, name in enumerate(CLASSES, 1)],
    }  # fmt: skip
    if masks:
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        for row in rows:
            shape = {"image_id": row["image_id"], "segmentation": segmentation(row["bbox"])}
            row["segmentation"] = coco.annToRLE(shape)
    return truth, rows


def coco_evaluation(truth, rows, kind, images=None):
    coco = COCO()
    coco.dataset = truth
    coco.createIndex()
    results = [{key: row[key] for key in row if key != "bbox" or kind == "bbox"} for row in rows]
    evaluation = COCOeval(coco, coco.loadRes(results), kind)
    if images is not None:
        evaluation.params.imgIds = images
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


@pytest.fixture(scope="module", params=["bbox", "segm"])
def compared(request):
    """Return ground truth and results, pycocotools' evaluation of them, and their diagnostics."""
    truth, rows = coco_data(3, masks=request.param == "segm")
    arrays = coco_arrays(truth, rows, masks=request.param == "segm")
    data = truth, rows, request.param
    return data, coco_evaluation(*data), diagnose(*arrays, CLASSES)


def percent(value):
    return 100 * value if value >= 0 else math.nan


def mean(precision):
    known = precision[precision > -1]
    return 100 * known.mean() if known.size else math.nan


def same(value):
    return pytest.approx(value, abs=1e-9, nan_ok=True)


def test_the_ap_of_all_classes_and_sizes_equals_pycocotools(compared):
    _, evaluation, found = compared
    stats = [percent(value) for value in evaluation.stats]
    assert [found["AP"], found["AP50"], found["AP75"]] == same(stats[:3])
    assert [row["AP"] for row in found["by_size"]] == same(stats[3:6])
    precision = evaluation.eval["precision"]  # (T, R, K, A, M)
    for place, row in enumerate(found["by_size"], 1):
        assert row["AP50"] == same(mean(precision[0, :, :, place, 2]))
    for label, row in enumerate(found["classes"]):
        assert row["AP"] == same(mean(precision[:, :, label, 0, 2]))
        assert row["AP75"] == same(mean(precision[5, :, label, 0, 2]))
    assert 10 < found["AP"] < 90


def test_precision_recall_curves_equal_pycocotools(compared):
    _, evaluation, found = compared
    precision = evaluation.eval["precision"][:, :, :, 0, 2]
    for label, row in enumerate(found["classes"]):
        curve = precision[0, :, label]
        expected = curve if curve[0] > -1 else []
        assert row["curve"] == pytest.approx(expected, abs=6e-5)
    for name, place in (("0.5", 0), ("0.75", 5), ("0.9", 8)):
        # The last class has no objects.
        expected = precision[place, :, :3].mean(1)
        assert found["curves"][name] == pytest.approx(expected, abs=6e-5)


def test_the_ap_by_count_equals_pycocotools_on_these_images(compared):
    (truth, *rest), _, found = compared
    count = {one["id"]: 0 for one in truth["images"]}
    for row in truth["annotations"]:
        count[row["image_id"]] += not row["iscrowd"]
    assert [row["from"] for row in found["by_count"]] == [1, 2, 5, 10]
    for row in found["by_count"]:
        inside = [key for key, n in count.items() if row["from"] <= n <= (row["to"] or n)]
        stats = coco_evaluation(truth, *rest, images=inside).stats
        assert (row["images"], row["objects"]) == (len(inside), sum(count[key] for key in inside))
        assert [row["AP"], row["AP50"], row["AP75"]] == same([percent(v) for v in stats[:3]])


def test_thresholds_and_confusions_follow_from_pycocotools_matches(compared):
    (truth, *_), evaluation, found = compared
    # For each class, list the score of each counted detection, and whether it is a true positive.
    points = {label: [] for label in range(len(CLASSES))}
    for part in evaluation.evalImgs:
        if part and part["aRng"] == [0, 1e10]:
            rows = zip(part["dtScores"], part["dtMatches"][0], part["dtIgnore"][0], strict=True)
            points[part["category_id"] - 1] += [(s, m > 0) for s, m, i in rows if not i]
    objects = [
        sum(row["category_id"] == label and not row["iscrowd"] for row in truth["annotations"])
        for label in range(1, 5)
    ]

    def f1(label, threshold):
        kept = [hit for score, hit in points[label] if score >= threshold]
        return 2 * sum(kept) / (len(kept) + objects[label])

    for label, row in enumerate(found["classes"][:3]):
        best = max(f1(label, score) for score, _ in points[label])
        assert row["F1"] == pytest.approx(best)
        assert f1(label, row["threshold"]) == pytest.approx(best)
        kept = [hit for score, hit in points[label] if score >= row["threshold"]]
        assert row["precision"] == pytest.approx(sum(kept) / len(kept))
        assert row["recall"] == pytest.approx(sum(kept) / objects[label])
    assert math.isnan(found["classes"][3]["F1"])

    score, matrix = found["confusion"]["score"], np.array(found["confusion"]["matrix"])
    kept = [[hit for value, hit in points[label] if value >= score] for label in points]
    assert matrix.diagonal()[:4].tolist() == [sum(hits) for hits in kept]
    assert matrix[:, :4].sum(0).tolist() == [len(hits) for hits in kept]
    assert matrix[:4].sum(1).tolist() == objects
    hits, shown = sum(map(sum, kept)), sum(map(len, kept))
    assert found["best"]["precision"] == pytest.approx(hits / shown)
    assert found["best"]["recall"] == pytest.approx(hits / sum(objects))
    assert np.tril(matrix[:4, :4], -1).any()
    assert matrix[4, :4].all()


# ---- edge cases and the summary


def test_data_without_objects_or_detections_has_no_numbers_and_no_errors():
    one = [box(0, 0, 10, 10, label=0)]
    for objects, found, text in (
        ([], [], "contains no objects"),
        ([], one, "contains no objects"),
        (one, [], "None of the 1 objects is detected"),
    ):
        result = diagnose(*zip(image(objects, found), strict=True), ["a", "b"])
        assert text in result["summary"]
        assert math.isnan(result["best"]["threshold"])
        matrix = np.array(result["confusion"]["matrix"])
        assert matrix.sum() == len(objects) + len(found)
    assert result["AP"] == 0
    assert result["errors"]["missed"]["count"] == 1
    assert diagnose([], [], ["a"])["images"] == 0


def shifted(shift, label=0):
    return box(shift, 0, 20, 20, label=label, score=0.9)


@pytest.mark.parametrize(
    ("found", "text"),
    [
        ([shifted(4)], "Most of the lost AP is due to localisation errors: AP50 100.0, AP75 0.0."),
        ([shifted(14)], "Most of the lost AP is due to localisation errors: AP50 0.0, AP75 0.0."),
        ([shifted(0, label=1)], "Most of the lost AP is due to classification errors: they cost"),
        ([shifted(0)], "There is little to gain: AP 100.0"),
        ([box(60, 60, 9, 9, label=0, score=0.95), shifted(0)],
         "Most of the lost AP is due to detections of background: they cost 50.0 AP50"),
    ],
)  # fmt: skip
def test_the_summary_names_the_largest_loss(found, text):
    truth = [box(0, 0, 20, 20, label=0)]
    assert diagnose(*zip(image(truth, found), strict=True), ["a", "b"])["summary"].startswith(text)


def test_the_summary_names_the_most_confused_classes():
    truth = [box(30 * place, 0, 20, 20, label=0) for place in range(4)]
    found = [{**row, "class": place // 2} for place, row in enumerate(truth)]
    text = diagnose(*zip(image(truth, found), strict=True), ["a", "b"])["summary"]
    assert "2 of 4 objects of the class a are detected as b." in text


def test_the_summary_compares_sizes_of_which_there_are_many_objects():
    small = [box(20 * place, 0, 10, 10, label=0) for place in range(20)]
    large = [box(200 * place, 50, 100, 100, label=0) for place in range(20)]

    def text(*found):
        data = image([*small, *large], [row for rows in found for row in rows])
        return diagnose(*zip(data, strict=True), ["a"])["summary"]

    assert text(small[:5], large).endswith(
        "The AP of small objects is 25.7, while that of large objects is 100.0."
    )
    assert "large objects" not in text(small[:19], large)
