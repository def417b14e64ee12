"""Input images for inference: files, folders, glob patterns, lists, URLs, images in memory."""

import glob
import itertools
import os
import re
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from senet_transfer.data.detection.mapper import decode_image
from senet_transfer.data.images.channels import as_rgb, decode_channels, to_channels
from senet_transfer.data.images.decode import AS_STORED, Reading, decode_exact, to_rgb
from senet_transfer.data.images.file_types import is_hidden
from senet_transfer.data.images.listing import find_images
from senet_transfer.errors import UserError

VIDEO_SUFFIXES = (".avi", ".m3u8", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
_STREAMS = ("rtmp://", "rtp://", "rtsp://", "tcp://", "udp://")
_TIMEOUT = 30.0  # seconds


@dataclass(frozen=True, eq=False)
class Photo:
    """Input image for inference. A file is read when needed, and is not kept in memory.

    Attributes:
        source: Path, HTTP(S) URL, PIL image or pixels. RGB or grayscale pixels are a uint8 array
            ``(H, W, 3)`` or ``(H, W)``, or a uint8 tensor ``(3, H, W)`` or ``(1, H, W)``. If
            ``reading.channels`` is set, the pixels are an array ``(H, W, C)`` or a tensor
            ``(C, H, W)`` of any dtype.
        name: Path or URL, or a description of an image in memory.
        relative: Path of the image relative to the input folder. Output files are named after it.
        reading: Settings for reading the image.
    """

    source: Any
    name: str = "image"
    relative: str = ""
    reading: Reading = AS_STORED

    @classmethod
    def of(cls, source: Any, name: str = "image") -> "Photo":
        """Return the photo for a path, a URL or an image in memory."""
        if isinstance(source, Photo):
            return source
        if isinstance(source, str | os.PathLike):
            path = os.fspath(source)
            return cls(path, path, os.path.basename(path))
        return cls(source, name, name)

    def pillow(self) -> Image.Image:
        """Return the image for a classifier, as a PIL image in RGB.

        Raises:
            UserError: If the image can't be read.
        """
        if self.reading.channels:
            return Image.fromarray(self.pixels())
        try:
            if isinstance(self.source, str):
                return decode_exact(read_bytes(self.source), self.reading)
            return to_rgb(_in_memory(self.source), self.reading)
        except Exception as error:
            raise self._unreadable(error) from error

    def pixels(self) -> np.ndarray:
        """Return the image for a detector, as an RGB array ``(H, W, 3)``, uint8.

        Raises:
            UserError: If the image can't be read.
        """
        if self.reading.channels:
            return as_rgb(self.bands())
        if not isinstance(self.source, str):
            return np.asarray(self.pillow())
        try:
            return decode_image(read_bytes(self.source), "RGB", self.reading)
        # Decoders raise many types of exceptions for damaged files.
        except Exception as error:
            raise self._unreadable(error) from error

    def bands(self) -> np.ndarray:
        """Return all channels of the image as a uint8 array ``(H, W, C)``.

        Raises:
            UserError: If the image can't be read, or does not have ``reading.channels`` channels.
        """
        try:
            if isinstance(self.source, str):
                return decode_channels(read_bytes(self.source), self.reading)
            values = np.asarray(self.source)
            if isinstance(self.source, torch.Tensor) and values.ndim == 3:
                values = values.transpose(1, 2, 0)
            return to_channels(values, self.reading)
        except Exception as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> UserError:
        if isinstance(error, UserError):
            return error
        return UserError(f"{self.name} can't be read as an image: {error}. Remove this image.")


def _in_memory(image: Any) -> Image.Image:
    """Convert an image in memory to a PIL image."""
    if isinstance(image, Image.Image):
        return image
    found = image
    if isinstance(image, torch.Tensor):
        found = image.detach().cpu().numpy()
        if found.ndim == 3 and found.shape[0] in (1, 3):
            found = found.transpose(1, 2, 0)
    if isinstance(found, np.ndarray) and found.dtype == np.uint8:
        if found.ndim == 3 and found.shape[2] == 1:
            found = found[:, :, 0]
        if found.size and (found.ndim == 2 or (found.ndim == 3 and found.shape[2] == 3)):
            return Image.fromarray(np.ascontiguousarray(found))
    shape, dtype = getattr(image, "shape", ""), getattr(image, "dtype", "")
    given = " ".join(str(part) for part in (type(image).__name__, dtype, shape) if str(part))
    raise UserError(
        f"The image is a {given}; expected a path, a URL, a PIL image, or RGB or grayscale pixels "
        "of type uint8: an array (H, W, 3) or (H, W), or a tensor (C, H, W)."
    )


def read_bytes(name: str) -> bytes:
    """Return the contents of a file or an HTTP(S) URL."""
    if is_address(name):
        with urllib.request.urlopen(name, timeout=_TIMEOUT) as answer:
            return answer.read()
    return Path(name).read_bytes()


def is_address(name: str) -> bool:
    """Return whether a name is an HTTP(S) URL."""
    return name.startswith(("http://", "https://"))


def is_video(name: str) -> bool:
    """Return whether a name is the path or URL of a video, a stream URL, or a camera index."""
    if is_address(name):
        return name.partition("?")[0].lower().endswith(VIDEO_SUFFIXES)
    if name.startswith(_STREAMS) or (name.isdigit() and not os.path.exists(name)):
        return True
    return name.lower().endswith(VIDEO_SUFFIXES)


def find_photos(inputs: Iterable[str]) -> list[Photo]:
    """Find images by paths, URLs, folders, glob patterns and lists of images.

    Folders are searched recursively. A list is a ``.txt`` file with one path or URL per line. A
    path in a list is relative to the list's folder or, if it does not exist there, to the working
    directory.

    Returns:
        Each image once, sorted by name.

    Raises:
        UserError: If an input matches no image.
    """
    found: dict[str, Photo] = {}
    for name in inputs:
        photos = list(_photos(name))
        if not photos:
            raise UserError(
                f"No image matches {name}. Expected an image file, a folder with image files such "
                "as .jpg or .png, a pattern such as 'images/*.jpg', a .txt file with one path per "
                "line, or an HTTP(S) URL."
            )
        for photo in photos:
            found.setdefault(photo.name, photo)
    return [found[name] for name in sorted(found)]


def _photos(name: str) -> Iterator[Photo]:
    if is_address(name):
        yield Photo(name, name, os.path.basename(name.partition("?")[0]) or "image")
    elif os.path.isdir(name):
        for relative in itertools.chain(*find_images(name).values()):
            path = os.path.join(name, relative)
            yield Photo(path, path, relative)
    elif os.path.isfile(name) and name.lower().endswith(".txt"):
        yield from _listed(name)
    elif os.path.isfile(name):  # before patterns, because a file name may contain glob characters
        yield Photo.of(name)
    else:
        folder = os.path.dirname(re.split(r"[*?\[]", name)[0])
        for path in glob.glob(name, recursive=True):
            relative = os.path.relpath(path, folder or ".")
            if os.path.isfile(path) and not is_hidden(relative):
                yield Photo(path, path, relative)


def _listed(path: str) -> Iterator[Photo]:
    """Yield the images in a list file.

    Output files are named after the path in the list, or after the file name if the path is
    absolute or starts with "..".
    """
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} can't be read as a list of images: {error}. Expected a UTF-8 text file with "
            "one path or URL per line."
        ) from error
    for line in map(str.strip, lines):
        if line and not is_address(line):
            near = os.path.join(os.path.dirname(path), line)
            place = near if os.path.exists(near) else line
            if not os.path.isfile(place):
                raise UserError(f"{path} lists {line}, which is not a file. Correct the list.")
            relative = os.path.normpath(line)
            if os.path.isabs(relative) or relative.startswith(os.pardir):
                relative = os.path.basename(relative)
            yield Photo(place, place, relative)
        elif line:
            yield from _photos(line)
