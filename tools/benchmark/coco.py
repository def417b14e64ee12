"""Benchmark ``coco-eval``: COCO metrics computed by faster-coco-eval and by pycocotools."""

import contextlib
import copy
import io
from collections.abc import Callable, Iterator
from functools import partial

import faster_coco_eval
import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from benchmark.compare import compare
from benchmark.networks import Options
from benchmark.report import Row
from senet_transfer.evaluation.coco import no_garbage_collection

CLASSES, DETECTIONS = 80, 100


def draw_truth_and_detections(images: int) -> tuple[dict, list[dict]]:
    """Return random ground truth and detections for the given number of images.

    Each image has about seven objects, as in COCO, and 100 detections. Half of the detections are
    ground-truth boxes with added noise.
    """
    draw = np.random.default_rng(0)
    annotations: list[dict] = []
    detections: list[dict] = []
    for image in range(1, images + 1):
        count = draw.poisson(7)
        objects = np.concatenate(
            [draw.uniform(0, 400, (count, 2)), draw.uniform(5, 200, (count, 2))], 1
        )
        kinds = draw.integers(1, CLASSES + 1, count)
        for box, kind in zip(objects.tolist(), kinds.tolist(), strict=True):
            area = box[2] * box[3]
            row = {"id": len(annotations) + 1, "image_id": image, "category_id": kind}
            annotations.append({**row, "bbox": box, "area": area, "iscrowd": 0})
        invented = np.concatenate(
            [draw.uniform(0, 400, (DETECTIONS, 2)), draw.uniform(5, 200, (DETECTIONS, 2))], 1
        )
        labels = draw.integers(1, CLASSES + 1, DETECTIONS)
        if count:
            near = draw.integers(0, count, DETECTIONS // 2)
            invented[: len(near)] = objects[near] + draw.normal(0, 8, (len(near), 4))
            labels[: len(near)] = kinds[near]
        invented[:, 2:] = np.maximum(invented[:, 2:], 1)
        scores = draw.random(DETECTIONS)
        for box, kind, score in zip(
            invented.tolist(), labels.tolist(), scores.tolist(), strict=True
        ):
            detections.append({"image_id": image, "category_id": kind, "bbox": box, "score": score})
    truth = {
        "images": [{"id": image} for image in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": kind, "name": str(kind)} for kind in range(1, CLASSES + 1)],
        "info": {},
    }
    return truth, detections


def _evaluation(truth: dict, detections: list[dict], fast: bool) -> Callable[[], np.ndarray]:
    coco, metrics = (COCO, COCOeval)
    if fast:
        coco, metrics = faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster
    objects = coco()
    objects.dataset = truth
    with contextlib.redirect_stdout(io.StringIO()):
        objects.createIndex()

    def evaluate() -> np.ndarray:
        spared = no_garbage_collection() if fast else contextlib.nullcontext()
        with contextlib.redirect_stdout(io.StringIO()), spared:
            found = metrics(objects, objects.loadRes(detections), "bbox")
            found.evaluate()
            found.accumulate()
            found.summarize()
        return np.array(found.stats[:12])

    return evaluate


def _keep(results: dict[str, np.ndarray], name: str, way: Callable[[], np.ndarray]) -> None:
    results[name] = way()


def measure_coco(options: Options) -> Iterator[Row]:
    """Time the COCO metrics with pycocotools and faster-coco-eval.

    The result also contains the largest difference between the metrics of the two packages.
    """
    for images, rounds, warm_up in ((500, 6, 0), (5000, 1, 0)):
        truth, detections = draw_truth_and_detections(images)
        ways = {
            "pycocotools": _evaluation(copy.deepcopy(truth), copy.deepcopy(detections), fast=False),
            "faster-coco-eval": _evaluation(truth, detections, fast=True),
        }
        results: dict[str, np.ndarray] = {}
        found = compare(
            f"COCO metrics, {images} images x {DETECTIONS} detections",
            {name: partial(_keep, results, name, way) for name, way in ways.items()},
            baseline="pycocotools",
            # With 5000 images, as in COCO val2017, one round takes a minute with pycocotools.
            seconds=options.seconds,
            min_rounds=rounds,
            warm_up=warm_up,
            pairs=[("pycocotools", "faster-coco-eval")],
        )
        difference = np.abs(results["pycocotools"] - results["faster-coco-eval"]).max()
        found.notes["largest_difference_of_the_twelve_numbers"] = float(difference)
        yield found
