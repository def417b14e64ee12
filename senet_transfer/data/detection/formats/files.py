"""Functions for reading untrusted annotation files and finding their images.

All error messages contain the path of the file.
"""

import json
import math
import os
import reprlib
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, ParseError

from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import parse
from PIL import Image

from senet_transfer.data.images.decode import MAX_PIXELS, size_of
from senet_transfer.data.images.file_types import is_image_name
from senet_transfer.data.images.listing import walk
from senet_transfer.errors import UserError

# A few lines of YAML with aliases can describe a list with billions of elements.
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2


def shown(value: object) -> str:
    """Return a shortened representation of a value for error messages."""
    return _SHORT.repr(value)[:60]


def read_xml(path: str | Path) -> Element:
    """Return the root of an XML file.

    Raises:
        UserError: If the file can't be read, is not well-formed, or declares entities, which could
            expand to gigabytes or include the content of other files.
    """
    try:
        return parse(path).getroot()
    except DefusedXmlException as error:
        raise UserError(
            f"{path} declares an entity or an external file ({type(error).__name__}), which is not "
            "supported; expected plain XML as written by an annotation tool. Export the file again."
        ) from None
    except (ParseError, ValueError, LookupError) as error:
        raise UserError(f"{path} is not valid XML ({error}). Export the file again.") from None
    except OSError as error:
        raise _unreadable(path, error) from None


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        UserError: If the file can't be read or is not valid JSON.
    """
    try:
        return json.loads(read_text(path))
    # `json` raises ValueError for numbers with thousands of digits.
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}). Export the file again.") from None


def read_text(path: str | Path) -> str:
    """Return the content of a UTF-8 text file, with or without a byte order mark."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not valid UTF-8 text ({error}). Save the file as UTF-8."
        ) from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: str | Path, error: OSError) -> UserError:
    return UserError(f"Cannot read {path}: {error.strerror or error}. Check the file.")


def number(value: object, name: str, where: str) -> float:
    """Convert a number or a numeric string to a finite float.

    Args:
        value: The value in the file.
        name: The name of the value in the file, for the error message.
        where: The position in the file, for the error message.

    Raises:
        UserError: If the value is missing, not a number or not finite.
    """
    try:
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            found = float(value)
            if math.isfinite(found):
                return found
    except (ValueError, OverflowError):
        pass
    found_text = f"no {name}" if value is None else f"the {name} {shown(value)}"
    raise UserError(f"{where} has {found_text}; expected a finite number. Correct the file.")


def numbers(values: Any, name: str, where: str) -> list[float]:
    """Convert a list of numbers or numeric strings to a list of finite floats.

    The arguments ``name`` and ``where`` and the exceptions are as in :func:`number`.
    """
    if not isinstance(values, list | tuple):
        raise UserError(
            f"{where} has the {name} {shown(values)}; expected a list of numbers. Correct the file."
        )
    return [number(value, name, where) for value in values]


def points(values: Any, name: str, where: str) -> list[tuple[float, float]]:
    """Convert a non-empty list of points `[x, y]` to a list of tuples of finite floats.

    The arguments ``name`` and ``where`` and the exceptions are as in :func:`number`.
    """
    pairs = [numbers(pair, name, where) for pair in values] if isinstance(values, list) else []
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise UserError(
            f"{where} has the {name} {shown(values)}; expected a list of points [x, y]. "
            "Correct or remove the object."
        )
    return [(x, y) for x, y in pairs]


def image_sides(width: object, height: object, where: str) -> tuple[int, int]:
    """Return an image's width and height as integers.

    Raises:
        UserError: If a side is not a positive integer, or the image has too many pixels.
    """
    sides = number(width, "width", where), number(height, "height", where)
    if min(sides) < 1 or any(side != int(side) for side in sides):
        raise UserError(
            f"{where} has the size {width} x {height}; expected positive integers, in pixels. "
            "Correct the file."
        )
    if sides[0] * sides[1] > MAX_PIXELS:
        raise UserError(
            f"{where} has the size {width} x {height}; at most {MAX_PIXELS} pixels are supported. "
            "Correct the size, or split the image."
        )
    return int(sides[0]), int(sides[1])


def label_text(value: object, where: str) -> str:
    """Return a class name without leading and trailing spaces.

    Raises:
        UserError: If the name is not a string or is empty.
    """
    if isinstance(value, str) and value.strip():
        return value.strip()
    found = "no label" if value is None else f"the label {shown(value)}"
    raise UserError(f"{where} has {found}; expected a class name. Correct the file.")


class ImageFolder:
    """Image folder of a dataset, to which the file names of the images are relative."""

    def __init__(self, root: str | Path, *, upright: bool = True):
        """
        Args:
            root: Path of the folder.
            upright: Whether the annotations refer to the images with EXIF orientation applied.

        Raises:
            UserError: If the folder does not exist.
        """
        self.root, self.upright = os.path.abspath(root), upright
        if not os.path.isdir(self.root):
            raise UserError(
                f"Image folder {self.root} does not exist; expected the folder with the images. "
                "Check the path."
            )
        self._by_stem: dict[str, str] | None = None

    def name_of(self, name: object, base: str | Path, where: str) -> str:
        """Return the path of an image relative to the image folder.

        Args:
            name: The path in the annotation file.
            base: The folder to which this path is relative.
            where: The position in the annotation file, for the error message.

        Raises:
            UserError: If the path is not a string or is outside the image folder.
        """
        if not isinstance(name, str) or not name.strip() or "\0" in name:
            raise UserError(
                f"{where} specifies the image {shown(name)}; expected a file path. Correct the "
                "file."
            )
        path = os.path.normpath(os.path.join(base, name.replace("\\", "/")))
        relative = os.path.relpath(path, self.root)
        if relative.split(os.sep)[0] == os.pardir:
            raise UserError(
                f"{where} specifies the image {name!r}, which is outside the image folder "
                f"{self.root}. Correct the path, or specify the folder that contains all images."
            )
        return relative

    def exists(self, name: str) -> bool:
        """Return True if an image with this relative path exists."""
        return os.path.isfile(os.path.join(self.root, name))

    def with_stem(self, stem: str) -> str | None:
        """Find an image by its relative path without extension.

        Returns:
            The relative path with extension, or None if there is no such image.
        """
        if self._by_stem is None:
            names = list_files(self.root, is_image_name)
            self._by_stem = {os.path.splitext(name)[0]: name for name in reversed(names)}
        return self._by_stem.get(stem)

    def size(self, name: str, where: str) -> tuple[int, int]:
        """Return the width and height of an image, read from its file header.

        Raises:
            UserError: If the image is missing or damaged.
        """
        path = os.path.join(self.root, name)
        try:
            with Image.open(path) as image:
                return size_of(image, upright=self.upright)
        except MemoryError:
            raise
        except Exception as error:  # Pillow raises exceptions of many types for damaged files
            missing = isinstance(error, FileNotFoundError)
            found = "does not exist" if missing else f"can't be read ({error})"
            raise UserError(
                f"{where} lists the image {path}, which {found}; expected an image whose size can "
                "be read. Restore the image, or specify the folder that contains the images."
            ) from None


def list_files(root: str | Path, accept: Any) -> list[str]:
    """Return the sorted relative paths of the files in a folder and its subfolders.

    Hidden files and folders are skipped.

    Args:
        root: Path of the folder.
        accept: Function that returns True for the relative paths to list.
    """
    if not os.path.isdir(root):
        return []
    names = (os.path.join(folder, name) for folder, _, files in walk(root) for name in files)
    return sorted(filter(accept, names))


def images_next_to(location: Path) -> Path:
    """Return the folder `images` next to a file or, if there is none, the file's own folder."""
    return first_folder(location.parent, "images")


def first_folder(root: Path, *names: str) -> Path:
    """Return the first of the named subfolders that exists; if none exists, return `root`."""
    return next((root / name for name in names if (root / name).is_dir()), root)
