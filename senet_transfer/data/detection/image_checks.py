"""Checks of image files before a run. All invalid files of a dataset are reported at once."""

import math
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from detectron2.utils.file_io import PathManager
from PIL import Image

from senet_transfer.data.detection.coco import CocoDataset, registered_entry
from senet_transfer.data.detection.mapper import UnreadableImageError, read_checked
from senet_transfer.data.images.decode import (
    UPRIGHT,
    Reading,
    bits_of,
    no_truncated_images,
    size_of,
)
from senet_transfer.data.reading import warn_if_dark
from senet_transfer.errors import UserError
from senet_transfer.utils.progress import progress

MODES = ("header", "decode")

_LISTED = 50
_THREADS = 8


def check_images(
    names: Sequence[str],
    *,
    mode: str = "header",
    reading: Reading = UPRIGHT,
    max_size: float = math.inf,
) -> None:
    """Check that the images of datasets can be read and have the annotated sizes.

    Args:
        names: Names of registered datasets. Datasets not registered by this project are skipped.
        mode: "header" reads only the file headers and compares the image sizes with the
            annotations; "decode" decodes the complete images.
        reading: Settings for reading images. If they specify a number of channels, images are
            decoded completely in both modes.
        max_size: The maximum length of an image's longer side after resizing, in pixels.

    Raises:
        UserError: If any image is unreadable or differs in size from its annotation. The message
            lists all such images.
    """
    for name in dict.fromkeys(names):
        dataset = registered_entry(name)
        if isinstance(dataset, CocoDataset):
            check_dataset_images(
                dataset,
                mode=mode,
                reading=reading,
                max_size=max_size,
            )


def check_dataset_images(
    dataset: CocoDataset,
    *,
    mode: str = "header",
    reading: Reading = UPRIGHT,
    max_size: float = math.inf,
    quiet: bool = True,
) -> int:
    """Check that the images of a dataset can be read and have the annotated sizes.

    Args:
        dataset: The dataset.
        mode: "header" or "decode"; see :func:`check_images`.
        reading: Settings for reading images. If they specify a number of channels, images are
            decoded completely in both modes.
        max_size: The maximum length of an image's longer side after resizing, in pixels.
        quiet: Whether to hide the progress bar.

    Returns:
        The number of images.

    Raises:
        UserError: If any image is unreadable or differs in size from its annotation. The message
            lists all such images.
    """
    records = dataset.image_records()
    read = partial(
        read_checked,
        image_format="BGR",
        reading=reading,
        annotation_files={dataset.image_dir: [dataset.json_file]},
    )
    whole = mode == "decode" or reading.channels is not None
    check = read if whole else partial(_check_header, read=read, reading=reading)
    # Reading an image changes process-wide settings. They are set here once for all threads,
    # because a thread that restores them would affect the other threads.
    with (
        no_truncated_images(),
        warnings.catch_warnings(action="ignore"),
        ThreadPoolExecutor(_THREADS) as pool,
    ):
        done = pool.map(lambda record: _problem_of(check, record, max_size), records)
        bar = progress(done, total=len(records), unit="image", desc=dataset.name, quiet=quiet)
        problems = [problem for problem in bar if problem]
    if problems:
        more = len(problems) - _LISTED
        listed = [*problems[:_LISTED], *([f"... and {more} more"] if more > 0 else [])]
        raise UserError(
            f"{len(problems)} of the {len(records)} images listed in {dataset.json_file} can't be "
            "used:\n  " + "\n  ".join(listed) + "\nRestore or correct these images, or remove them "
            "from the annotation file."
        )
    paths = [record["file_name"] for record in records]
    warn_if_dark(dataset.json_file, reading, len(paths), lambda index: _content(paths[index]))
    return len(records)


def _problem_of(check: Callable[[dict], object], record: dict, max_size: float) -> str:
    short, long = sorted((record["width"], record["height"]))
    if max_size * short / long < 0.5:
        return (
            f"{record['file_name']} is {record['width']}x{record['height']} pixels: resizing the "
            f"longer side to {max_size:g} pixels (INPUT.MAX_SIZE_TRAIN, INPUT.MAX_SIZE_TEST) would "
            "reduce the shorter side to 0 pixels. Crop or split the image, or increase these keys"
        )
    try:
        check(record)
    except UnreadableImageError as error:
        return error.reason
    except UserError as error:
        return str(error)
    return ""


def _check_header(record: dict, *, read: Callable[[dict], object], reading: Reading) -> None:
    """Check an image's header; if the check fails, decode the image to find the reason."""
    try:
        with PathManager.open(record["file_name"], "rb") as file:
            image = Image.open(file)
            # In a PNG file, EXIF data can follow the pixels. Pillow finds it only by decoding them.
            known = image.format != "PNG" or "exif" in image.info
            size = size_of(image, upright=reading.upright and known)
            fine = size == (record["width"], record["height"])
            fine = fine and (bits_of(image) < 32 or bool(reading.value_range))
    except MemoryError:
        raise
    except Exception:  # Pillow raises exceptions of many types for damaged files
        fine = False
    if not fine:
        read(record)


def _content(path: str) -> bytes:
    with PathManager.open(path, "rb") as file:
        return file.read()
