"""COCO metrics from faster-coco-eval, corrected to be bitwise identical to those of pycocotools."""

from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

# pycocotools' precision after a single, correct detection. pycocotools divides by the number of
# detections plus the machine epsilon, which only makes a difference if the number is 1.
_FIRST = 1 / (1 + np.spacing(1))


def recalls_of_two(counts: np.ndarray) -> np.ndarray:
    """Return the recall thresholds that two true positives reach, but one true positive doesn't.

    For each number of objects ``n`` in ``counts``, the threshold is the power of two in the
    interval ``(1 / n, 2 / n]``. Many values of ``n`` share a threshold, so fewer thresholds have to
    be evaluated. For ``n < 2``, the threshold is 2, which no recall reaches.
    """
    _, exponents = np.frexp(np.maximum(counts, 1) - 1)
    return np.ldexp(1.0, 1 - exponents)


class ExactCOCOeval(COCOeval_faster):
    """COCO metrics computed in C++ that are bitwise identical to those of pycocotools.

    This class corrects two differences between faster-coco-eval and pycocotools. In
    faster-coco-eval, the precision after a single correct detection is exactly 1, whereas in
    pycocotools it is slightly lower. In keypoint evaluation, faster-coco-eval omits classes without
    objects.
    """

    def __init__(self, truth: COCO, predictions: COCO, task: str, **options: Any):
        """
        Args:
            truth: COCO object with the ground truth.
            predictions: COCO object with the predictions.
            task: "bbox", "segm" or "keypoints".
            options: Keyword arguments of ``COCOeval_faster``.
        """
        super().__init__(truth, predictions, task, **options)
        self.params.catIds = sorted(truth.getCatIds())

    def evaluate(self) -> None:
        """Match predictions to the ground truth, and compute precision and recall."""
        usual = self.params.recThrs
        # The precision at these recalls is 1 if the first two detections are correct.
        seconds = recalls_of_two(self._count_objects())
        self.params.recThrs = np.union1d(usual, seconds)
        try:
            super().evaluate()
            thresholds = self.params.recThrs
        finally:
            self.params.recThrs = usual
        self._paramsEval.recThrs = usual
        precision = self.eval["precision"]
        classes, areas = np.indices(seconds.shape)
        probed = np.searchsorted(thresholds, seconds)
        by_two = precision[:, probed, classes, areas] == 1  # (thresholds, classes, areas, limits)
        kept = np.searchsorted(thresholds, usual)
        precision = precision[:, kept]
        precision[(precision == 1) & ~by_two[:, None]] = _FIRST
        self.eval.update(precision=precision, scores=self.eval["scores"][:, kept])
        self.eval["counts"][1] = len(usual)

    def _count_objects(self) -> np.ndarray:
        """Return the number of non-ignored ground-truth objects by class and area range."""
        p = self.params
        items = self.cocoGt.loadAnns(self.cocoGt.getAnnIds(imgIds=p.imgIds, catIds=p.catIds))
        counted = [
            item
            for item in items
            if not item.get("iscrowd", 0)
            and (p.iouType != "keypoints" or item.get("num_keypoints", 0))
        ]
        category = np.array([item["category_id"] for item in counted], np.int64)
        area = np.array([item["area"] for item in counted])
        index = np.searchsorted(p.catIds, category)
        inside = [(low <= area) & (area <= high) for low, high in p.areaRng]
        counts = [np.bincount(index[chosen], minlength=len(p.catIds)) for chosen in inside]
        return np.stack(counts, axis=1)
