"""Functions that split COCO annotations, CSV files and class folders.

Each function creates training, validation and test splits, or folds for cross-validation.
"""

import csv
import io
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from senet_transfer.data.detection.annotation_checks import summarize_coco
from senet_transfer.data.detection.json_file import read_json_object
from senet_transfer.data.images.folders import open_images
from senet_transfer.data.images.label_csv import COLUMNS, is_label_csv
from senet_transfer.data.shards.manifest import MANIFEST
from senet_transfer.data.shards.scan import find_shards, is_shard_name
from senet_transfer.data.splits import TEST, TRAIN, Split, split_images
from senet_transfer.errors import UserError
from senet_transfer.utils.atomic_io import atomic_file, write_json
from senet_transfer.utils.text import first_of, shown

# A larger difference between a split's requested and actual fraction of the images causes a
# warning.
_TOLERANCE = 0.05

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Source:
    """Dataset to split.

    Attributes:
        classes: Class names, in their order in the printed table.
        objects: Dictionary from image file name to the number of objects of each class.
        suffix: Extension of the files to write.
        write: Function that writes the annotations of the given images to a file.
    """

    classes: list[str]
    objects: Mapping[str, Counter[str]]
    suffix: str
    write: Callable[[Path, Collection[str]], None]


def split_data(source: str | Path, output: str | Path, split: Split) -> str:
    """Split a dataset into training, validation and test data or folds, and write the files.

    Args:
        source: JSON file in COCO format, CSV file, or folder with one folder per class.
        output: Output folder. Its files are named ``train``, ``val`` and ``test`` or, with folds,
            ``fold0_train``, ``fold0_val`` and so on. A JSON file is split into JSON files, other
            data into CSV files. Images are not copied: the ``file_name`` entries of a JSON file are
            unchanged, and the paths in a CSV file are relative to the new file.
        split: Options for splitting the dataset.

    Returns:
        A table with the number of objects or images per class and split or fold.

    Raises:
        UserError: If the data is invalid, a split would be empty, or a file already exists.
    """
    source, output = Path(source), Path(output)
    if source.suffix.lower() == ".json":
        data = _coco_source(read_json_object(str(source)), source)
    else:
        data = _open_classes(source, output)
    files, table = _split(data, split)
    paths = {name: output / f"{name}{data.suffix}" for name in files}
    with writing_parts(output, [path for path in paths.values() if path.exists()]):
        for name, images in files.items():
            data.write(paths[name], images)
    return table


@contextmanager
def writing_parts(output: Path, existing: Collection[Path]) -> Iterator[None]:
    """Create the output folder, and convert write errors inside the context to UserErrors.

    Args:
        output: Output folder for the files of all splits.
        existing: Files in the folder from this or an earlier split. If there are any, an error is
            raised.
    """
    if existing:
        raise UserError(
            f"Output files already exist: {first_of(map(str, existing), 3)}. Choose a different "
            "--output, or delete these files."
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(
            f"Cannot write to {output}: {error}. Choose a different --output."
        ) from error


def split_coco(
    content: dict[str, Any], path: str | Path, split: Split
) -> tuple[dict[str, dict[str, Any]], str]:
    """Split the content of an annotation file in COCO format.

    Args:
        content: Content of the file.
        path: Path of the file; used in error messages.
        split: Options for splitting the dataset.

    Returns:
        A dictionary from the names of the new files, without extension, to their contents, and a
        table with the number of objects per class and split ("train", "val", "test" or a fold).

    Raises:
        UserError: If the content is invalid, or a split would be empty.
    """
    files, table = _split(_coco_source(content, path), split)
    return {name: _select(content, images) for name, images in files.items()}, table


def _split(data: _Source, split: Split) -> tuple[dict[str, set[str]], str]:
    """Assign images to new files; return each file's image names, and a table of object counts."""
    part_of = split_images(data.objects, split)
    images: dict[str, set[str]] = defaultdict(set)
    for name, part in part_of.items():
        images[part].add(name)
    fractions = split.fractions()
    parts = [part for part in dict.fromkeys([TRAIN, *fractions]) if part in images]
    _warn(data, images, fractions)
    files = {part: images[part] for part in parts}
    if split.folds:
        files = {}
        for part in (part for part in parts if part not in (TRAIN, TEST)):
            others = (images[other] for other in parts if other not in (part, TEST))
            files |= {f"{part}_train": set().union(*others), f"{part}_val": images[part]}
        files |= {part: images[part] for part in parts if part == TEST}
    return files, _table(data, images, parts)


def _coco_source(content: dict[str, Any], path: str | Path) -> _Source:
    summary = summarize_coco(content, str(path), None)
    class_of = {number: summary.classes[index] for number, index in summary.id_map.items()}
    name_of = {image["id"]: image["file_name"] for image in content["images"]}
    objects: dict[str, Counter[str]] = {name: Counter() for name in name_of.values()}
    for annotation in content["annotations"]:
        if not annotation.get("iscrowd"):
            objects[name_of[annotation["image_id"]]][class_of[annotation["category_id"]]] += 1

    def write(target: Path, names: Collection[str]) -> None:
        write_json(target, _select(content, names), indent=None)

    return _Source(summary.classes, objects, ".json", write)


def _select(content: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return the content of a COCO file, reduced to the images with the given file names."""
    images = [image for image in content["images"] if image["file_name"] in names]
    ids = {image["id"] for image in images}
    annotations = [item for item in content["annotations"] if item["image_id"] in ids]
    return {**content, "images": images, "annotations": annotations}


def _open_classes(path: Path, output: Path) -> _Source:
    sharded = path.is_dir() and ((path / MANIFEST).exists() or find_shards(path))
    if sharded or is_shard_name(path.name):
        raise UserError(
            f"Cannot split {path}, because it consists of shards. Pass other shards as validation "
            "data (--val of `senet train`), or convert the images to one folder per class."
        )
    if not (is_label_csv(path) or path.is_dir()):
        found = "another file" if path.exists() else "missing"
        raise UserError(
            f"Cannot split {path} ({found}); expected a JSON file in COCO format, a CSV file with "
            "the columns path and label, or a folder with one folder per class."
        )
    images = open_images(path)
    # Symbolic links are resolved, because ".." refers to the parent of a link's target.
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
                    "without leading or trailing spaces. Rename the file or folder."
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


def _count(data: _Source, images: Collection[str]) -> Counter[str]:
    """Return the number of objects of each class in the given images."""
    counts: Counter[str] = Counter()
    for name in images:
        counts.update(data.objects[name])
    return counts


def _warn(
    data: _Source, images: Mapping[str, Collection[str]], fractions: Mapping[str, float]
) -> None:
    """Warn if a class is missing from a split, or if a split is much too small or too large."""
    known = _count(data, data.objects)
    for part in fractions:
        counts = _count(data, images[part])
        missing = [label for label in data.classes if known[label] and not counts[label]]
        if missing:
            logger.warning(
                "%d classes have no images in %s: %s. These classes have too few images or "
                "groups, or their images contain several classes. Another --seed may help.",
                len(missing),
                part,
                first_of(missing),
            )
        share = len(images[part]) / len(data.objects)
        if abs(share - fractions[part]) > _TOLERANCE:
            logger.warning(
                "%s contains %.1f%% of the images instead of %.1f%%, because some groups "
                "are large or some classes have few images.",
                part,
                100 * share,
                100 * fractions[part],
            )


def _table(data: _Source, images: Mapping[str, Collection[str]], parts: list[str]) -> str:
    """Format a table with the number of objects per class and split.

    The last row contains the number of images per split.
    """
    counts = [_count(data, images[part]) for part in parts]
    rows: list[list[object]] = [
        [label, *(count[label] for count in counts), sum(count[label] for count in counts)]
        for label in data.classes
    ]
    total = len(data.objects)
    sizes = [len(images[part]) for part in parts]
    rows.append(["images", *(f"{size} ({size / total:.1%})" for size in sizes), total])
    align = ["left", *["right"] * (len(parts) + 1)]
    return tabulate(rows, ["", *parts, "all"], colalign=align, disable_numparse=True)
