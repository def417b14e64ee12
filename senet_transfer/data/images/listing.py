"""Images that lie in a folder or in an archive, with their labels: what conversion starts from."""

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
        root: the folder, or the archive.
        names: paths below the folder.
        labels: `(N,)` int32, positions in `classes`.
        classes: names.
        sizes: `(N,)` int64, of the files in bytes.
        offsets: `(N,)` int64, where each image begins in the archive; None for a folder.
        missing: listed images that are not there and were left out.
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
        """Reads one image.

        Raises:
            UserError: it cannot be read, or has changed since it was listed.
        """
        offset = None if self.offsets is None else int(self.offsets[index])
        name = self.names[index]
        data = read_image_bytes(self.root, name, int(self.sizes[index]), offset)
        label = int(self.labels[index])
        return RawSample(make_key(name, index), label, data, os.path.join(self.root, name))


def read_image_bytes(root: Path, name: str, size: int, offset: int | None) -> bytes:
    """Read an image's bytes from a folder, or from an archive where `offset` is given."""
    # Joined as text: a Path takes as long as reading a small file.
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
            f"{name} in {root} has {len(data)} bytes, expected the {size} that it had when it was "
            "listed. Leave the source as it is while it is read, and start again."
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
        root: a folder, or a tar archive whose members lie in one folder, as Places365's do.
        names: paths below it.
        labels: `(N,)`.
        classes: names.
        complete: whether images that are not listed are an error too.
        skip_missing: this many listed images that are not there are left out.

    Raises:
        UserError: listed images are missing or empty, or there are others; all are named up to a
            limit.
    """
    archived = not root.is_dir()
    found = _archive_members(root) if archived else _folder_files(root, names, complete)
    missing = [name for name in names if found.get(name, (0, 0))[1] == 0]
    if len(missing) > max(skip_missing, 0) or len(missing) == len(names):
        raise UserError(
            f"{len(missing)} of {len(names)} listed images are not in {root}, or empty: "
            f"{first_of(missing)}. Expected every image of the list; unpack the archive again, or "
            "use the list that belongs to it."
        )
    if complete and not set(found).issubset(names):
        extra = sorted(set(found).difference(names))
        raise UserError(
            f"{root} holds {len(extra)} images that the list does not name: {first_of(extra)}. "
            "Expected the list and the images of one split; use the list that belongs to it."
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
    """Offset (always 0) and size of the files in a folder, by name."""
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
    """Says whether a file is taken for an image; hidden files are not."""
    base = name.rpartition("/")[2].lower()
    return base.endswith((".jpg", ".jpeg", ".png")) and not base.startswith(".")


def _archive_members(archive: Path) -> dict[str, tuple[int, int]]:
    """Offset and size of the images in an archive, by their path below its top folder."""
    members: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(archive, "r:") as tar:
            for member in tar:
                # The archive keeps every member it has seen, gigabytes for eight million.
                tar.members = []  # type: ignore[attr-defined]  # not in typeshed
                name = member.name.removeprefix("./")
                if not member.isreg() or not is_image_name(name):
                    continue
                name = name.partition("/")[2] or name
                if name in members:
                    raise UserError(
                        f"{archive} holds {name} twice. Expected each image once; download the "
                        "archive again."
                    )
                members[name] = (member.offset_data, member.size)
            end = archive.stat().st_size
    except tarfile.ReadError as error:
        raise UserError(
            f"cannot read the archive {archive}: {error}. Expected an uncompressed tar file that "
            "is whole; compare its md5 with the data set's site, or unpack it."
        ) from error
    except OSError as error:
        raise UserError(f"cannot read the archive {archive}: {error}.") from error
    beyond = [name for name, (offset, size) in members.items() if offset + size > end]
    if beyond:
        raise UserError(
            f"the archive {archive} is cut short: {first_of(beyond)} reach beyond its {end} bytes. "
            "Download it again."
        )
    return members
