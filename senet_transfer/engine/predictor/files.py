"""Inference on image files and videos, with results and drawings written to files."""

import csv
import itertools
import json
import logging
import os
from collections.abc import Callable, Sequence
from typing import IO, Any

import cv2
import numpy as np
from PIL import Image

from senet_transfer.engine.predictor.inputs import Photo
from senet_transfer.engine.predictor.predictions import Classification, Detections
from senet_transfer.engine.predictor.predictor import (
    ClassifierPredictor,
    DetectorPredictor,
    describe_problem,
)
from senet_transfer.engine.predictor.video import Video
from senet_transfer.engine.results import write_results
from senet_transfer.errors import UserError
from senet_transfer.utils.progress import progress
from senet_transfer.utils.text import check_utf8

logger = logging.getLogger(__name__)

FORMATS = ("json", "coco", "csv", "yolo")

# Maximum number of errors to list in an error message.
_LISTED = 10

Result = Classification | Detections


def predict_files(
    predictor: ClassifierPredictor | DetectorPredictor,
    images: Sequence[str | Photo],
    output_dir: str,
    *,
    form: str = "",
    draw: bool | None = None,
    batch_size: int = 0,
    workers: int = 0,
    quiet: bool = False,
    report: Callable[[Result], object] = lambda result: None,
    plot: Callable[[Any], Image.Image] = lambda result: result.plot(),
) -> str:
    """Run inference on images, and write the results and, optionally, drawings of them.

    On Ctrl-C, the results for the images processed so far are written.

    Args:
        predictor: The predictor.
        images: Paths of images, or the images found by :func:`~.inputs.find_photos`. A path that
            occurs several times is processed once.
        output_dir: The output folder for ``predictions.json`` (or ``.csv``, or the folder
            ``labels`` for YOLO) and the drawings. Each drawing has the same relative path as its
            image.
        form: The output format, one of :data:`FORMATS`. The default is "coco" for detectors and
            "json" for classifiers.
        draw: If True, write images with the predictions drawn on them. The default is True for
            detectors and False for classifiers.
        batch_size: See :meth:`Predictor.stream`.
        workers: See :meth:`Predictor.stream`.
        quiet: If True, show no progress bar.
        report: A function that is called with each result.
        plot: A function that returns an image with a result drawn on it.

    Returns:
        The path of the results file or folder.

    Raises:
        UserError: If an argument is invalid, or if any image can't be processed. In the latter
            case, the error lists these images and is raised after all other images have been
            processed.
    """
    photos = list({photo.name: photo for photo in map(Photo.of, images)}.values())
    detects = isinstance(predictor, DetectorPredictor)
    draw = detects if draw is None else draw
    drawings = output_names(photos, output_dir) if draw else {}
    make_output_folder(output_dir)
    writer = _writer(form, detects, output_dir, photos)
    numbers = {photo.name: number for number, photo in enumerate(photos, start=1)}
    broken: list[str] = []
    results = predictor.stream(photos, batch_size=batch_size, workers=workers, broken=broken)
    try:
        with progress(total=len(photos), unit="image", quiet=quiet) as bar:
            for result in results:
                report(result)
                writer.add(result, numbers[result.photo.name])
                if draw:
                    name = result.photo.name
                    try:
                        _save(plot(result), drawings[name])
                    except Exception as error:
                        lacks = "predictions but no drawing"
                        broken.append(describe_problem(name, lacks, error))
                bar.update()
    except KeyboardInterrupt:
        path = writer.close()
        logger.warning(
            "Inference was interrupted before all %d images were processed. The predictions "
            "so far are stored in %s.",
            len(photos),
            path,
        )
        raise
    path = writer.close()
    check_all_read(broken, len(photos), path)
    return path


def predict_video(
    predictor: ClassifierPredictor | DetectorPredictor,
    name: str,
    output_dir: str,
    *,
    draw: bool | None = None,
    limit: int | None = None,
    batch_size: int = 0,
    quiet: bool = False,
) -> tuple[str, int]:
    """Run inference on a video, and write the results and a video with the results drawn on it.

    The results are written to ``NAME.jsonl``: one JSON object per frame, with its index, its time
    in seconds and the results. The video is ``NAME.mp4``. Memory use does not depend on the length
    of the video. Ctrl-C ends a stream; the results for the frames processed so far are written.

    Args:
        predictor: The predictor.
        name: Path of a video file, URL of a stream, or index of a camera.
        output_dir: The output folder.
        draw: If True, write a video. By default, a video is written only for detectors.
        limit: The maximum number of frames to process; None for all.
        batch_size: See :meth:`Predictor.stream`.
        quiet: If True, show no progress bar.

    Returns:
        The path of the JSON Lines file, and the number of frames.

    Raises:
        UserError: If the video can't be read, or a file can't be written.
    """
    draw = isinstance(predictor, DetectorPredictor) if draw is None else draw
    make_output_folder(output_dir)
    path, drawn = (os.path.join(output_dir, video_stem(name) + end) for end in (".jsonl", ".mp4"))
    if os.path.abspath(drawn) == os.path.abspath(name):
        raise UserError(f"The video {name} would be overwritten by the output. Change --output.")
    count, out = 0, None
    with Video(name) as video, _opened(path) as lines:
        try:
            frames = itertools.islice(video, limit)
            results = predictor.stream(frames, batch_size=batch_size)
            total = min((n for n in (video.frames, limit) if n is not None), default=None)
            for result in progress(results, total=total, unit="frame", quiet=quiet):
                row = {"frame": count, "seconds": round(count / video.rate, 6), **result.to_dict()}
                del row["file_name"]
                lines.write(json.dumps(row) + "\n")
                if draw:
                    image = np.asarray(result.plot())
                    out = out or _video_writer(drawn, video.rate, image)
                    out.write(image[:, :, ::-1])
                count += 1
        except KeyboardInterrupt:  # Ctrl-C is the usual way to stop an endless stream
            logger.info("Stopped after %d frames of %s.", count, name)
        finally:
            if out is not None:
                out.release()
    return path, count


def video_stem(name: str) -> str:
    """Return the name of a video's result files, without the suffix."""
    return os.path.splitext(os.path.basename(name.partition("?")[0].rstrip("/")))[0] or "video"


def _video_writer(path: str, rate: float, image: np.ndarray) -> cv2.VideoWriter:
    check_utf8(path, "videos")
    height, width = image.shape[:2]
    out = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*"mp4v"), rate, (width, height))
    if not out.isOpened():
        raise UserError(
            f"The video {path} can't be written. Check that its folder is writable and that the "
            "disk is not full."
        )
    return out


def make_output_folder(path: str) -> None:
    """Create the output folder for predictions, and raise a UserError if this fails."""
    try:
        os.makedirs(path or ".", exist_ok=True)
    except OSError as error:
        raise UserError(
            f"The output folder {path} can't be created: {error}. Choose a different folder."
        ) from error


def check_all_read(broken: list[str], images: int, path: str) -> None:
    """Raise a UserError that lists the images that could not be read or processed, if any."""
    if broken:
        more = f"\n... and {len(broken) - _LISTED} more" if len(broken) > _LISTED else ""
        raise UserError(
            f"{len(broken)} of {images} images can't be read or processed. The predictions for the "
            f"other images are in {path}. Errors:\n" + "\n".join(broken[:_LISTED]) + more
        )


def output_names(photos: Sequence[Photo], output_dir: str, suffix: str = ".jpg") -> dict[str, str]:
    """Return a dict from the name of each image to the path of its output file.

    Raises:
        UserError: If two output files would have the same path, or if an output file would
            overwrite its image.
    """
    names: dict[str, str] = {}
    taken: set[str] = set()
    for photo in photos:
        name = os.path.join(output_dir, os.path.splitext(photo.relative)[0] + suffix)
        if name in taken:
            # The inputs include, for example, both a.png and a.jpg.
            name = os.path.join(output_dir, photo.relative + suffix)
        if name in taken:
            raise UserError(
                f"Two images would have the same output file {name}; one of them is {photo.name}. "
                "Rename one of the images, or use two output folders."
            )
        if os.path.abspath(name) == os.path.abspath(photo.name):
            raise UserError(
                f"The image {photo.name} would be overwritten by its output file. "
                "Choose a different --output."
            )
        taken.add(name)
        names[photo.name] = name
    return names


def _save(drawing: Image.Image, path: str) -> None:
    make_output_folder(os.path.dirname(path))
    try:
        # OpenCV crashes if the path is not UTF-8.
        drawing.save(path, "JPEG", quality=95)
    except OSError as error:
        raise UserError(
            f"The image with the drawn predictions, {path}, can't be written: {error}. Check that "
            "its folder is writable and that the disk is not full."
        ) from error


def _writer(form: str, detects: bool, output_dir: str, photos: Sequence[Photo]) -> "_Writer":
    form = form or ("coco" if detects else "json")
    kinds: dict[str, type[_Writer]] = {"json": _Json, "csv": _Csv}
    if detects:
        kinds |= {"coco": _Coco, "yolo": _Yolo}
    if form not in kinds:
        raise UserError(
            f"The format is {form!r}; expected one of the formats for this model: "
            f"{', '.join(kinds)}."
        )
    return kinds[form](output_dir, photos)


def _opened(path: str) -> IO[str]:
    """Open a text file for writing. Image paths that are not UTF-8 are written byte for byte."""
    try:
        make_output_folder(os.path.dirname(path))
        return open(path, "w", newline="", encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"{path} can't be written: {error}. Choose a different path.") from error


class _Writer:
    """Base class for writers of prediction results."""

    def __init__(self, output_dir: str, photos: Sequence[Photo]):
        self.path = os.path.join(output_dir, "predictions.json")

    def add(self, result: Any, number: int) -> None:
        """Add the result for an image. ``number`` is the image's position in the input, from 1."""

    def close(self) -> str:
        """Write the remaining results, and return the path."""
        return self.path


class _Json(_Writer):
    """Writer of a JSON list with one dictionary per image."""

    def __init__(self, output_dir: str, photos: Sequence[Photo]):
        super().__init__(output_dir, photos)
        self.rows: list[dict[str, Any]] = []

    def add(self, result: Result, number: int) -> None:
        self.rows.append(result.to_dict())

    def close(self) -> str:
        write_results(self.path, self.rows)
        return self.path


class _Coco(_Writer):
    """Writer of a file in COCO format. The id of an image is its position in the input."""

    def __init__(self, output_dir: str, photos: Sequence[Photo]):
        super().__init__(output_dir, photos)
        self.found: dict[str, list] = {"images": [], "annotations": [], "categories": []}

    def add(self, result: Detections, number: int) -> None:
        height, width = result.instances.image_size
        self.found["categories"] = result.classes.categories
        self.found["images"].append(
            {"id": number, "file_name": result.photo.name, "height": height, "width": width}
        )
        for annotation in result.to_coco(number):
            index = len(self.found["annotations"]) + 1
            self.found["annotations"].append({**annotation, "id": index, "iscrowd": 0})

    def close(self) -> str:
        write_results(self.path, self.found, indent=None)
        return self.path


# Column names for boxes, by the number of values per box.
_BOXES = {0: (), 4: ("x1", "y1", "x2", "y2"), 5: ("x", "y", "width", "height", "angle")}


class _Csv(_Writer):
    """Writer of a CSV table with one row per detected object or per predicted class."""

    def __init__(self, output_dir: str, photos: Sequence[Photo]):
        self.path = os.path.join(output_dir, "predictions.csv")
        self.file = _opened(self.path)
        self.writer = csv.writer(self.file)
        self.empty = True

    def add(self, result: Result, number: int) -> None:
        places: list[list[float]] = [[] for _ in result.names]
        if isinstance(result, Detections):
            places = result.boxes.tolist()
        if self.empty and places:
            self._write_header(len(places[0]))
        rows = zip(result.names, result.labels, result.scores, places, strict=True)
        for name, label, score, place in rows:
            numbers = [f"{value:.9g}" for value in (score, *place)]
            self.writer.writerow([result.photo.name, name, int(label), *numbers])

    def _write_header(self, sides: int) -> None:
        self.writer.writerow(["file_name", "class", "label", "score", *_BOXES[sides]])
        self.empty = False

    def close(self) -> str:
        if self.empty:
            self._write_header(4)
        self.file.close()
        return self.path


class _Yolo(_Writer):
    """Writer of one text file per image in YOLO format, with one line per object.

    A line contains the label, the centre, width and height of the box as fractions of the image
    size, and the score.
    """

    def __init__(self, output_dir: str, photos: Sequence[Photo]):
        self.path = os.path.join(output_dir, "labels")
        self.files = output_names(photos, self.path, ".txt")
        make_output_folder(self.path)

    def add(self, result: Detections, number: int) -> None:
        height, width = result.instances.image_size
        if result.boxes.shape[1] != 4:
            raise UserError(
                "The YOLO format does not support rotated boxes. Choose the format coco, csv or "
                "json."
            )
        with _opened(self.files[result.photo.name]) as file:
            rows = zip(result.labels, result.boxes, result.scores, strict=True)
            for label, (x1, y1, x2, y2), score in rows:
                box = [(x1 + x2) / 2 / width, (y1 + y2) / 2 / height]
                box += [(x2 - x1) / width, (y2 - y1) / height]
                file.write(f"{label} {' '.join(f'{value:.6f}' for value in (*box, score))}\n")
