"""Image fingerprints for finding duplicates and near-duplicates."""

import hashlib
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from senet_transfer.data.base import ClassificationDataset
from senet_transfer.data.images.channels import decode_shown
from senet_transfer.data.images.decode import AS_STORED, BrokenImageError, Reading, size_of
from senet_transfer.errors import UserError
from senet_transfer.utils.parallel import run_parallel
from senet_transfer.utils.progress import progress

# Number of rows and columns of the brightness grid. A hash has 2 * SIDE * SIDE bits.
SIDE = 11
BITS = 2 * SIDE * SIDE
# Maximum number of differing bits between near-duplicates. On real photographs, at most this many
# bits change if an image is recompressed, resized, brightened, or cropped by 2% at each border.
# Different photographs differ in 20% of the bits or more.
DISTANCE = BITS // 8
# Images whose brightness has a lower standard deviation have no reliable bits.
LEAST_CONTRAST = 4.0

_WORDS = -(-BITS // 64)
_BLOCK = 512


@dataclass(frozen=True)
class Fingerprints:
    """Hashes, sizes and contrasts of N images.

    Attributes:
        index: Index of each image in its dataset, int64 ``(N,)``.
        digests: Hash of each file, bytes ``(N,)``.
        bits: Perceptual hash of each image, uint64 ``(N, 4)``.
        sizes: Width and height in pixels, int64 ``(N, 2)``.
        contrast: Standard deviation of the brightness, 0-127, ``(N,)``.
        broken: Path of each unreadable image and the reason why it can't be read.
    """

    index: np.ndarray
    digests: np.ndarray
    bits: np.ndarray
    sizes: np.ndarray
    contrast: np.ndarray
    broken: list[tuple[str, str]]


def difference_hash(image: Image.Image) -> np.ndarray:
    """Return the perceptual hash of an image, uint64 ``(4,)``.

    Each bit indicates whether the brightness increases from a cell of a coarse grid to the next
    cell on the right or below (dHash by N. Krawetz, 2013, in both directions).
    """
    grey = image.convert("L")
    across = np.asarray(grey.resize((SIDE + 1, SIDE), Image.Resampling.BOX))
    down = np.asarray(grey.resize((SIDE, SIDE + 1), Image.Resampling.BOX))
    bits = np.zeros(64 * _WORDS, bool)
    bits[:BITS] = np.concatenate(
        [(across[:, 1:] > across[:, :-1]).ravel(), (down[1:] > down[:-1]).ravel()]
    )
    return np.packbits(bits).view(np.uint64)


def fingerprint_images(
    images: ClassificationDataset,
    *,
    limit: int,
    workers: int,
    reading: Reading = AS_STORED,
    quiet: bool = False,
    name: str = "",
) -> Fingerprints:
    """Read and decode images, and compute their fingerprints.

    To save time, JPEG images are decoded at a reduced resolution.

    Args:
        images: The images.
        limit: Maximum number of images. For larger datasets, a random sample is read. The sample
            depends only on the number of images.
        workers: Number of processes; 1 uses the current process.
        reading: Settings for reading images.
        quiet: If True, show no progress bar.
        name: Name of the dataset, for the progress bar.
    """
    chosen = np.sort(np.random.default_rng(0).permutation(len(images))[:limit])
    parts = np.array_split(chosen, 8 * workers)
    tasks = [part.tolist() for part in parts if len(part)]
    argument = (images, reading)
    calls: Iterable = (
        run_parallel(_fingerprint_part, tasks, argument, workers)
        if workers > 1
        else ((part, _fingerprint_part(part, argument)) for part in tasks)
    )
    rows: list[tuple] = []
    broken: list[tuple[str, str]] = []
    with progress(total=len(chosen), desc=f"hashes of {name}", unit="image", quiet=quiet) as bar:
        for part, (found, failed) in calls:
            rows += found
            broken += failed
            bar.update(len(part))
    rows.sort(key=lambda row: row[0])
    index, digests, bits, sizes, contrast = zip(*rows, strict=True) if rows else ((),) * 5
    return Fingerprints(
        np.array(index, np.int64),
        np.array(digests, "S16"),
        np.array(bits, np.uint64).reshape(-1, _WORDS),
        np.array(sizes, np.int64).reshape(-1, 2),
        np.array(contrast, np.float64),
        sorted(broken),
    )


def _fingerprint_part(part: list[int], argument: tuple) -> tuple[list[tuple], list]:
    images, reading = argument
    found, broken = [], []
    for index in part:
        try:
            sample = images.read_sample(index)
        except UserError as error:
            broken.append((str(index), str(error)))
            continue
        try:
            small = decode_shown(sample.data, reading, 4 * SIDE)
            size = small.shape[1::-1]
            if not reading.channels:  # JPEG images are decoded at a reduced resolution.
                with Image.open(io.BytesIO(sample.data)) as opened:
                    size = size_of(opened, upright=reading.upright)
        except BrokenImageError as error:
            broken.append((sample.path, str(error)))
            continue
        image = Image.fromarray(small).convert("L")
        contrast = float(np.asarray(image).std())
        # NumPy removes zero bytes at the end, so the last byte must not be 0.
        digest = hashlib.blake2b(sample.data, digest_size=15).digest() + b"."
        found.append((index, digest, difference_hash(image), size, contrast))
    return found, broken


def near_pairs(bits: np.ndarray, distance: int = DISTANCE) -> np.ndarray:
    """Return all pairs of hashes that differ in at most ``distance`` bits.

    Args:
        bits: The hashes, uint64 ``(N, W)``. Comparing 10,000 hashes takes about one second.
        distance: Maximum number of different bits.

    Returns:
        The indices of each pair, the lower one first, int64 ``(P, 2)``, in ascending order.
    """
    found = [np.empty((0, 2), np.int64)]
    for start in range(0, len(bits), _BLOCK):
        rows, columns = bits[start : start + _BLOCK], bits[start:]
        count = np.zeros((len(rows), len(columns)), np.uint8)
        for word in range(bits.shape[1]):
            count += np.bitwise_count(rows[:, word, None] ^ columns[None, :, word])
        pairs = np.argwhere(count <= distance)
        found.append(pairs[pairs[:, 0] < pairs[:, 1]] + start)
    return np.concatenate(found)


@dataclass(frozen=True)
class Duplicates:
    """A group of duplicate or near-duplicate images.

    Attributes:
        members: Indices of the images, sorted.
        identical: True if the files are identical.
    """

    members: list[int]
    identical: bool


def find_duplicates(
    digests: np.ndarray, bits: np.ndarray, contrast: np.ndarray
) -> list[Duplicates]:
    """Group duplicate and near-duplicate images; see :class:`Fingerprints` for the arguments.

    Images with very low contrast count as duplicates only if their files are identical.
    """
    parents = list(range(len(digests)))

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = index = parents[parents[index]]
        return index

    _join(np.unique(digests, return_inverse=True)[1], range(len(digests)), parents, root)
    clear = np.flatnonzero(contrast >= LEAST_CONTRAST)
    # Join equal hashes first. Otherwise, thousands of equal images would result in millions of
    # pairs.
    unique, inverse = np.unique(bits[clear], axis=0, return_inverse=True)
    first = _join(inverse.ravel(), clear.tolist(), parents, root)
    for low, high in near_pairs(unique):
        parents[root(first[int(high)])] = root(first[int(low)])
    groups: dict[int, list[int]] = {}
    for index in range(len(digests)):
        groups.setdefault(root(index), []).append(index)
    return [
        Duplicates(group, len(set(digests[group].tolist())) == 1)
        for group in sorted(groups.values())
        if len(group) > 1
    ]


def _join(
    keys: np.ndarray, items: Iterable[int], parents: list[int], root: Callable[[int], int]
) -> dict[int, int]:
    """Merge all items with the same key into one group of a union-find forest.

    Args:
        keys: The key of each item.
        items: The items, as indices into ``parents``.
        parents: The parent of each item in the forest, which is modified in place.
        root: Function that returns the root of an item's tree.

    Returns:
        The first item with each key.
    """
    first: dict[int, int] = {}
    for key, item in zip(keys.tolist(), items, strict=True):
        parents[root(item)] = root(first.setdefault(key, item))
    return first
