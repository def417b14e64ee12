"""CSV files that list the images of a dataset in the columns `path` and `label`."""

import csv
import io
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from senet_transfer.data.images.class_names import match_names, sort_by_name
from senet_transfer.data.images.listing import Images, find_listed_images
from senet_transfer.errors import UserError
from senet_transfer.utils.text import first_of, shown

COLUMNS = ("path", "label")

_EXAMPLE = "Expected UTF-8 text with the header path,label and one image per line"

logger = logging.getLogger(__name__)


def is_label_csv(path: str | Path) -> bool:
    """Return True if a path refers to an existing CSV file."""
    return Path(path).suffix.lower() == ".csv" and os.path.isfile(path)


def read_label_csv(path: str | Path) -> dict[str, tuple[str, int]]:
    """Read the image paths and labels in a CSV file.

    Additional columns and blank lines are ignored.

    Args:
        path: CSV file. Its image paths are relative to the folder that contains it.

    Returns:
        Dictionary from image path to a tuple with the label and the line number.

    Raises:
        UserError: If the file is not UTF-8, lacks a column, has an empty value, or has two
            different labels for an image. The message contains the line number.
    """
    rows: dict[str, tuple[str, int]] = {}
    repeated = 0
    for line, name, label in _rows(Path(path), _read_text(Path(path))):
        known, first = rows.setdefault(name, (label, line))
        if known != label:
            raise UserError(
                f"{path}, line {line}: {shown(name)} has the label {shown(label)}, but in line "
                f"{first} it has the label {shown(known)}; expected one label per image. Correct "
                "one of the lines."
            )
        repeated += first != line
    if not rows:
        raise UserError(f"{path} lists no images. {_EXAMPLE}.")
    if repeated:
        logger.warning("%s: ignoring %d lines that repeat an earlier line", path, repeated)
    return rows


def open_label_csv(
    path: str | Path, classes: list[str] | None = None, *, skip_missing: int = 0
) -> Images:
    """Find the images listed in a CSV file.

    Args:
        path: CSV file.
        classes: Class names in label order, as for
            :func:`~senet_transfer.data.images.folders.open_folder`. None to sort the labels by
            name.
        skip_missing: Maximum number of missing or empty images to skip. If there are more, an
            error is raised.

    Raises:
        UserError: If the file is invalid, an image is missing, or a label is not in `classes`.
    """
    path = Path(path)
    rows = read_label_csv(path)
    found = {label for label, _ in rows.values()}
    classes = sort_by_name(found, path) if classes is None else list(classes)
    matches = match_names(found, classes)
    for name, (label, line) in rows.items():
        if label not in matches:
            raise UserError(
                f"{path}, line {line}: the label of {shown(name)} is {shown(label)}; expected one "
                f"of {len(classes)} classes: {first_of(classes, 10)}. Use the same labels as in "
                "the training data."
            )
    root = path.absolute().parent
    names = [_existing(root, name) for name in rows]
    missing = [name for name in names if not os.path.exists(root / name)]
    if len(missing) > max(skip_missing, 0):
        where = [f"{shown(name)} (line {rows[name][1]})" for name in missing[:10]]
        raise UserError(
            f"{path}: {len(missing)} of {len(rows)} images do not exist: "
            f"{first_of(where + missing[10:], 10)}. Expected paths relative to {root}. Restore "
            "the images, or correct the file."
        )
    label_of = {name: label for label, name in enumerate(classes)}
    labels = np.array([label_of[matches[label]] for label, _ in rows.values()], np.int32)
    return find_listed_images(
        root, names, labels, classes, complete=False, skip_missing=skip_missing
    )


def _existing(root: Path, name: str) -> str:
    """Replace the backslashes in a Windows path with slashes, if the resulting path exists."""
    slashed = name.replace("\\", "/")
    return slashed if slashed != name and os.path.exists(root / slashed) else name


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}, line {line}: the text is not UTF-8 ({error.reason}). {_EXAMPLE}. Save the "
            "file again with UTF-8 encoding."
        ) from error
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error}. {_EXAMPLE}.") from error


def _rows(path: Path, text: str) -> Iterator[tuple[int, str, str]]:
    """Yield the line number, path and label of each row."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    line = 1
    try:
        for row in reader:
            values = [value.strip() for value in row]
            if values and not header:
                header = values
                _check_header(path, line, header)
            elif values:
                if len(values) != len(header):
                    raise UserError(
                        f"{path}, line {line}: found {len(values)} values; expected "
                        f"{len(header)}, as in the header. Put quotation marks around values that "
                        "contain a comma."
                    )
                name, label = (values[header.index(column)] for column in COLUMNS)
                for column, value in zip(COLUMNS, (name, label), strict=True):
                    if not value or "\0" in value:
                        raise UserError(
                            f"{path}, line {line}: the {column} is "
                            f"{'binary data' if value else 'empty'}; expected text. Correct or "
                            "remove the line."
                        )
                yield line, os.path.normpath(name), label
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}, line {line}: {error}. {_EXAMPLE}. Correct the quotation marks in this line."
        ) from error


def _check_header(path: Path, line: int, header: list[str]) -> None:
    for column in COLUMNS:
        if header.count(column) != 1:
            raise UserError(
                f"{path}, line {line}: the header has {header.count(column)} columns named "
                f"{column}: {shown(','.join(header))}. {_EXAMPLE}. Separate the columns with "
                "commas."
            )
