"""Synthetic images of rectangles, and functions that write or register them as datasets."""

import json
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_pascal_voc
from detectron2.data.datasets.lvis import load_lvis_json
from detectron2.structures import BoxMode

CLASSES = ["red", "blue"]
KEYPOINTS = ["left_end", "right_end", "middle"]
WIDTH, HEIGHT = 96, 64


@dataclass(frozen=True)
class Drawn:
    """Synthetic image file and the bounding boxes of its objects.

    Attributes:
        path: Path of the image file.
        boxes: Bounding boxes (x0, y0, x1, y1) in pixel coordinates.
        classes: Class index of each box.
    """

    path: Path
    boxes: list[tuple[int, int, int, int]]
    classes: list[int]


def draw(folder: Path, count: int = 4) -> list[Drawn]:
    """Write synthetic images with two non-overlapping rectangles each."""
    folder.mkdir()
    found = []
    for index in range(count):
        image = np.full((HEIGHT, WIDTH, 3), 200, np.uint8)
        boxes = [(4 + index, 8, 40, 50), (50, 10 + index, 90, 44)]
        classes = [index % 2, 1]
        for (x0, y0, x1, y1), label in zip(boxes, classes, strict=True):
            image[y0:y1, x0:x1] = ((40, 40, 230), (230, 40, 40))[label]
        path = folder / f"{index + 1:06d}.jpg"
        cv2.imwrite(str(path), image)
        found.append(Drawn(path, boxes, classes))
    return found


def forget(name: str) -> None:
    """Remove a dataset from Detectron2's catalogs."""
    DatasetCatalog.pop(name, None)
    MetadataCatalog.pop(name, None)


def _register(name: str, records: list[dict], **metadata) -> None:
    forget(name)
    DatasetCatalog.register(name, lambda: json.loads(json.dumps(records)))
    MetadataCatalog.get(name).set(**metadata)


def _record(index: int, drawn: Drawn, **fields) -> dict:
    record = {"file_name": str(drawn.path), "image_id": index, "height": HEIGHT, "width": WIDTH}
    return {**record, **fields}


def register_labels(name: str, images: list[Drawn], *, objects: bool = False) -> None:
    """Register a semantic segmentation dataset.

    In its label images, 0 is background, 1 and 2 are classes, and 255 marks ignored pixels. If
    ``objects`` is True, the dataset also contains bounding boxes and polygons.
    """
    records = []
    for index, drawn in enumerate(images):
        labels = np.zeros((HEIGHT, WIDTH), np.uint8)
        annotations = []
        for (x0, y0, x1, y1), label in zip(drawn.boxes, drawn.classes, strict=True):
            labels[y0:y1, x0:x1] = label + 1
            segmentation = [[x0, y0, x1, y0, x1, y1, x0, y1]]
            box = {"bbox": [x0, y0, x1, y1], "bbox_mode": int(BoxMode.XYXY_ABS)}
            annotations.append({**box, "category_id": label, "segmentation": segmentation})
        labels[:2] = 255
        path = drawn.path.with_name(f"{drawn.path.stem}_labels.png")
        cv2.imwrite(str(path), labels)
        record = {"file_name": str(drawn.path), "sem_seg_file_name": str(path)}
        if objects:
            record = _record(index, drawn, **record, annotations=annotations)
        records.append(record)
    things = {"thing_classes": CLASSES} if objects else {}
    kind = "coco" if objects else "sem_seg"
    stuff = ["background", *CLASSES]
    _register(name, records, stuff_classes=stuff, ignore_label=255, evaluator_type=kind, **things)


def register_rotated(name: str, images: list[Drawn]) -> None:
    """Register a dataset of rotated boxes, which have an angle of 0 or 180 degrees."""
    records = []
    for index, drawn in enumerate(images):
        annotations = []
        for (x0, y0, x1, y1), label in zip(drawn.boxes, drawn.classes, strict=True):
            box = [(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0, 180 * label]
            mode = int(BoxMode.XYWHA_ABS)
            annotations.append({"bbox": box, "bbox_mode": mode, "category_id": label})
        records.append(_record(index, drawn, annotations=annotations))
    _register(name, records, thing_classes=CLASSES)


def coco_file(path: Path, images: list[Drawn]) -> Path:
    """Write a COCO annotation file with boxes, polygons, keypoints and LVIS's additional fields."""
    categories = [
        {"id": i + 1, "name": name, "keypoints": KEYPOINTS, "synset": name, "frequency": "f"}
        for i, name in enumerate(CLASSES)
    ]
    data: dict = {"images": [], "annotations": [], "categories": categories}
    for index, drawn in enumerate(images, start=1):
        record = _record(
            index, drawn, id=index, neg_category_ids=[], not_exhaustive_category_ids=[]
        )
        url = f"http://host/{drawn.path.parent.name}/{drawn.path.name}"
        data["images"].append({**record, "file_name": drawn.path.name, "coco_url": url})
        for (x0, y0, x1, y1), label in zip(drawn.boxes, drawn.classes, strict=True):
            middle = (y0 + y1) // 2
            ends = [x0, middle, 2, x1 - 1, middle, 2, (x0 + x1) // 2, middle, 2]
            data["annotations"].append(
                {
                    "id": len(data["annotations"]) + 1,
                    "image_id": index,
                    "category_id": label + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                    "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
                    "keypoints": ends,
                    "num_keypoints": 3,
                }
            )
    path.write_text(json.dumps(data))
    return path


def register_lvis(name: str, images: list[Drawn]) -> None:
    """Write an annotation file and register it as an LVIS dataset."""
    folder = images[0].path.parent
    json_file = coco_file(folder.with_name(f"{folder.name}_lvis.json"), images)
    forget(name)
    # Omit the name of the dataset, because the loader would use it to select LVIS's own classes.
    DatasetCatalog.register(name, lambda: load_lvis_json(str(json_file), f"{folder.parent}/"))
    kind = {"evaluator_type": "lvis", "json_file": str(json_file)}
    MetadataCatalog.get(name).set(thing_classes=CLASSES, **kind)


def register_voc(name: str, images: list[Drawn]) -> None:
    """Write the images and boxes in Pascal VOC format and register them as a dataset."""
    root = images[0].path.parent.with_name("voc")
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / part).mkdir(parents=True, exist_ok=True)
    (root / "ImageSets/Main/all.txt").write_text("".join(f"{d.path.stem}\n" for d in images))
    for drawn in images:
        (root / "JPEGImages" / drawn.path.name).write_bytes(drawn.path.read_bytes())
        objects = "".join(
            # VOC counts pixels from 1 and includes the last pixel in the box.
            f"<object><name>{CLASSES[label]}</name><difficult>0</difficult><pose>x</pose>"
            f"<truncated>0</truncated><bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin>"
            f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
            for (x0, y0, x1, y1), label in zip(drawn.boxes, drawn.classes, strict=True)
        )
        size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
        text = f"<annotation>{size}{objects}</annotation>"
        (root / "Annotations" / f"{drawn.path.stem}.xml").write_text(text)
    forget(name)
    register_pascal_voc(name, str(root), "all", 2012, CLASSES)
    MetadataCatalog.get(name).evaluator_type = "pascal_voc"
