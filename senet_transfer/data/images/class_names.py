"""Class order of a dataset, which determines the labels."""

import logging
import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from senet_transfer.errors import UserError
from senet_transfer.utils.text import first_of

NUMERIC = "numeric"

_SHOWN = 12

logger = logging.getLogger(__name__)


def sort_by_name(names: Iterable[str], root: str | Path) -> list[str]:
    """Sort class names as torchvision's ImageFolder does, and warn if the names are numbers.

    Sorted as text, "10" precedes "9". If the class order in evaluation differs from that in
    training, predictions are compared with the wrong labels.

    Args:
        names: Class names.
        root: Folder or file of the dataset; used in the warning.
    """
    by_name = sorted(names)
    if all(map(_is_number, by_name)):
        by_number = _sort_by_number(by_name)
        if by_number != by_name:
            logger.warning(
                "The class names in %s are numbers. They are sorted alphabetically, as in "
                "torchvision's ImageFolder: %s. The numeric order would be: %s. To use the numeric "
                "order, add --classes numeric.",
                root,
                first_of(by_name, _SHOWN),
                first_of(by_number, _SHOWN),
            )
    return by_name


def sort_by_number(names: Iterable[str], root: str | Path) -> list[str]:
    """Sort class names that are whole numbers by their numeric value.

    Raises:
        UserError: If a name is not a whole number.
    """
    others = sorted(name for name in names if not _is_number(name))
    if others:
        raise UserError(
            f"--classes {NUMERIC} requires numeric class names, but {len(others)} classes in "
            f"{root} are not numbers: {first_of(others)}. Rename these classes, or pass a file "
            "with one class name per line."
        )
    return _sort_by_number(names)


def read_class_list(path: str | Path) -> list[str]:
    """Read a file with one class name per line, in label order.

    Raises:
        UserError: If the file cannot be read, is empty or contains a name twice.
    """
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"Cannot read the class list {path}: {error}. Expected the value {NUMERIC}, or a UTF-8 "
            "text file with one class name per line in label order."
        ) from error
    names = [line for line in lines if line.strip()]
    twice = sorted({name for name in names if names.count(name) > 1}) if names else []
    if not names or twice:
        found = f"contains {first_of(twice)} more than once" if twice else "is empty"
        raise UserError(
            f"The class list {path} {found}; expected each class name once, one per line, in label "
            "order. Correct the file."
        )
    return names


def match_names(found: Iterable[str], classes: Iterable[str]) -> dict[str, str]:
    """Match class folders with class names, even if the names have different Unicode forms.

    macOS and some archives store an accented letter as a letter and a combining accent (NFD). Other
    systems store it as one character (NFC).

    Args:
        found: Names of class folders.
        classes: Class names.

    Returns:
        Dictionary from folder name to class name, without the folders that match no class.
    """
    known = set(classes)
    forms = {normal_form(name): name for name in known}
    matches = {}
    for name in found:
        if name in known:
            matches[name] = name
        elif normal_form(name) in forms:
            matches[name] = forms[normal_form(name)]
    return matches


def normal_form(name: str) -> str:
    """Convert a name to the Unicode normalization form NFC."""
    return unicodedata.normalize("NFC", name)


def check_encoding(names: Iterable[str], root: str | Path) -> None:
    """Raise a UserError for class names that are not valid UTF-8, which a model can't store."""
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"The name of the class folder {os.fsencode(name)!r} in {root} is not valid UTF-8, "
                "so it can't be stored with the model. Rename the folder, for example with convmv "
                "-f latin1 -t utf8."
            ) from error


def _is_number(name: str) -> bool:
    return re.fullmatch(r"-?[0-9]{1,18}", name) is not None


def _sort_by_number(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (int(name), name))
