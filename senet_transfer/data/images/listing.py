"""Labelled images in a folder or a tar archive."""

import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from senet_transfer.data.base import RawSample, make_key
from senet_transfer.errors import UserError
from senet_transfer.utils.text import first_of


@dataclass(frozen=True)
class Images:
    """Labelled images in a folder or an uncompressed tar archive.

    Attributes:
        root: The folder or the archive.
        names: Paths relative to the folder.
        labels: int32 `(N,)`, indices into `classes`.
        classes: Names of the classes.
        sizes: Sizes of the files in bytes, int64 `(N,)`.
        offsets: Byte offsets of the images in the archive, int64 `(N,)`; None for a folder.
        missing: Names of listed images that do not exist and were left out.
    """

    root: Path
    names: Sequence[str]
    labels: np.ndarray
    classes: list[str]
    sizes: np.ndarray
    offsets: np.ndarray | None = None
    missing: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> RawSample:
        """Read one image.

        Raises:
            UserError: If the image cannot be read, or its size has changed since it was listed.
        """
        offset = None if self.offsets is None else int(self.offsets[index])
        name = self.names[index]
        data = read_image_bytes(self.root, name, int(self.sizes[index]), offset)
        label = int(self.labels[index])
        return RawSample(make_key(name, index), label, data, os.path.join(self.root, name))


def read_image_bytes(root: Path, name: str, size: int, offset: int | None) -> bytes:
    """Read the bytes of an image from a folder, or from an archive if `offset` is given."""
    # os.path is used because creating a Path takes as long as reading a small file.
    where = os.path.join(root, name) if offset is None else root
    try:
        with open(where, "rb") as stream:
            if offset:
                stream.seek(offset)
            data = stream.read(size if offset is not None else -1)
    except OSError as error:
        raise UserError(f"cannot read {name} in {root}: {error}. Restore it.") from error
    if len(data) != size:
        raise UserError(
            f"{name} in {root} has {len(data)} bytes; expected {size}, its size when it was "
            "listed. Do not change the source while it is read, and start again."
        )
    return data


def find_listed_images(
    root: Path,
    names: Sequence[str],
    labels: np.ndarray,
    classes: list[str],
    *,
    complete: bool,
    skip_missing: int = 0,
) -> Images:
    """Find every listed image in a folder or an archive.

    Args:
        root: A folder, or a tar archive with all members in one folder, as in Places365.
        names: Paths relative to that folder.
        labels: Labels of the images, `(N,)`.
        classes: Names of the classes.
        complete: Raise an error for images that are not listed.
        skip_missing: The maximum number of missing images, which are left out. More are an error.

    Raises:
        UserError: If listed images are missing or empty, or unlisted ones exist with `complete`.
            The message names the first of them.
    """
    archived = not root.is_dir()
    found = _archive_members(root) if archived else _folder_files(root, names, complete)
    missing = [name for name in names if found.get(name, (0, 0))[1] == 0]
    if len(missing) > max(skip_missing, 0) or len(missing) == len(names):
        raise UserError(
            f"{len(missing)} of {len(names)} listed images are not in {root}, or are empty: "
            f"{first_of(missing)}. Expected every image of the list. Unpack the archive again, or "
            "use the matching list."
        )
    if complete and not set(found).issubset(names):
        extra = sorted(set(found).difference(names))
        raise UserError(
            f"{root} contains {len(extra)} images that are not in the list: {first_of(extra)}. "
            "Expected the list and the images of the same split. Use the matching list."
        )
    labels = np.asarray(labels, np.int32)
    if missing:
        absent = set(missing)
        keep = [index for index, name in enumerate(names) if name not in absent]
        names, labels = [names[index] for index in keep], labels[keep]
    sizes = np.array([found[name][1] for name in names], np.int64)
    offsets = np.array([found[name][0] for name in names], np.int64) if archived else None
    return Images(root, names, labels, classes, sizes, offsets, tuple(missing))


def _folder_files(root: Path, names: Sequence[str], complete: bool) -> dict[str, tuple[int, int]]:
    """Return the offset (always 0) and size of each file in a folder, by name."""
    found = {}
    for name in names:
        try:
            found[name] = (0, os.stat(root / name).st_size)
        except OSError:
            continue
    if complete:
        for folder, _, files in os.walk(root):
            for file in files:
                name = os.path.relpath(os.path.join(folder, file), root).replace(os.sep, "/")
                if is_image_name(name):
                    found.setdefault(name, (0, 1))
    return found


def is_image_name(name: str) -> bool:
    """Return True for the name of a JPEG or PNG file that is not hidden."""
    base = name.rpartition("/")[2].lower()
    return base.endswith((".jpg", ".jpeg", ".png")) and not base.startswith(".")


def _archive_members(archive: Path) -> dict[str, tuple[int, int]]:
    """Return the offset and size of each image in an archive, by path below its top folder."""
    members: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(archive, "r:") as tar:
            for member in tar:
                # TarFile keeps all members in memory, gigabytes for eight million images.
                tar.members = []  # type: ignore[attr-defined]  # not in typeshed
                name = member.name.removeprefix("./")
                if not member.isreg() or not is_image_name(name):
                    continue
                name = name.partition("/")[2] or name
                if name in members:
                    raise UserError(
                        f"{archive} contains {name} twice; expected each image once. Download the "
                        "archive again."
                    )
                members[name] = (member.offset_data, member.size)
            end = archive.stat().st_size
    except tarfile.ReadError as error:
        raise UserError(
            f"cannot read the archive {archive}: {error}. Expected a complete, uncompressed tar "
            "file. Compare its MD5 checksum with the data set's site, or unpack it."
        ) from error
    except OSError as error:
        raise UserError(f"cannot read the archive {archive}: {error}.") from error
    beyond = [name for name, (offset, size) in members.items() if offset + size > end]
    if beyond:
        raise UserError(
            f"the archive {archive} is truncated: {first_of(beyond)} extend beyond its {end} "
            "bytes. Download it again."
        )
    return members
