"""Tests that metrics don't depend on ids, including ids that pycocotools can't handle."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from pycocotools import mask as mask_util

from senet_transfer.evaluation import coco as coco_metrics
from senet_transfer.evaluation.coco import FastCOCOEvaluator

SIDE = 48
SETS = 200

# Ranges from which ids are drawn. Except in the first two, different ids may become equal when they
# are converted to doubles.
RANGES = (
    (-4, 4),
    (-(2**40), 2**40),
    (2**53 - 4, 2**53 + 8),
    (20230105121530001, 20230105121530021),
    (2**62, 2**66),
    (-(2**130), 2**130),
)


class Drawn:
    """Random predictions, and random ground truth in two versions that differ only in their ids.

    In ``plain``, the ids are 1 to N; in ``hostile``, they are unusual, such as negative or huge.
    """

    def __init__(self, seed: int):
        self.draw = np.random.default_rng(seed)
        self.ids = random.Random(seed)
        images, classes = self.ids.randint(1, 4), self.ids.randint(1, 3)
        annotations = []
        for image in range(1, images + 1):
            for _ in range(self.ids.randint(int(image == 1), 5)):
                annotations.append(self._annotation(len(annotations) + 1, image, classes))
        sizes = {"height": SIDE, "width": SIDE}
        self.plain = {
            "info": {},
            "images": [{"id": n, "file_name": f"{n}.jpg", **sizes} for n in range(1, images + 1)],
            "annotations": annotations,
            "categories": [{"id": n, "name": f"class {n}"} for n in range(1, classes + 1)],
        }
        self.hostile, self.image_ids = self._hostile()
        self.outputs = [self._output(image, classes) for image in range(1, images + 1)]

    def _annotation(self, number: int, image: int, classes: int) -> dict:
        mask = self._mask()
        rle = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
        x, y, w, h = (float(value) for value in mask_util.toBbox(rle))
        if self.ids.random() < 0.4:
            segmentation = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        elif self.ids.random() < 0.5:
            segmentation = {"size": rle["size"], "counts": rle["counts"].decode()}
        else:
            flat = mask.flatten(order="F")
            changes = np.flatnonzero(np.diff(np.concatenate([[0], flat]))).tolist()
            runs = np.diff([0, *changes, flat.size]).tolist()
            segmentation = {"size": rle["size"], "counts": runs}
        points = self.draw.integers(0, SIDE, (17, 3))
        points[:, 2] = self.draw.integers(0, 3, 17) * self.ids.choice((0, 1, 1, 1))
        return {
            "id": number,
            "image_id": image,
            "category_id": self.ids.randint(1, classes),
            "bbox": [x, y, w, h],
            "area": float(mask.sum()) * self.ids.choice((1.0, 1.0, 30.0)),
            "iscrowd": int(self.ids.random() < 0.1),
            "segmentation": segmentation,
            "keypoints": points.flatten().tolist(),
            "num_keypoints": int((points[:, 2] > 0).sum()),
        }

    def _mask(self) -> np.ndarray:
        (x, y), (w, h) = self.draw.integers(0, SIDE - 12, 2), self.draw.integers(4, 12, 2)
        mask = np.zeros((SIDE, SIDE), bool)
        mask[y : y + h, x : x + w] = True
        return mask

    def _hostile(self) -> tuple[dict, list[int]]:
        data = copy.deepcopy(self.plain)
        images = self._ids(len(data["images"]))
        categories = self._ids(len(data["categories"]))
        numbers = self._ids(len(data["annotations"]))
        self.ids.shuffle(numbers)
        for item in data["annotations"]:
            item["id"] = numbers[item["id"] - 1]
            item["image_id"] = images[item["image_id"] - 1]
            item["category_id"] = categories[item["category_id"] - 1]
            # In tables exported with missing values, integers become floats.
            if abs(item["image_id"]) < 2**53 and self.ids.random() < 0.2:
                item["image_id"] = float(item["image_id"])
        for item, number in zip(data["images"], images, strict=True):
            item["id"] = number
        for item, number in zip(data["categories"], categories, strict=True):
            item["id"] = number
        self.ids.shuffle(data["images"])
        self.ids.shuffle(data["categories"])
        return data, images

    def _ids(self, count: int) -> list[int]:
        first, last = self.ids.choice(RANGES)
        drawn: set[int] = set()
        while len(drawn) < count:
            drawn.add(self.ids.randint(first, last + count))
        return sorted(drawn)

    def _output(self, image: int, classes: int) -> Instances:
        """Return displaced detections and false positives with tied scores."""
        own = [item for item in self.plain["annotations"] if item["image_id"] == image]
        own = [item for item in own if self.ids.random() < 0.9]
        count = len(own) + self.ids.randint(0, 3)
        found = Instances((SIDE, SIDE))
        masks = np.stack([self._mask() for _ in range(count + 1)])[:count]
        for index, item in enumerate(own):
            x, y, w, h = (int(value) for value in item["bbox"])
            left = max(x + self.ids.randint(-1, 1), 0)
            masks[index] = False
            masks[index, y : y + h, left : left + w] = True
        boxes = [mask_util.toBbox(mask_util.encode(np.asfortranarray(m, np.uint8))) for m in masks]
        corners = np.array(boxes, np.float32).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        corners += self.draw.normal(0, 0.5, corners.shape)
        points = self.draw.uniform(0, SIDE, (count, 17, 3))
        for index, item in enumerate(own):
            exact = np.array(item["keypoints"]).reshape(17, 3)
            points[index] = exact + self.draw.normal(0, 1, (17, 3))
        classes_found = [item["category_id"] - 1 for item in own]
        classes_found += [self.ids.randrange(classes) for _ in range(count - len(own))]
        found.pred_boxes = Boxes(torch.from_numpy(corners))
        found.scores = torch.from_numpy(self.draw.integers(1, 6, count) / 6)
        found.pred_classes = torch.tensor(classes_found, dtype=torch.int64)
        found.pred_masks = torch.from_numpy(masks)
        found.pred_keypoints = torch.from_numpy(points.astype(np.float32))
        return found


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    """Return a function that evaluates predictions and returns all COCO metrics."""
    stats: list[list[str]] = []
    derive = COCOEvaluator._derive_coco_results

    def keep(self, coco_eval, *arguments, **options):
        stats.append([] if coco_eval is None else [repr(float(n)) for n in coco_eval.stats[:12]])
        return derive(self, coco_eval, *arguments, **options)

    monkeypatch.setattr(COCOEvaluator, "_derive_coco_results", keep)

    def evaluate(
        kind: Callable[..., COCOEvaluator],
        data: dict,
        outputs: dict,
        output_dir: Path | None = None,
    ) -> tuple:
        file = tmp_path / "truth.json"
        file.write_text(json.dumps(data))
        ids = sorted(category["id"] for category in data["categories"])
        by_id = {category["id"]: category["name"] for category in data["categories"]}
        metadata = MetadataCatalog.get("ids_test")
        metadata.json_file = str(file)
        metadata.thing_classes = [by_id[number] for number in ids]
        metadata.thing_dataset_id_to_contiguous_id = {n: i for i, n in enumerate(ids)}
        stats.clear()
        try:
            points = max(len(item.get("keypoints", ())) // 3 for item in data["annotations"])
            # The default sigmas are those of COCO's 17 keypoints.
            options: dict = {} if points in (0, 17) else {"kpt_oks_sigmas": [0.05] * points}
            if kind is COCOEvaluator:
                options["use_fast_impl"] = False
            evaluator = kind("ids_test", output_dir=output_dir and str(output_dir), **options)
            evaluator.reset()
            for image, output in outputs.items():
                evaluator.process([{"image_id": image}], [{"instances": copy.deepcopy(output)}])
            return repr(evaluator.evaluate()), list(stats)
        finally:
            MetadataCatalog.remove("ids_test")

    return evaluate


def compared(drawn: Drawn, evaluated) -> int:
    """Compare all metrics with pycocotools; return the number of values other than -1, 0 and 1."""
    plain = dict(enumerate(drawn.outputs, 1))
    hostile = dict(zip(drawn.image_ids, drawn.outputs, strict=True))
    expected = evaluated(COCOEvaluator, drawn.plain, plain)
    assert evaluated(FastCOCOEvaluator, drawn.hostile, hostile) == expected
    return nontrivial(expected)


def nontrivial(expected: tuple) -> int:
    return sum(number not in ("-1.0", "0.0", "1.0") for task in expected[1] for number in task)


@pytest.mark.long
def test_200_data_sets_with_unusual_ids_equal_pycocotools_on_ids_from_1(evaluated):
    counts = [compared(Drawn(seed), evaluated) for seed in range(SETS)]
    # There are 12 metrics for boxes, 12 for masks and 10 for keypoints.
    assert sum(counts) > 10 * SETS


@pytest.mark.long
def test_pycocotools_also_gets_ids_from_1(evaluated, monkeypatch):
    monkeypatch.setattr(coco_metrics, "faster_coco_eval", None)
    assert sum(compared(Drawn(seed), evaluated) for seed in range(4))


def test_predictions_are_written_with_the_ids_of_the_file(evaluated, tmp_path):
    drawn = Drawn(3)
    evaluated(
        FastCOCOEvaluator,
        drawn.hostile,
        dict(zip(drawn.image_ids, drawn.outputs, strict=True)),
        tmp_path,
    )
    written = json.loads((tmp_path / "coco_instances_results.json").read_text())
    ids = sorted(category["id"] for category in drawn.hostile["categories"])
    assert [(row["image_id"], row["category_id"]) for row in written] == [
        (image, ids[label])
        for image, output in zip(drawn.image_ids, drawn.outputs, strict=True)
        for label in output.pred_classes.tolist()
    ]
    assert all(set(row) >= {"bbox", "score", "segmentation", "keypoints"} for row in written)


def test_text_as_ids_gives_the_same_metrics(evaluated):
    drawn = Drawn(5)
    data = copy.deepcopy(drawn.plain)
    for section in ("images", "annotations", "categories"):
        for item in data[section]:
            for key in {"id", "image_id", "category_id"} & set(item):
                item[key] = f"{key[:3]}-{item[key]}"
    for item in data["images"]:
        item["id"] = f"ima-{item['id'].rpartition('-')[2]}"
    for item in data["categories"]:
        item["id"] = f"cat-{item['id'].rpartition('-')[2]}"
    hostile = {f"ima-{n}": output for n, output in enumerate(drawn.outputs, 1)}
    expected = evaluated(COCOEvaluator, drawn.plain, dict(enumerate(drawn.outputs, 1)))
    assert evaluated(FastCOCOEvaluator, data, hostile) == expected


def from_1(data: dict) -> dict:
    """Return a copy of ground truth whose ids are renumbered from 1 in ascending order."""
    data = copy.deepcopy(data)
    images = {key: n for n, key in enumerate(sorted(item["id"] for item in data["images"]), 1)}
    classes = {key: n for n, key in enumerate(sorted(c["id"] for c in data["categories"]), 1)}
    for section, numbers in (("images", images), ("categories", classes)):
        for item in data[section]:
            item["id"] = numbers[item["id"]]
    for number, item in enumerate(data["annotations"], 1):
        item["id"] = number
        item["image_id"] = images[item["image_id"]]
        item["category_id"] = classes[item["category_id"]]
    return data


def displaced(data: dict) -> dict:
    """Return detections with typical errors, keyed by image id.

    The boxes are shifted at random. Some objects have no detection, and some detections have a
    random class.
    """
    draw = np.random.default_rng(0)
    classes = {key: n for n, key in enumerate(sorted(item["id"] for item in data["categories"]))}
    has_masks = any(item.get("segmentation") for item in data["annotations"])
    pointed = any("keypoints" in item for item in data["annotations"])
    outputs = {}
    for image in sorted(data["images"], key=lambda item: item["id"]):
        side = (image["height"], image["width"])
        own = [item for item in data["annotations"] if item["image_id"] == image["id"]]
        own = [item for item in own if draw.random() < 0.9]
        boxes = np.array([item["bbox"] for item in own], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2] + 1
        boxes += draw.normal(0, 2, boxes.shape)
        labels = [classes[item["category_id"]] for item in own]
        labels = [n if draw.random() < 0.9 else draw.integers(len(classes)) for n in labels]
        found = Instances(side)
        found.pred_boxes = Boxes(torch.from_numpy(boxes))
        found.scores = torch.from_numpy(draw.integers(1, 10, len(own)) / 10)
        found.pred_classes = torch.tensor(np.array(labels, np.int64))
        if has_masks:
            found.pred_masks = filled(boxes, side)
        if pointed:
            count = len(data["annotations"][0]["keypoints"]) // 3
            points = np.array([item["keypoints"] for item in own], np.float32)
            points = points.reshape(-1, count, 3)
            found.pred_keypoints = torch.from_numpy(points + draw.normal(0, 3, points.shape))
        outputs[image["id"]] = found
    return outputs


def filled(boxes: np.ndarray, side: tuple[int, int]) -> torch.Tensor:
    """Return the masks ``(N, H, W)`` of filled boxes."""
    x1, y1, x2, y2 = torch.from_numpy(boxes)[:, :, None].unbind(1)
    lines, columns = torch.arange(side[0]), torch.arange(side[1])
    inside = (lines >= y1) & (lines < y2), (columns >= x1) & (columns < x2)
    return inside[0][:, :, None] & inside[1][:, None, :]


@pytest.mark.long
def test_reported_files_equal_pycocotools_on_ids_from_1(shared_data, evaluated):
    folder = shared_data.parent / "cases" / "detection"
    files = [*folder.glob("ev*/val.json"), folder / "val_uuid_ann" / "val.json"]
    assert len(files) == 29
    for file in files:
        data = json.loads(file.read_text())
        outputs = displaced(data)
        expected = evaluated(COCOEvaluator, from_1(data), dict(enumerate(outputs.values(), 1)))
        assert evaluated(FastCOCOEvaluator, data, outputs) == expected, file.parent.name
        assert nontrivial(expected) > 4 or file.parent.name == "ev_area_zero", file.parent.name


@pytest.mark.long
def test_coco_images_with_unusual_ids_equal_pycocotools(shared_data, evaluated):
    file = shared_data / "coco128" / "annotations" / "instances_train2017.json"
    data = json.loads(file.read_text())
    outputs = displaced(data)
    expected = evaluated(COCOEvaluator, data, outputs)
    assert evaluated(FastCOCOEvaluator, data, outputs) == expected
    hostile = copy.deepcopy(data)
    for item in (*hostile["images"], *hostile["annotations"], *hostile["categories"]):
        item["id"] = 2**70 + item["id"]
    for item in hostile["annotations"]:
        item["image_id"] += 2**70
        item["category_id"] += 2**70
    moved = {2**70 + image: output for image, output in outputs.items()}
    assert evaluated(FastCOCOEvaluator, hostile, moved) == expected
