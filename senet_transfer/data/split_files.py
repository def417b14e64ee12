"""Split of detection data in COCO's format, CSV files and folders of classes into new files."""

import csv
import io
import logging
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from senet_transfer.data.detection.annotation_checks import check_annotations
from senet_transfer.data.detection.json_file import read_json_object
from senet_transfer.data.images.folders import open_images
from senet_transfer.data.images.label_csv import COLUMNS, is_label_csv
from senet_transfer.data.shards.manifest import MANIFEST
from senet_transfer.data.splits import TEST, TRAIN, VAL, Split, split_images
from senet_transfer.errors import UserError
from senet_transfer.utils.atomic_io import atomic_file, write_json
from senet_transfer.utils.text import first_of, shown

# A part whose fraction of the images differs more than this from the requested one is reported.
_TOLERANCE = 0.05

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Source:
    """Data set to split.

    Attributes:
        classes: Class names, in the order of the table.
        objects: Number of objects of each class, by file name of the image.
        suffix: Extension of the files to write.
        write: Function that writes the images with the given file names to a file.
    """

    classes: list[str]
    objects: Mapping[str, Counter[str]]
    suffix: str
    write: Callable[[Path, Collection[str]], None]


def split_data(source: str | Path, output: str | Path, split: Split) -> str:
    """Split a data set and write the files of its parts.

    Args:
        source: JSON file in COCO's format, CSV file, or folder with one folder per class.
        output: Folder for ``train``, ``val`` and ``test`` or, with folds, ``fold0_train``,
            ``fold0_val``, ...: JSON files for a JSON file, otherwise CSV files. Images are not
            copied: the ``file_name`` entries of a JSON file are unchanged, and the paths in a CSV
            file are relative to the new file.
        split: Options of the split.

    Returns:
        A table with the number of objects or images per class and part.

    Raises:
        UserError: If the data is invalid, a part would be empty, or a file already exists.
    """
    source, output = Path(source), Path(output)
    data = _open_coco(source) if source.suffix == ".json" else _open_classes(source, output)
    part_of = split_images(data.objects, split)
    used = set(part_of.values())
    parts = [part for part in dict.fromkeys([TRAIN, *split.fractions()]) if part in used]
    _write(data, part_of, _files(parts, split.folds), output)
    _warn(data, part_of, split.fractions())
    return _table(data, part_of, parts)


def _files(parts: list[str], folds: int) -> dict[str, list[str]]:
    """Return the parts in each file, by the name of the file without extension."""
    if not folds:
        return {part: [part] for part in parts}
    files = {}
    for part in (f"fold{number}" for number in range(folds)):
        files[f"{part}_train"] = [other for other in parts if other not in (part, TEST)]
        files[f"{part}_val"] = [part]
    return files | {part: [part] for part in parts if part == TEST}


def _write(
    data: _Source, part_of: Mapping[str, str], files: dict[str, list[str]], output: Path
) -> None:
    paths = {name: output / f"{name}{data.suffix}" for name in files}
    existing = [str(path) for path in paths.values() if path.exists()]
    if existing:
        raise UserError(
            f"{first_of(existing, 3)} already exist. Choose a different --output, or delete them."
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, parts in files.items():
            data.write(paths[name], {image for image, part in part_of.items() if part in parts})
    except OSError as error:
        raise UserError(
            f"Cannot write to {output}: {error}. Choose a different --output."
        ) from error


def _open_coco(path: Path) -> _Source:
    data = read_json_object(str(path))
    summary = check_annotations(str(path), data)
    class_of = {number: summary.classes[index] for number, index in summary.id_map.items()}
    name_of = {image["id"]: image["file_name"] for image in data["images"]}
    objects: dict[str, Counter[str]] = {name: Counter() for name in name_of.values()}
    for annotation in data["annotations"]:
        if not annotation.get("iscrowd"):
            objects[name_of[annotation["image_id"]]][class_of[annotation["category_id"]]] += 1

    def write(target: Path, names: Collection[str]) -> None:
        images = [image for image in data["images"] if image["file_name"] in names]
        ids = {image["id"] for image in images}
        annotations = [item for item in data["annotations"] if item["image_id"] in ids]
        content = {**data, "images": images, "annotations": annotations}
        write_json(target, content, indent=None)

    return _Source(summary.classes, objects, ".json", write)


def _open_classes(path: Path, output: Path) -> _Source:
    if not (is_label_csv(path) or path.is_dir()) or (path / MANIFEST).exists():
        found = "shards" if path.is_dir() else "another file" if path.exists() else "missing"
        raise UserError(
            f"Cannot split {path} ({found}); expected a JSON file in COCO's format, a CSV file "
            "with the columns path and label, or a folder with one folder per class."
        )
    images = open_images(path)
    # Without symbolic links, because ".." leads from a link to the parent of its target.
    root, folder = os.path.realpath(images.root), os.path.realpath(output)
    labels = [images.classes[label] for label in images.labels]
    rows = {
        name: (os.path.relpath(os.path.join(root, name), folder), label)
        for name, label in zip(images.names, labels, strict=True)
    }
    for row in rows.values():
        for text in row:
            if text != text.strip() or text.encode(errors="replace").decode() != text:
                raise UserError(
                    f"{shown(text)!r} in {path} can't be written to a CSV file; expected UTF-8 "
                    "without blanks at the ends. Rename the file or folder."
                )

    def write(target: Path, names: Collection[str]) -> None:
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(row for name, row in rows.items() if name in names)
        with atomic_file(target) as file:
            file.write(stream.getvalue().encode())

    objects = {name: Counter([label]) for name, (_, label) in rows.items()}
    return _Source(images.classes, objects, ".csv", write)


def _warn(data: _Source, part_of: Mapping[str, str], fractions: Mapping[str, float]) -> None:
    """Warn about classes that are missing from a part, and about parts of another size."""
    sizes = Counter(part_of.values())
    found = Counter((part_of[name], label) for name in part_of for label in data.objects[name])
    known = {label for _, label in found}
    for part, size in sizes.items():
        missing = [label for label in data.classes if label in known and not found[part, label]]
        # In every fold, "train" is only a part of the training images.
        if missing and (part != TRAIN or VAL in sizes):
            logger.warning(
                "No images of %d classes are in %s: %s. They have too few images or groups, or "
                "these contain several classes; another --seed may help.",
                len(missing),
                part,
                first_of(missing),
            )
        wanted = fractions.get(part, size / len(part_of))
        if abs(size / len(part_of) - wanted) > _TOLERANCE:
            logger.warning(
                "%s contains %.1f%% of the images instead of %.1f%%, because of large groups or "
                "of classes with few images.",
                part,
                100 * size / len(part_of),
                100 * wanted,
            )


def _table(data: _Source, part_of: Mapping[str, str], parts: list[str]) -> str:
    """Format the number of objects per class and part; the last row is the number of images."""
    counts = {part: Counter[str]() for part in parts}
    for name, part in part_of.items():
        counts[part].update(data.objects[name])
    sizes = Counter(part_of.values())
    rows = [
        [label, *(counts[part][label] for part in parts), sum(c[label] for c in counts.values())]
        for label in data.classes
    ]
    images = [f"{sizes[part]} ({sizes[part] / len(part_of):.1%})" for part in parts]
    rows.append(["images", *images, len(part_of)])
    align = ["left", *["right"] * (len(parts) + 1)]
    return tabulate(rows, ["", *parts, "all"], colalign=align, disable_numparse=True)
