"""Fixtures that write output folders of training runs without training."""

import json
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from PIL import Image

from senet_transfer.data.detection.coco import register_datasets
from senet_transfer.data.shapes.generate import make_shapes
from senet_transfer.evaluation.coco_arrays import coco_arrays
from senet_transfer.evaluation.diagnostics import diagnose
from senet_transfer.utils.atomic_io import write_json
from senet_transfer.utils.text import folder_name
from tests.analysis.report.run_folders import HOSTILE, training_rows, write_run


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    return make_shapes(tmp_path_factory.mktemp("data") / "shapes", train=1, val=30)


@pytest.fixture(scope="session")
def detection_run(shapes):
    """Return a function that writes the output folder of a detection run.

    The detections are ground-truth boxes with added noise.
    """

    def make(folder: Path, *, noise: float = 0.1, options: list = (), data: str = "own") -> Path:
        json_file = shapes / "annotations" / "instances_val.json"
        register = [[data, str(json_file), str(shapes / "val")]]
        register_datasets(register)
        classes = list(MetadataCatalog.get(data).thing_classes)
        content = json.loads(json_file.read_text())
        random = np.random.RandomState(int(100 * noise))
        found = []
        for annotation in content["annotations"]:
            left, top, width, height = annotation["bbox"]
            shift = random.randn(4) * noise * np.array([width, height, width, height])
            if random.rand() < noise:
                continue
            found.append(
                {
                    "image_id": annotation["image_id"],
                    "category_id": 1 + random.randint(len(classes))
                    if random.rand() < noise
                    else annotation["category_id"],
                    "bbox": (np.array([left, top, width, height]) + shift).clip(1).tolist(),
                    "score": float(random.rand() ** 0.3),
                }
            )
        last = {f"bbox/AP-{name}": 50.0 - 3 * k for k, name in enumerate(classes)}
        last |= {"bbox/AP": 40 - 10 * noise, "bbox/AP50": 60.0, "bbox/APl": float("nan")}
        rows = [*training_rows(200, 0.98 - noise / 10), {"iteration": 199, **last}]
        keys = ["DATASETS.TEST", (data,), "DATASETS.REGISTER", register, *options]
        run = write_run(folder, ["DATASETS.CLASSES", classes, *keys], rows)
        results = run / "inference" / folder_name(data) / "coco_instances_results.json"
        results.parent.mkdir(parents=True)
        results.write_text(json.dumps(found))
        arrays = coco_arrays(content, found)
        write_json(results.with_name("diagnostics.json"), {"bbox": diagnose(*arrays, classes)})
        return run

    return make


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Write one image folder per class. One class name contains HTML."""
    root = tmp_path_factory.mktemp("pictures")
    random = np.random.RandomState(0)
    for name in ("aisle", "bay", HOSTILE.replace("/", "\N{FRACTION SLASH}")):
        (root / name).mkdir()
        for number in range(12):
            pixels = np.uint8(random.randint(0, 255, (3, 4, 3)))
            Image.fromarray(pixels).resize((96, 72)).save(root / name / f"{number}.jpg")
    return root


@pytest.fixture(scope="session")
def classification_run(pictures):
    """Return a function that writes the output folder of a classification run.

    Every image whose index is a multiple of ``wrong`` is misclassified.
    """

    def make(folder: Path, *, wrong: int = 3, options: list = ()) -> Path:
        classes = sorted(path.name for path in pictures.iterdir())
        labels = [label for label in range(3) for _ in range(12)]
        best = [(label + (k % wrong == 0)) % 3 for k, label in enumerate(labels)]
        error = 100 * sum(a != b for a, b in zip(labels, best, strict=True)) / 36
        last = {"classification/top1_error": error, "classification/images": 36}
        keys = ["MODEL.META_ARCHITECTURE", "ImageClassifier", "DATASETS.TEST", (str(pictures),)]
        rows = [*training_rows(100, 0.97), {"iteration": 99, **last}]
        run = write_run(folder, [*keys, "DATASETS.CLASSES", classes, *options], rows)
        place = run / "inference" / pictures.name
        place.mkdir(parents=True)
        columns = {
            "index": list(range(36)),
            "label": labels,
            "top": [[label] for label in best],
            "probability": [round(0.4 + 0.59 * (k % 7) / 6, 4) for k in range(36)],
        }
        (place / "predictions.json").write_text(json.dumps(columns))
        return run

    return make
