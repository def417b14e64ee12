"""Support for shards without a manifest, such as those written by webdataset.

A sample consists of consecutive members with the same name up to the first dot: an image and a
label. The label is an integer, either in a `.cls` file, or in the entry `label` or `cls` of a
`.json` file. Other members, such as captions, are ignored. When the dataset is opened, the headers
are read once to count and locate the samples.
"""

import hashlib
import json
import logging
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from senet_transfer.data.images.file_types import is_hidden, is_image_name
from senet_transfer.data.images.listing import walk
from senet_transfer.data.shards.manifest import MANIFEST, Manifest, Shard
from senet_transfer.data.shards.storage import PLAIN_NAME
from senet_transfer.errors import UserError
from senet_transfer.utils.atomic_io import atomic_file
from senet_transfer.utils.progress import progress
from senet_transfer.utils.text import first_of

# Value of `Manifest.plan` for shards not written by this project.
FOREIGN = "shards of another program"

# Maximum size of a label file. Larger files are not read.
_MAX_LABEL = 1 << 20

# File extensions of tar files, the first without compression.
_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")

# First bytes of compressed files, and the programs and file extensions for them.
_COMPRESSED = {
    b"\x1f\x8b": ("gunzip", ".gz"),
    b"BZh": ("bunzip2", ".bz2"),
    b"\xfd7zXZ\x00": ("unxz", ".xz"),
    b"\x28\xb5\x2f\xfd": ("unzstd", ".zst"),
}

# Words in the names of shards, by split.
_SPLITS = {
    "train": {"train", "training", "trainval"},
    "val": {"dev", "val", "valid", "validation"},
    "test": {"test", "testing"},
}

logger = logging.getLogger(__name__)


def scan_shards(
    paths: Sequence[Path], classes: list[str] | None = None, *, checksums: bool = False
) -> tuple[Manifest, list[np.ndarray]]:
    """Count and locate the samples in shards without a manifest.

    Args:
        paths: Tar files in one folder.
        classes: Class names in label order. None to use the names "0", "1" and so on, up to the
            largest label.
        checksums: Whether to compute the checksums of the files. This requires reading the complete
            files.

    Returns:
        The manifest, and the index of each shard, int64 `(n, 3)` with each image's offset, size and
        label.

    Raises:
        UserError: If a file is not a complete, uncompressed tar file of labelled images, or its
            name contains unsupported characters.
    """
    odd = [path.name for path in paths if not PLAIN_NAME.fullmatch(path.name)]
    if odd:
        raise UserError(
            f"Cannot read the shards {first_of(odd, 3)} in {paths[0].parent}; expected names that "
            "consist of letters, digits, '.', '-' and '_'. Rename the files."
        )
    _check_uncompressed(paths)
    indices = []
    for path in progress(paths, unit="shard", desc="count", quiet=len(paths) < 16):
        indices.append(_scan(path))
    largest = max(int(index[:, 2].max()) for index in indices)
    if classes is None:
        classes = [str(label) for label in range(largest + 1)]
    elif largest >= len(classes):
        raise UserError(
            f"The shards in {paths[0].parent} have labels up to {largest}, but there are "
            f"{len(classes)} classes; expected labels from 0 to {len(classes) - 1}. List all "
            "classes, or use data with these classes."
        )
    shards = [
        Shard(
            path.name,
            len(index),
            path.stat().st_size,
            _checksum(path) if checksums else "",
            dict(Counter(index[:, 2].tolist())),
        )
        for path, index in zip(paths, indices, strict=True)
    ]
    manifest = Manifest(classes, shards, plan=FOREIGN)
    logger.info(
        "%s: found %d images with labels for %d classes in %d shards. There is no manifest (%s).",
        paths[0].parent, manifest.samples, largest + 1, len(shards), MANIFEST,
    )  # fmt: skip
    return manifest, indices


def is_shard_name(name: str) -> bool:
    """Return True if a file name has the extension of a tar file or a compressed tar file."""
    return name.endswith(_SUFFIXES)


def find_shards(folder: Path) -> list[Path]:
    """Return the tar files in a folder that has no class folders, sorted by name.

    If there are uncompressed tar files, compressed files with a different name pattern, such as
    ``annotations.tar.gz``, are ignored with a warning. Names that differ only in their numbers have
    the same pattern.

    Raises:
        UserError: If the folder cannot be read, or the tar files belong to several splits.
    """
    _, folders, files = next(walk(folder))
    names = [] if folders else list(filter(is_shard_name, files))
    plain = {_pattern(name) for name in names if name.endswith(".tar")}
    ignored = [name for name in names if plain and _pattern(name) not in plain]
    if ignored:
        logger.warning(
            "Ignoring %d compressed files in %s, because their names do not match the naming "
            "pattern of the uncompressed shards. Ignored files: %s",
            len(ignored),
            folder,
            first_of(ignored),
        )
    names = [name for name in names if name not in ignored]
    patterns = sorted({re.sub(r"\d+", "*", name) for name in names})
    # Shards whose names contain no split are training data.
    if len({_split_of(pattern) or "train" for pattern in patterns}) > 1:
        example = next(filter(_split_of, patterns))
        raise UserError(
            f"{folder} contains the shards of several splits: {first_of(patterns)}. Expected one "
            f"split. Pass the pattern of a split, such as '{folder / example}', or move each split "
            "to its own folder."
        )
    return [folder / name for name in names]


def _pattern(name: str) -> str:
    """Return a shard's name without the file extension and with ``*`` for each number."""
    suffix = next(filter(name.endswith, _SUFFIXES))
    return re.sub(r"\d+", "*", name.removesuffix(suffix))


def _split_of(name: str) -> str | None:
    """Return the split named in a shard's file name, or None if the name contains no split."""
    words = set(re.findall("[a-z]+", name.lower()))
    return next((split for split, synonyms in _SPLITS.items() if words & synonyms), None)


def write_manifest(folder: str | Path, classes: list[str] | None = None) -> Manifest:
    """Write a manifest and index files for shards written by another tool.

    Args:
        folder: Folder with tar files.
        classes: Class names in label order; None to use the names "0", "1" and so on.

    Raises:
        UserError: If the folder already contains a manifest, or its files are not shards of
            labelled images.
    """
    folder = Path(folder)
    if (folder / MANIFEST).exists():
        raise UserError(
            f"{folder / MANIFEST} already exists. Delete this file to write a new manifest."
        )
    paths = find_shards(folder) if folder.is_dir() else []
    if not paths:
        raise UserError(
            f"{folder} contains no shards; expected a folder with .tar files and without "
            "subfolders. Check the path."
        )
    manifest, indices = scan_shards(paths, classes, checksums=True)
    try:
        for shard, index in zip(manifest.shards, indices, strict=True):
            with atomic_file(folder / shard.index_name) as stream:
                np.save(stream, index)
        manifest.save(folder)
    except OSError as error:
        raise UserError(
            f"Cannot write to {folder}: {error}. Copy the shards to a writable folder first."
        ) from error
    return manifest


def _check_uncompressed(paths: Sequence[Path]) -> None:
    """Raise a UserError if a file is compressed, even if its name ends in `.tar`."""
    commands = {}
    for path in paths:
        try:
            with open(path, "rb") as stream:
                start = stream.read(8)
        except OSError as error:
            raise UserError(f"Cannot read shard {path}: {error}. Check the file.") from error
        for magic, (program, suffix) in _COMPRESSED.items():
            if start.startswith(magic):
                name = path.name
                commands[name] = f"{program} {name}"
                if name.endswith(".tar"):
                    commands[name] = f"mv {name} {name}{suffix} && {program} {name}{suffix}"
    if commands:
        raise UserError(
            f"{len(commands)} of {len(paths)} shards in {paths[0].parent} are compressed: "
            f"{first_of(commands)}. Expected uncompressed tar files, because images are read at "
            f"arbitrary byte offsets. Decompress the shards: {next(iter(commands.values()))}"
        )


def _scan(path: Path) -> np.ndarray:
    """Read a tar file, and return the offset, size and label of each image, int64 `(n, 3)`."""
    rows = []
    try:
        size = path.stat().st_size
        with open(path, "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for key, members in _samples(tar, path):
                rows.append(_row(path, key, members, stream))
            # A file without an end marker is truncated, but tarfile does not report an error.
            stream.seek(tar.offset)
            complete = stream.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except (OSError, tarfile.TarError, EOFError) as error:
        raise UserError(
            f"Cannot read shard {path}: {error}. Expected a complete, uncompressed tar file. Copy "
            "it again."
        ) from error
    if not rows:
        raise UserError(
            f"Shard {path} contains no samples. Without {MANIFEST}, each image requires a label in "
            "a .cls or .json file of the same name, as in webdataset."
        )
    index = np.array(rows, np.int64)
    if not complete or int((index[:, 0] + index[:, 1]).max()) > size:
        raise UserError(
            f"Shard {path} is truncated or damaged: after {len(rows)} samples, it ends at byte "
            f"{size} without the end marker of a tar file. Copy it again."
        )
    return index


def _samples(tar: tarfile.TarFile, path: Path) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Yield the key of each sample, and its tar members in a dict keyed by file extension.

    Raises:
        UserError: If a sample contains two members with the same name.
    """
    key, members = "", dict[str, tarfile.TarInfo]()
    for member in tar:
        # TarFile would keep all members in memory.
        tar.members = []  # type: ignore[attr-defined]  # not in typeshed
        name = member.name.removeprefix("./")
        if not member.isreg() or is_hidden(name):
            continue
        folder, _, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        if not extension:  # as in webdataset
            continue
        found = f"{folder}/{stem}" if folder else stem
        if found != key and members:
            yield key, members
            members = {}
        key = found
        if members.setdefault(extension.lower(), member) is not member:
            raise UserError(
                f"Shard {path} contains {name} twice in a row; expected one file of this name per "
                "sample, as in webdataset. Write the shard again with a different key for each "
                "sample."
            )
    if members:
        yield key, members


def _row(
    path: Path, key: str, members: dict[str, tarfile.TarInfo], stream: BinaryIO
) -> tuple[int, int, int]:
    images = [name for name in members if is_image_name(f"image.{name}")]
    label = _label(members, stream)
    if len(images) != 1 or label is None:
        raise UserError(
            f"Sample {key} in shard {path} has {len(images)} images and the members "
            f"{first_of(members)}; expected one image, and its label as a number in {key}.cls or "
            f'as "label" in {key}.json. Convert the data to one folder per class, or write the '
            "shards in this format."
        )
    image = members[images[0]]
    return image.offset_data, image.size, label


def _label(members: dict[str, tarfile.TarInfo], stream: BinaryIO) -> int | None:
    for name in ("cls", "json"):
        member = members.get(name)
        if member is None or member.size > _MAX_LABEL:
            continue
        before = stream.tell()
        stream.seek(member.offset_data)
        data = stream.read(member.size)
        stream.seek(before)
        try:
            value = json.loads(data)
        except ValueError:
            continue
        if isinstance(value, dict):
            value = value.get("label", value.get("cls"))
        if type(value) is int and 0 <= value < 2**31:
            return value
    return None


def _checksum(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
