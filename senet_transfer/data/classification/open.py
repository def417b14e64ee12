"""Functions for opening shards, folders and archives as classification datasets.

A dataset is a sequence of units, which are shards or single images. This module reads the units,
and `sampling` assigns them to processes.
"""

import functools
import glob
import logging
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from webdataset.shardlists import expand_urls

from senet_transfer.data.base import ClassificationDataset, RawSample, SingleImages, make_key
from senet_transfer.data.images import imagenet, places365
from senet_transfer.data.images.folders import open_folder
from senet_transfer.data.images.label_csv import is_label_csv, open_label_csv
from senet_transfer.data.images.listing import Images, walk
from senet_transfer.data.shards.cache import ShardCache
from senet_transfer.data.shards.manifest import (
    MANIFEST,
    Manifest,
    Shard,
    load_manifest,
    parse_index,
)
from senet_transfer.data.shards.scan import FOREIGN, find_shards, is_shard_name, scan_shards
from senet_transfer.data.shards.storage import (
    RemoteOptions,
    is_remote,
    join,
    local_path,
    missing_files,
    open_stream,
    read_bytes,
    read_range,
)
from senet_transfer.data.shards.tar import check_member, read_shard
from senet_transfer.errors import UserError
from senet_transfer.utils.text import differences, first_of

logger = logging.getLogger(__name__)


class ImageDataset(SingleImages):
    """Dataset of images in a folder or archive, or listed in a CSV file."""

    def __init__(self, images: Images, origin: str | None = None):
        super().__init__(images.classes, len(images), origin or str(images.root))
        self.images = images

    def labels(self) -> np.ndarray:
        return self.images.labels

    def read_sample(self, index: int) -> RawSample:
        return self.images.read(index)


class ShardDataset(ClassificationDataset):
    """Dataset of tar shards that are listed in a manifest. Each shard is read sequentially."""

    def __init__(
        self,
        manifest: Manifest,
        base: str,
        storage: RemoteOptions,
        cache: ShardCache | None = None,
        indices: Sequence[np.ndarray] = (),
    ):
        """
        Args:
            manifest: Shard manifest.
            base: Path or URL of the shard folder.
            storage: Options for reading remote files.
            cache: Cache for local copies of remote shards; None to read remote shards without
                copying.
            indices: Index of each shard, int64 ``(n, 3)``, with each image's offset, size and
                label. If empty, each shard's index file is read on first use.
        """
        sizes = np.array([shard.samples for shard in manifest.shards], np.int64)
        super().__init__(manifest.classes, sizes, base)
        self.manifest = manifest
        self.storage = storage
        self.cache = cache
        self._indices = dict(enumerate(indices))

    def read_unit(self, unit: int, skip: int = 0) -> Iterator[RawSample]:
        shard = self.manifest.shards[unit]
        url = self._url(shard)
        if self.manifest.plan == FOREIGN:
            first = int(self._ends[unit]) - shard.samples
            for index in range(first + skip, first + shard.samples):
                yield self.read_sample(index)
            return
        with open_stream(url, self.storage, shard.bytes) as stream:
            samples = read_shard(stream, url, samples=shard.samples, num_classes=self.num_classes)
            yield from islice(samples, skip, None)

    def labels(self) -> np.ndarray:
        return np.concatenate([self._index(unit)[:, 2] for unit in range(len(self.unit_sizes))])

    def read_sample(self, index: int) -> RawSample:
        ends = self._ends
        unit = int(np.searchsorted(ends, index, side="right"))
        row = index - (int(ends[unit - 1]) if unit else 0)
        offset, size, label = (int(value) for value in self._index(unit)[row])
        url = self._url(self.manifest.shards[unit])
        block = tarfile.BLOCKSIZE
        data = read_range(url, self.storage, offset - block, size + block)
        try:
            header = tarfile.TarInfo.frombuf(data[:block], "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            header, found = None, str(error)
        if header is None or header.size != size:
            found = found if header is None else f"{header.size} bytes"
            raise UserError(
                f"{url} contains no image of {size} bytes at offset {offset}: found {found}. The "
                "shard does not match its index. Prepare the data again."
            )
        if self.manifest.plan == FOREIGN:
            # The header contains only the beginning of a long name, so the index makes the key
            # unique.
            return RawSample(make_key(header.name, index), label, data[block:], url)
        check_member(header.name, url)
        return RawSample(header.name.rpartition(".")[0], label, data[block:], url)

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.unit_sizes)

    def _index(self, unit: int) -> np.ndarray:
        if unit not in self._indices:
            shard = self.manifest.shards[unit]
            where = join(self.origin, shard.index_name)
            self._indices[unit] = parse_index(read_bytes(where, self.storage), shard, where)
        return self._indices[unit]

    def _url(self, shard: Shard) -> str:
        url = join(self.origin, shard.name)
        if self.cache is None or not is_remote(url):
            return url
        return str(self.cache.fetch(url, shard, self.storage))


def open_dataset(
    path: str | Path,
    *,
    split: str = "val",
    size: str | None = None,
    classes: list[str] | None = None,
    cache_dir: str | Path | None = None,
    storage: RemoteOptions | None = None,
) -> ClassificationDataset:
    """Open a classification dataset in any supported format.

    The formats are detected in this order:

    - a folder of shards or its manifest.json, given as a local path or a remote URL
      (`http(s)://`, `s3://` and other object stores);
    - individual shards in such a folder, given as the path of a `.tar` file or a pattern with
      wildcards (local shards) or braces, such as `train-{000..099}.tar`;
    - local webdataset shards without a manifest, which are read once to count their samples;
    - the official Places365 distribution: the folder with the lists, or an image folder (`val_256`)
      or archive (`val_256.tar`) next to the lists;
    - ImageNet as downloaded: an archive, or the folder that contains the archives and the
      development kit;
    - a CSV file with the columns `path` and `label`;
    - a folder with one folder per class.

    Args:
        path: Path of a folder or file, or a remote URL.
        split: Places365 split ("val", "train_standard" or "train_challenge"), or ImageNet split
            ("val" or "train"); ignored if the path determines the split.
        size: Places365 image size, "256" or "large"; None to use the existing size, preferably 256.
        classes: Expected class names in label order. Classes without images are only allowed for a
            CSV file or a folder with one folder per class.
        cache_dir: Folder for local copies of remote shards.
        storage: Options for reading remote files.

    Raises:
        UserError: If the data does not exist, has an unsupported format, is damaged or has
            different classes.
    """
    storage = storage or RemoteOptions()
    text = str(path)
    dataset: ClassificationDataset
    if is_remote(text):
        cache = ShardCache(cache_dir) if cache_dir is not None else None
        base = text.rstrip("/").removesuffix("/" + MANIFEST)
        if base.endswith(".tar"):
            urls = _expand(text)
            base = _common_folder(text, [url.rpartition("/")[0] for url in urls])
            names = [url.rpartition("/")[2] for url in urls]
            dataset = _some_shards(base, names, storage, cache)
        else:
            dataset = ShardDataset(load_manifest(base, storage), base, storage, cache)
        _check_remote_shards(dataset)
    elif is_label_csv(local_path(text)):
        dataset = ImageDataset(open_label_csv(local_path(text), classes), text)
    else:
        dataset = _open_local(local_path(text), split, size, classes, storage)
    check_classes(path, dataset.classes, classes)
    return dataset


def check_classes(path: str | Path, found: Sequence[str], expected: Sequence[str] | None) -> None:
    """Raise a UserError if `expected` is not None and differs from the classes of a dataset."""
    if expected is None or list(found) == list(expected):
        return
    raise UserError(
        f"The {len(found)} classes of {path} differ from the {len(expected)} expected classes: "
        f"{differences(found, expected)}. Prepare the data with the expected list of classes."
    )


def _open_local(
    path: Path, split: str, size: str | None, classes: list[str] | None, storage: RemoteOptions
) -> ClassificationDataset:
    if path.name == MANIFEST:
        path = path.parent
    if (path / MANIFEST).is_file():
        manifest = load_manifest(str(path), storage)
        _check_shards(manifest, path)
        return ShardDataset(manifest, str(path), storage)
    if path.suffix == ".tar" and (path.parent / MANIFEST).is_file():
        names = [match.name for match in _matches(path)] or [path.name]
        shards = _some_shards(str(path.parent), names, storage, None)
        _check_shards(shards.manifest, path.parent)
        return shards
    matches = [] if path.exists() else _matches(path)
    if not path.exists() and not matches:
        raise UserError(
            f"{path} does not exist; expected a folder or archive of images, or shards. Check the "
            "path."
        )
    dataset = None if matches else _open_published(path, split, size)
    if dataset is not None:
        return dataset
    if path.is_dir():
        matches = find_shards(path)
    elif is_shard_name(path.name):
        matches = matches or [path]
    if matches:
        manifest, indices = scan_shards(matches, classes)
        return ShardDataset(manifest, str(matches[0].parent), storage, indices=indices)
    if not path.is_dir():
        raise UserError(
            f"{path} has an unsupported format; expected a shard with {MANIFEST} in the same "
            f"folder, or a Places365 archive with {places365.list_name(split)} in the same "
            "folder. Create shards with datasets/prepare_places365.py or prepare_folder.py."
        )
    return ImageDataset(open_folder(path, classes))


def matches_files(pattern: str) -> bool:
    """Return True if a pattern with wildcards or braces (see `open_dataset`) matches any file."""
    return any(glob.glob(name) for name in _expand(pattern))


def _expand(path: str) -> list[str]:
    """Expand braces such as `{000..003}` or `{a,b}` in a path or URL, as in webdataset."""
    try:
        return expand_urls(path) if "{" in path else [path]
    except ValueError as error:
        raise UserError(
            f"{path} is neither an existing file nor a valid pattern for shards: {error}. Correct "
            "the path."
        ) from error


def _common_folder(path: object, folders: Sequence[str]) -> str:
    if len(set(folders)) > 1:
        raise UserError(
            f"{path} matches shards in {len(set(folders))} folders, such as "
            f"{first_of(sorted(set(folders)), 2)}; expected shards in one folder. Pass the "
            "shards of a single folder."
        )
    return folders[0]


def _matches(path: Path) -> list[Path]:
    """Return the shards that match a pattern with wildcards and braces.

    Braces are expanded in order, as in a shell. The files that match each expanded name are sorted.

    Raises:
        UserError: If a name expanded from braces does not exist, or the files are in several
            folders.
    """
    if path.exists():
        return [path]
    names = _expand(str(path))
    found = {name: sorted(glob.glob(name)) for name in names}
    missing = [name for name in names if not found[name]]
    if missing and len(names) > 1:
        raise UserError(
            f"{path} specifies {len(names)} shards, of which {len(missing)} are missing: "
            f"{first_of(missing)}. Copy the missing shards, or correct the pattern."
        )
    matches = [Path(match) for group in found.values() for match in group]
    if matches:
        _common_folder(path, [str(match.parent) for match in matches])
    return matches


def _check_shards(manifest: Manifest, folder: Path) -> None:
    """Raise a UserError if a local shard that is listed in the manifest is missing."""
    missing = [shard.name for shard in manifest.shards if not (folder / shard.name).is_file()]
    if missing:
        raise UserError(
            f"Cannot open {folder / missing[0]}: {len(missing)} of {len(manifest.shards)} shards "
            f"listed in {MANIFEST} are missing: {first_of(missing, 5)}. Copy them again, or run "
            "the preparation again."
        )


def _open_published(path: Path, split: str, size: str | None) -> ImageDataset | None:
    """Open Places365 or ImageNet as downloaded; return None for other data."""
    if found := imagenet.find_imagenet(path, split):
        return ImageDataset(imagenet.open_imagenet_images(*found))
    return _open_places365(path, split, size)


def _check_remote_shards(dataset: ShardDataset) -> None:
    """Raise a UserError if any shard without a local copy does not exist on the server."""
    shards = [(join(dataset.origin, shard.name), shard) for shard in dataset.manifest.shards]
    cache = dataset.cache
    urls = [url for url, shard in shards if cache is None or not cache.is_present(url, shard)]
    if missing := missing_files(urls, dataset.storage):
        raise UserError(
            f"Cannot open {missing[0]}: {len(missing)} of {len(shards)} shards listed in "
            f"{MANIFEST} do not exist: {first_of(missing, 5)}. Upload them again."
        )


def _open_places365(path: Path, split: str, size: str | None) -> ImageDataset | None:
    """Open the official Places365 distribution; return None for other data.

    Raises:
        UserError: If several splits have a folder or archive of this name, such as `data_256`,
            and `split` is not one of them.
    """
    sizes = places365.SIZES if size is None else (size,)
    known = [
        name
        for name in places365.SPLITS
        if any(path.name in places365.image_places(name, size) for size in sizes)
    ]
    _, trees, _ = next(walk(path)) if path.is_dir() else ("", [], [])
    listed = (path.parent / places365.CATEGORIES).is_file() or any(
        places365.has_lists(path.parent, name) for name in known
    )
    if known and (not trees or listed):
        if split not in known and len(known) > 1:
            raise UserError(
                f"{path} may contain the images of {' or '.join(known)}, but the requested split "
                f"is {split}. Rename the folder to {path.name}_standard or {path.name}_challenge, "
                "or request one of these splits (split= in Python)."
            )
        split = split if split in known else known[0]
        return ImageDataset(places365.open_places365_images(path, path.parent, split))
    if not path.is_dir() or not places365.has_lists(path, split):
        return None
    there = [s for s in sizes if any((path / p).exists() for p in places365.image_places(split, s))]
    return ImageDataset(places365.open_places365(path, split, (there or sizes)[0]))


def _some_shards(
    base: str, names: list[str], storage: RemoteOptions, cache: ShardCache | None
) -> ShardDataset:
    manifest = load_manifest(base, storage)
    by_name: dict[str, Any] = {shard.name: shard for shard in manifest.shards}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise UserError(
            f"The manifest of {base} does not list the shards {first_of(unknown, 5)}. Pass only "
            "listed shards, or the whole folder."
        )
    part = replace(manifest, shards=[by_name[name] for name in names])
    return ShardDataset(part, base, storage, cache)
