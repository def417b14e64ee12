"""Detectron2's COCO evaluator, accelerated with faster-coco-eval.

faster-coco-eval computes the metrics in C++. The results are bitwise identical to those of
pycocotools. If faster-coco-eval isn't installed, pycocotools is used.
"""

import contextlib
import gc
import io
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from detectron2.evaluation import COCOEvaluator, coco_evaluation
from detectron2.utils import comm
from pycocotools.coco import COCO

from senet_transfer.data.detection.formats.source import read_annotations
from senet_transfer.evaluation.coco_arrays import coco_arrays
from senet_transfer.evaluation.diagnostics import diagnose
from senet_transfer.evaluation.numbering import Numbering
from senet_transfer.utils.atomic_io import write_json

try:
    import faster_coco_eval

    from senet_transfer.evaluation.exact_metrics import ExactCOCOeval
except ImportError:
    faster_coco_eval = None

# Name of the diagnostics file in the evaluator's output folder.
DIAGNOSTICS = "diagnostics.json"

logger = logging.getLogger(__name__)


class FastCOCOEvaluator(COCOEvaluator):
    """Variant of Detectron2's COCOEvaluator based on faster-coco-eval, about eight times as fast.

    The metrics are computed with consecutive ids instead of the ids in the annotation file; see
    :class:`~senet_transfer.evaluation.numbering.Numbering`. The prediction files contain the ids
    from the annotation file.

    Attributes:
        diagnostics: Diagnostics keyed by IoU type, as returned by
            :func:`~senet_transfer.evaluation.diagnostics.diagnose`. The diagnostics are also
            written to ``diagnostics.json`` in the output folder.
    """

    def __init__(self, *arguments: Any, diagnostics: Sequence[str] = (), **options: Any):
        """
        Args:
            arguments: Positional arguments of Detectron2's COCOEvaluator.
            diagnostics: The IoU types for which diagnostics are computed: "bbox" for boxes and
                "segm" for masks. Types that the model does not predict are ignored.
            options: Keyword arguments of Detectron2's COCOEvaluator, except ``use_fast_impl``.

        Raises:
            UserError: If the annotation file can't be read.
        """
        # This project's loader supports annotation files that Detectron2's class can't read.
        with _replaced(coco_evaluation, "COCO", self._read_truth):
            super().__init__(*arguments, use_fast_impl=False, **options)
        self.diagnostics: dict[str, dict[str, Any]] = {}
        self._iou_types = tuple(diagnostics)

    def _read_truth(self, json_file: str) -> COCO:
        image_dir = self._metadata.get("image_root") or os.path.dirname(json_file)
        upright = self._metadata.get("upright", True)
        return _indexed(COCO(), read_annotations(json_file, image_dir, upright=upright))

    def reset(self) -> None:
        """Discard all predictions and the diagnostics of an earlier evaluation."""
        super().reset()
        self.diagnostics = {}
        if self._output_dir and comm.is_main_process():
            with suppress(FileNotFoundError):
                Path(self._output_dir, DIAGNOSTICS).unlink()

    def _eval_predictions(self, predictions: list[dict], img_ids: list[int] | None = None) -> None:
        self._compute_metrics(predictions, img_ids)
        if self._do_evaluation and img_ids is None:
            self._diagnose([result for image in predictions for result in image["instances"]])

    def _diagnose(self, results: list[dict]) -> None:
        """Compute diagnostics from COCO results with the category ids of the annotation file."""
        start = time.perf_counter()
        dataset = self._coco_api.dataset
        names = self._metadata.get("thing_classes") or [
            category["name"] for category in dataset["categories"]
        ]
        for iou_type in self._iou_types:
            if iou_type not in self._results:
                continue
            objects, detections = coco_arrays(
                dataset,
                results,
                self._metadata.get("thing_dataset_id_to_contiguous_id"),
                masks=iou_type == "segm",
            )
            limit = self._max_dets_per_image[-1]
            found = diagnose(objects, detections, names, max_detections=limit)
            self.diagnostics[iou_type] = found
            logger.info("Diagnostics for %s: %s", iou_type, found["summary"])
        if self.diagnostics:
            logger.info(
                "Computed the error types and other diagnostics of the detector in %.1f s.",
                time.perf_counter() - start,
            )
            if self._output_dir:
                write_json(Path(self._output_dir, DIAGNOSTICS), self.diagnostics, indent=None)

    def _compute_metrics(self, predictions: list[dict], img_ids: list[int] | None) -> None:
        if faster_coco_eval is None:
            logger.info("faster-coco-eval is not installed. Using pycocotools, which is slower.")
        if not self._do_evaluation:
            super()._eval_predictions(predictions, img_ids)
            return
        numbering = Numbering(
            self._coco_api.dataset,
            self._metadata.get("thing_dataset_id_to_contiguous_id"),
        )
        truth = _indexed(
            COCO() if faster_coco_eval is None else faster_coco_eval.COCO(), numbering.dataset
        )
        load = truth.loadRes
        with (
            no_garbage_collection(),
            _replaced(truth, "loadRes", lambda results: load(numbering.results(results))),
            _replaced(self, "_coco_api", truth),
            _fast_metrics(),
        ):
            numbers = None if img_ids is None else numbering.image_numbers(img_ids)
            super()._eval_predictions(predictions, numbers)


def _indexed(truth: Any, dataset: dict[str, Any]) -> Any:
    truth.dataset = dataset
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


@contextmanager
def _fast_metrics() -> Iterator[None]:
    """Make Detectron2 use faster-coco-eval, if it is installed, inside the context.

    Detectron2's own fast implementation is not used because some builds lack it, and because it
    rounds differently than pycocotools.
    """
    if faster_coco_eval is None:
        yield
        return
    with (
        _replaced(coco_evaluation, "COCOeval", ExactCOCOeval),
        # The fast class also replaces Detectron2's class for more than 100 detections per image.
        _replaced(coco_evaluation, "COCOevalMaxDets", ExactCOCOeval),
    ):
        yield


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Disable garbage collection while the context is active.

    An evaluation creates half a million small dicts without reference cycles. Scanning them for
    cycles would take a third of the evaluation time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def _replaced(owner: object, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
