"""Script that writes fused_boxes.json: boxes of several detectors, fused by ensemble-boxes.

The script requires ``pip install ensemble-boxes==1.0.9``.
"""

import json
from pathlib import Path

import numpy as np
from ensemble_boxes import weighted_boxes_fusion

FILE = Path(__file__).with_name("fused_boxes.json")


def detections(rng: np.random.Generator, objects: np.ndarray, count: int) -> tuple:
    """Return random boxes, scores and classes, with several boxes for some of the objects."""
    chosen = objects[rng.integers(0, len(objects), count)]
    corners = np.clip(chosen[:, :4] + rng.normal(0, 0.02, (count, 4)), 0, 1)
    boxes = np.concatenate([corners[:, :2], np.maximum(corners[:, 2:], corners[:, :2] + 0.01)], 1)
    return boxes.clip(0, 1).round(5), rng.uniform(0.05, 1, count).round(5), chosen[:, 4].astype(int)


def main() -> None:
    rng, cases = np.random.default_rng(0), []
    for counts, iou in [((40, 30, 50), 0.55), ((60, 0), 0.7), ((25, 25, 25, 25), 0.4)]:
        corner = rng.uniform(0, 0.6, (12, 2))
        size, classes = rng.uniform(0.1, 0.4, (12, 2)), rng.integers(0, 3, (12, 1))
        objects = np.concatenate([corner, corner + size, classes], 1)
        found = [detections(rng, objects, count) for count in counts]
        boxes, scores, labels = (list(part) for part in zip(*found, strict=True))
        fused = weighted_boxes_fusion(boxes, scores, labels, iou_thr=iou)
        case = {"iou": iou, "boxes": boxes, "scores": scores, "classes": labels}
        case |= dict(zip(("fused", "fused_scores", "fused_classes"), fused, strict=True))
        cases.append(case)
    FILE.write_text(json.dumps(cases, default=np.ndarray.tolist, separators=(",", ":")))


if __name__ == "__main__":
    main()
