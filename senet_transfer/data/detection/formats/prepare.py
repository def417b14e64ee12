"""Conversion of datasets in other annotation formats to files in COCO format."""

import os
import re
from pathlib import Path
from typing import Any

from senet_transfer.data.detection.annotation_checks import CocoSummary, summarize_coco
from senet_transfer.data.detection.formats.records import NOTES, SOURCE, to_coco
from senet_transfer.data.detection.formats.source import FORMATS, find_source
from senet_transfer.data.split_files import writing_parts
from senet_transfer.errors import UserError
from senet_transfer.utils.atomic_io import write_json

# File name of a split or fold, without the extension.
_PART = re.compile(r"train|val|test|fold\d+_(train|val)")


def import_dataset(
    name: str,
    path: str | os.PathLike,
    image_dir: str | os.PathLike | None = None,
    *,
    upright: bool = True,
) -> tuple[dict[str, dict[str, Any]], str]:
    """Read a dataset and convert it to COCO format.

    Args:
        name: The format, a key of :data:`~senet_transfer.data.detection.formats.source.FORMATS`.
        path: The file or folder with the annotations.
        image_dir: The folder with the images; None selects the format's default folder.
        upright: Whether the annotations refer to the images with EXIF orientation applied.

    Returns:
        A dictionary from split ("train", "val" or "test") to annotations in COCO format, and the
        image folder to which the file names are relative.

    Raises:
        UserError: If a file is invalid, or the path contains no data in this format.
    """
    path = Path(path).expanduser()
    source = find_source(path, name)
    if source is None:
        found = "no files have this format" if os.path.exists(path) else "the path does not exist"
        other = find_source(path) if os.path.exists(path) else None
        if other is not None:
            found = f"the files have the format {other.format!r}"
        raise UserError(
            f"{path} can't be read as data in {FORMATS[name].title} format: {found}. Check the "
            "path and the format."
        )
    folder = os.path.abspath(image_dir or source.image_folder())
    data = source.read(folder, upright=upright)
    if "train" in data.splits or "trainval" not in data.splits:
        data.splits.pop("trainval", None)
    else:
        data.splits["train"] = data.splits.pop("trainval")
    return {split: to_coco(data, split) for split in data.splits}, folder


def write_dataset(
    datasets: dict[str, dict[str, Any]],
    output: Path,
    image_dir: str,
    *,
    source: str,
    replace: bool = False,
) -> dict[str, CocoSummary]:
    """Validate the splits of a dataset, and write each split to a JSON file in COCO format.

    If any split is invalid, no file is written.

    Args:
        datasets: Dictionary from split to annotations in COCO format.
        output: The folder to write to.
        image_dir: The folder to which the file names are relative.
        source: The file or folder that was read, for error messages.
        replace: Whether to replace existing files.

    Returns:
        The summary of each split.

    Raises:
        UserError: If an annotation is invalid, an image is missing, the files can't be written, or
            the output folder already contains the file of any split and `replace` is False.
    """
    summaries = {
        split: summarize_coco(content, source, image_dir, allow_empty=split != "train")
        for split, content in datasets.items()
    }
    # All splits are checked, because training would also use files from an earlier import.
    found = sorted(path for path in output.glob("*.json") if _PART.fullmatch(path.stem))
    with writing_parts(output, () if replace else found):
        for split, content in datasets.items():
            write_json(output / f"{split}.json", _without_sources(content), indent=None)
    return summaries


def _without_sources(content: dict[str, Any]) -> dict[str, Any]:
    return {
        key: [{k: v for k, v in item.items() if k != SOURCE} for item in items]
        for key, items in content.items()
        if key != NOTES
    }
