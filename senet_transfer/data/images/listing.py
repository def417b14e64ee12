"""Lists of images in a folder or tar archive."""

import logging
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from senet_transfer.data.base import RawSample, make_key
from senet_transfer.data.images.file_types import is_array_name, is_hidden, is_image_name
from senet_transfer.errors import UserError
from senet_transfer.utils.text import first_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Images:
    """Labelled images in a folder or an uncompressed tar archive.

    Attributes:
        root: Folder or archive.
        names: Image paths relative to the folder, or to the top-level folder of the archive.
        labels: Indices into `classes`, int32 `(N,)`.
        classes: Class names.
        sizes: File sizes in bytes, int64 `(N,)`.
        offsets: Byte offsets of the images in the archive, int64 `(N,)`; None for a folder.
        missing: Names of listed images that are missing or empty and were left out.
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
    """Read an encoded image from a folder, or from an archive if `offset` is given."""
    # `os.path` is used because creating a `Path` takes as long as reading a small file.
    where = os.path.join(root, name) if offset is None else root
    try:
        with open(where, "rb") as stream:
            if offset:
                stream.seek(offset)
            data = stream.read(size if offset is not None else -1)
    except OSError as error:
        raise UserError(
            f"Cannot read {name} in {root}: {error}. Check that the file exists and is readable."
        ) from error
    if len(data) != size:
        raise UserError(
            f"{name} in {root} has a size of {len(data)} bytes; expected {size} bytes, its size "
            "when the images were listed. Run the command again, and do not change the images "
            "while it runs."
        )
    return data


def find_images(root: str | Path) -> dict[str, list[str]]:
    """Return the images in a folder and its subfolders, and warn about other files.

    NumPy arrays are only treated as images if there are no other images.

    Returns:
        Dictionary from folder to sorted image paths. All paths are relative to the root; the key ""
        is the root itself. Folders without images are included if they have no subfolders.

    Raises:
        UserError: If a folder cannot be read, or a symbolic link is broken.
    """
    images: dict[str, list[str]] = {}
    others: dict[str, list[str]] = {}
    leaves = set()
    for folder, folders, files in walk(root):
        paths = [os.path.join(folder, name) for name in files]
        images[folder] = [path for path in paths if is_image_name(path)]
        others[folder] = [path for path in paths if not is_image_name(path)]
        if folder and not folders:
            leaves.add(folder)
    if not any(images.values()):
        for folder, paths in others.items():
            images[folder] = [path for path in paths if is_array_name(path)]
            others[folder] = [path for path in paths if not is_array_name(path)]
    for folder, paths in others.items():
        for path in paths:
            # The link may stand for a class folder, without which the labels would differ.
            if os.path.islink(link := os.path.join(root, path)) and not os.path.exists(link):
                raise UserError(
                    f"The link {link} points to {os.readlink(link)}, which does not exist. Restore "
                    "the target or remove the link."
                )
        if paths:
            logger.warning(
                "Ignoring %d files in %s that are not images: %s",
                len(paths),
                os.path.join(root, folder).rstrip(os.sep),
                first_of(map(os.path.basename, paths)),
            )
    return {folder: paths for folder, paths in images.items() if paths or folder in leaves}


def walk(
    root: str | Path, folder: str = "", parents: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield each folder's path, and the sorted names of its subfolders and files.

    Hidden files and folders are left out. Symbolic links to folders are followed. A link to a
    folder that contains the link is left out with a warning.

    Args:
        root: Folder to list.
        folder: Subfolder to start from, relative to the root.
        parents: Device and inode numbers of the folders that contain `folder`.

    Raises:
        UserError: If a folder cannot be read.
    """
    path = os.path.join(root, folder)
    folders, files = [], []
    try:
        parents |= {_inode(path)}
        with os.scandir(path) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    continue
                if not entry.is_dir():
                    files.append(entry.name)
                elif entry.is_symlink() and _inode(entry.path) in parents:
                    logger.warning(
                        "Ignoring the link %s, because it points to one of its parent folders.",
                        entry.path,
                    )
                else:
                    folders.append(entry.name)
    except OSError as error:
        raise UserError(
            f"Cannot read the folder {path}: {error}. Without its images, the dataset would be "
            "incomplete. Make the folder readable, for example with chmod u+rx, or remove it."
        ) from error
    yield folder, sorted(folders), sorted(files)
    for name in sorted(folders):
        yield from walk(root, os.path.join(folder, name), parents)


def _inode(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def find_listed_images(
    root: Path,
    names: Sequence[str],
    labels: np.ndarray,
    classes: list[str],
    *,
    complete: bool,
    skip_missing: int = 0,
    members: dict[str, tuple[int, int]] | None = None,
) -> Images:
    """Find every listed image in a folder or an archive.

    Args:
        root: Folder, or tar archive with a single top-level folder, as in Places365.
        names: Image paths relative to the folder or to the archive's top-level folder.
        labels: Image labels, `(N,)`.
        classes: Class names.
        complete: Whether to raise an error if the folder or archive contains images that are not
            listed.
        skip_missing: Maximum number of missing images to skip. If there are more, an error is
            raised.
        members: Result of :func:`archive_members` for an archive; None to read the archive.

    Raises:
        UserError: If too many listed images are missing or empty, or if `complete` is True and
            there are unlisted images. The message contains the first paths.
    """
    archived = not root.is_dir()
    if not archived:
        found = _folder_files(root, names, complete)
    else:
        found = archive_members(root) if members is None else members
    missing = [name for name in names if found.get(name, (0, 0))[1] == 0]
    if len(missing) > max(skip_missing, 0) or len(missing) == len(names):
        raise UserError(
            f"{len(missing)} of {len(names)} listed images are empty or missing from {root}: "
            f"{first_of(missing)}. Expected all listed images. Unpack the archive again, or use "
            "the matching list."
        )
    if complete and not set(found).issubset(names):
        extra = sorted(set(found).difference(names))
        raise UserError(
            f"{root} contains {len(extra)} images that are not in the list: {first_of(extra)}. "
            "Expected a list and images of the same split. Use the matching list."
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
    """Return a dictionary from image path to (0, size), in the format of :func:`archive_members`.

    The dictionary contains those images in ``names`` that exist. If ``complete`` is True, it also
    contains all other images in the folder. Their sizes are not needed, so they are set to 1.
    """
    found = {}
    for name in names:
        try:
            found[name] = (0, os.stat(root / name).st_size)
        except OSError:
            continue
    if complete:
        for folder, _, files in walk(root):
            for name in (os.path.join(folder, file) for file in files):
                if is_image_name(name):
                    found.setdefault(name, (0, 1))
    return found


def archive_members(archive: Path) -> dict[str, tuple[int, int]]:
    """Return a dictionary from image path to (offset, size) for an uncompressed tar archive.

    The paths do not include the top-level folder. In an archive of archives, such as ImageNet's
    training images, each nested archive is treated as a folder.

    Raises:
        UserError: If the archive is damaged, or contains an image twice.
    """
    members: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(archive, "r:") as tar:
            for name, offset, size in _images_in(tar):
                if name in members:
                    raise UserError(
                        f"{archive} contains {name} twice; expected each image once. Download the "
                        "archive again."
                    )
                members[name] = (offset, size)
            end = archive.stat().st_size
    except tarfile.ReadError as error:
        raise UserError(
            f"Cannot read archive {archive}: {error}. Expected a complete, uncompressed tar file. "
            "Compare its MD5 checksum with that on the dataset's website, or unpack it."
        ) from error
    except OSError as error:
        raise UserError(f"Cannot read archive {archive}: {error}. Check the file.") from error
    beyond = [name for name, (offset, size) in members.items() if offset + size > end]
    if beyond:
        raise UserError(
            f"Archive {archive} is truncated: it ends at byte {end}, before the end of "
            f"{first_of(beyond)}. Download it again."
        )
    return members


def _images_in(tar: tarfile.TarFile) -> Iterator[tuple[str, int, int]]:
    """Yield the path, offset and size of each image in an archive and its nested archives."""
    for member in tar:
        # TarFile would keep all members in memory: gigabytes for eight million images.
        tar.members = []  # type: ignore[attr-defined]  # not in typeshed
        name = member.name.removeprefix("./")
        if not member.isreg():
            continue
        if name.endswith(".tar") and (file := tar.extractfile(member)):
            folder = os.path.basename(name).removesuffix(".tar")
            with tarfile.open(fileobj=file, mode="r:") as inner:
                for image, offset, size in _images_in(inner):
                    yield f"{folder}/{image}", member.offset_data + offset, size
        elif is_image_name(name):
            yield name.partition("/")[2] or name, member.offset_data, member.size
