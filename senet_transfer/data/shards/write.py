"""Reproducible and resumable conversion of images to globally shuffled tar shards.

The contents of all shards are planned first, based on the image list, the total size of the images,
the seed and the shard size. Once a shard is complete and on disk, a JSON file is written for it. A
resumed conversion skips shards with a JSON file. The manifest is written last.
"""

import hashlib
import json
import logging
import math
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from senet_transfer.data.base import RawSample, make_key
from senet_transfer.data.images.decode import ANY_RANGE, BrokenImageError, decode_fast
from senet_transfer.data.images.listing import Images, read_image_bytes
from senet_transfer.data.shards.manifest import Manifest, Shard, parse_shard
from senet_transfer.data.shards.tar import ShardWriter
from senet_transfer.errors import UserError
from senet_transfer.utils.atomic_io import atomic_file, write_json
from senet_transfer.utils.folder_lock import only_writer
from senet_transfer.utils.parallel import run_parallel
from senet_transfer.utils.progress import progress
from senet_transfer.utils.text import first_of

# Incremented when the same images and settings result in different bytes.
PLAN_VERSION = 1

# The conversion stops when the tolerated number of broken images is exceeded by this number.
ENOUGH_BROKEN = 1000

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardPlan:
    """Planned contents of one shard.

    Attributes:
        name: File name of the shard.
        plan: Hash of everything that determines the content of all shards.
        root: Folder or archive with the images.
        names: Image names, in order.
        indices: Image indices in the list of all images, `(n,)`.
        labels: Image labels, `(n,)`.
        sizes: Image sizes in bytes, `(n,)`.
        offsets: Image offsets in the archive, `(n,)`; None for a folder.
    """

    name: str
    plan: str
    root: Path
    names: list[str]
    indices: np.ndarray
    labels: np.ndarray
    sizes: np.ndarray
    offsets: np.ndarray | None


def convert(
    images: Images,
    output: str | Path,
    *,
    split: str,
    seed: int = 0,
    shard_mb: float = 200,
    workers: int = 1,
    skip_broken: int = 0,
    quiet: bool = False,
) -> Manifest:
    """Convert images to shards, or resume an interrupted conversion.

    The output folder contains the shards `<split>-000000.tar` and so on, each with a `.json` file
    (its manifest entry) and an `.index.npy` file (each image's offset, size and label), and finally
    `manifest.json`.

    Args:
        images: Images to convert.
        output: Output folder, created if it does not exist.
        split: Prefix of the shard names.
        seed: Random seed of the global shuffle, from 0 to 2^32 - 1.
        shard_mb: Approximate size of each shard, in 10^6 bytes.
        workers: Number of worker processes.
        skip_broken: Maximum number of broken images to leave out and record in the manifest. If
            there are more, an error is raised.
        quiet: Whether to hide the progress bar.

    Raises:
        UserError: If too many images are broken, the folder contains shards that were written from
            different images or with different settings, another run is writing to it, the disk is
            full, or an argument is out of range.
    """
    if not 0 <= seed < 2**32 or shard_mb <= 0 or workers < 1 or skip_broken < 0:
        raise UserError(
            f"Invalid settings: seed={seed}, shard-mb={shard_mb}, workers={workers}, "
            f"skip-broken={skip_broken}; expected a seed from 0 to 2^32 - 1, shard-mb greater than "
            "0, at least 1 worker and a non-negative skip-broken."
        )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", split):
        raise UserError(
            f"Invalid split name {split!r}; expected letters, digits, '-' and '_', starting with a "
            "letter or digit."
        )
    output = Path(output)
    plans = plan_shards(images, split=split, seed=seed, shard_mb=shard_mb)
    try:
        output.mkdir(parents=True, exist_ok=True)
        with only_writer(output):
            return _convert(images, output, plans, (split, seed, workers, skip_broken), quiet)
    except OSError as error:
        raise UserError(
            f"Cannot write shards to {output}: {error}. Free up space or choose another folder. "
            "The next run will keep the complete shards."
        ) from error


def plan_shards(images: Images, *, split: str, seed: int, shard_mb: float) -> list[ShardPlan]:
    """Shuffle images and divide them into shards with equal numbers of images.

    The plan does not depend on the sizes of individual images, so restoring a damaged image changes
    only the shard that contains the image.
    """
    # NumPy guarantees stable random numbers for the legacy generator, but not for newer ones.
    order = np.random.RandomState(seed).permutation(len(images))
    blocks = -(-images.sizes // tarfile.BLOCKSIZE) + 3
    total = int(blocks.sum()) * tarfile.BLOCKSIZE
    count = min(math.ceil(total / (shard_mb * 1e6)), len(images))
    digest = hashlib.sha256(f"{PLAN_VERSION} {split} {seed} {count}\n".encode())
    digest.update("\n".join(images.classes).encode() + b"\n\n" + _on_disk(images.names))
    digest.update(images.labels.tobytes())
    plan = digest.hexdigest()
    return [
        ShardPlan(
            name=f"{split}-{number:06d}.tar",
            plan=plan,
            root=images.root,
            names=[images.names[index] for index in part],
            indices=part,
            labels=images.labels[part],
            sizes=images.sizes[part],
            offsets=None if images.offsets is None else images.offsets[part],
        )
        for number, part in enumerate(np.array_split(order, count))
    ]


def write_shard(plan: ShardPlan, output: Path) -> dict[str, Any]:
    """Write a shard, its index and finally its JSON file; return the content of the JSON file."""
    skipped: list[dict[str, str]] = []
    counts: Counter[int] = Counter()
    with atomic_file(output / plan.name) as stream:
        writer = ShardWriter(stream)
        for sample in _good_samples(plan, skipped):
            writer.write(sample)
            counts[sample.label] += 1
        writer.close()
    shard = Shard(plan.name, len(writer.index), writer.bytes, writer.sha256, dict(counts))
    with atomic_file(output / shard.index_name) as stream:
        np.save(stream, np.array(writer.index, np.int64).reshape(-1, 3))
    entry = asdict(shard) | {"plan": plan.plan, "skipped": skipped}
    write_json(output / _json_name(plan.name), entry, indent=1, sort_keys=True)
    return entry


def _good_samples(plan: ShardPlan, skipped: list[dict[str, str]]) -> Iterator[RawSample]:
    for row, name in enumerate(plan.names):
        offset = None if plan.offsets is None else int(plan.offsets[row])
        data = read_image_bytes(plan.root, name, int(plan.sizes[row]), offset)
        try:
            # Decoding is the only reliable check, and is cheap compared with reading.
            decode_fast(data, reading=ANY_RANGE)
        except BrokenImageError as error:
            skipped.append({"name": name, "reason": str(error)})
            continue
        key = make_key(name, int(plan.indices[row]))
        yield RawSample(key, int(plan.labels[row]), data, name)


def _on_disk(lines: Sequence[str]) -> bytes:
    """Join lines, such as file names, with newlines, and encode the result as UTF-8.

    If a file name on disk contains bytes that are not valid UTF-8, these bytes are preserved."""
    return "\n".join(lines).encode("utf-8", "surrogateescape")


def _json_name(shard_name: str) -> str:
    return shard_name.removesuffix(".tar") + ".json"


def _convert(
    images: Images,
    output: Path,
    plans: list[ShardPlan],
    settings: tuple[str, int, int, int],
    quiet: bool,
) -> Manifest:
    split, seed, workers, skip_broken = settings
    entries = _finished(output, plans)
    pending = [plan for plan in plans if plan.name not in entries]
    _check_space(output, pending)
    done = sum(entry["samples"] for entry in entries.values())
    if entries:
        logger.info("%s already contains %d of %d shards", output, len(entries), len(plans))
    broken = len(images.missing)
    with progress(total=len(images), initial=done, unit="image", desc=split, quiet=quiet) as bar:
        for entry, count in _written(pending, output, workers):
            entries[entry["name"]] = entry
            broken += len(entry["skipped"])
            bar.update(count)
            if broken > skip_broken + ENOUGH_BROKEN:
                break
    skipped = [{"name": name, "reason": "missing or empty"} for name in images.missing]
    for name in sorted(entries):
        skipped += entries[name]["skipped"]
    if len(skipped) > skip_broken:
        raise _too_many_broken(output, skipped, skip_broken, images.root)
    shards = [parse_shard(entries[plan.name]) for plan in plans]
    manifest = Manifest(
        classes=list(images.classes),
        shards=[shard for shard in shards if shard.samples],
        split=split,
        seed=seed,
        plan=plans[0].plan,
        skipped=skipped,
    )
    manifest.save(output)
    return manifest


def _finished(output: Path, plans: list[ShardPlan]) -> dict[str, dict[str, Any]]:
    """Return the content of each complete shard's JSON file, keyed by shard name.

    Raises:
        UserError: If the folder contains shards that were written from different images or with
            different settings.
    """
    for path in output.glob(".*.tmp"):
        path.unlink()  # left by a killed run; the lock prevents concurrent runs
    entries = {}
    known = {plan.name for plan in plans}
    for path in sorted(output.glob("*.json")):
        try:
            entry = json.loads(path.read_bytes())
            plan = entry["plan"]
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path} does not belong to a shard; expected {output} to contain only shards. "
                "Move this file, or choose a different folder."
            ) from None
        if plan != plans[0].plan:
            raise UserError(
                f"{output} contains shards that were written from different images or with "
                f"different settings ({path.name}); expected an empty folder, or shards of an "
                "interrupted run with the same images, classes, split, seed and shard size. Choose "
                "a different folder, or delete the contents of this one."
            )
        name = entry.get("name")
        # Shards from which broken images were left out are written again, because these images may
        # have been restored.
        if name in known and not entry["skipped"]:
            shard = parse_shard(entry)
            tar = output / shard.name
            whole = tar.is_file() and tar.stat().st_size == shard.bytes
            if whole and (output / shard.index_name).is_file():
                entries[shard.name] = entry
    return entries


def _check_space(output: Path, pending: list[ShardPlan]) -> None:
    needed = sum(int(plan.sizes.sum()) + 2048 * len(plan.names) for plan in pending)
    free = shutil.disk_usage(output).free
    if free < needed:
        raise UserError(
            f"{output} has {free / 1e9:.1f} GB of free space; expected {needed / 1e9:.1f} GB for "
            f"{len(pending)} shards. Free up space, or choose a folder on a different disk."
        )


def _too_many_broken(
    output: Path, skipped: list[dict[str, str]], tolerated: int, root: Path
) -> UserError:
    lines = [f"{entry['name']} ({entry['reason']})" for entry in skipped]
    with atomic_file(output / "broken.txt") as stream:
        stream.write(_on_disk([*lines, ""]))
    return UserError(
        f"{len(skipped)} images in {root} are missing or cannot be decoded: {first_of(lines)}. "
        f"Expected at most {tolerated}. All affected images are listed in "
        f"{output / 'broken.txt'}. Restore them and run the command again, or leave them out with "
        f"--skip-broken {len(skipped)}."
    )


def _written(
    pending: list[ShardPlan], output: Path, workers: int
) -> Iterator[tuple[dict[str, Any], int]]:
    """Write the planned shards, in parallel if there are several workers and shards.

    Yields:
        The content of each shard's JSON file, and the number of images planned for the shard.
    """
    if workers == 1 or len(pending) <= 1:
        for plan in pending:
            yield write_shard(plan, output), len(plan.names)
        return
    for plan, entry in run_parallel(write_shard, pending, output, workers):
        yield entry, len(plan.names)
