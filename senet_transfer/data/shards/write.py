"""Images into tar shards: globally shuffled, atomic, resumable, the same bytes every time.

What goes into which shard follows from the list, the images' sizes, the seed and the shards' size,
before anything is written. Each shard gets a JSON beside it once it is complete and on disk; that
JSON is the unit of resume. The manifest comes last.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import re
import shutil
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from senet_transfer.data.base import RawSample, make_key
from senet_transfer.data.images.decode import BrokenImageError, decode_fast
from senet_transfer.data.images.listing import Images, read_image_bytes
from senet_transfer.data.shards.manifest import Manifest, Shard, parse_shard
from senet_transfer.data.shards.tar import ShardWriter
from senet_transfer.errors import UserError
from senet_transfer.utils.atomic_io import atomic_file, write_json
from senet_transfer.utils.parallel import run_parallel
from senet_transfer.utils.progress import progress
from senet_transfer.utils.text import first_of

# Raised when the same images and settings give other bytes.
PLAN_VERSION = 1

# A source that is broken through and through is not read to its end to say so.
ENOUGH_BROKEN = 1000

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardPlan:
    """What goes into one shard.

    Attributes:
        name: of the file.
        plan: the hash of the whole plan.
        root: folder or archive of the images.
        names: of the images, in order.
        indices: `(n,)`, their positions in the source's list.
        labels: `(n,)`.
        sizes: `(n,)`, in bytes.
        offsets: `(n,)`, in the archive; None for a folder.
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
    """Writes images to shards in a folder, or goes on where an interrupted run stopped.

    The folder gets `<split>-000000.tar` and so on, each with a `.json` (its entry of the manifest)
    and an `.index.npy` (where each image lies), and `manifest.json` at the end.

    Args:
        images: what to convert.
        output: the folder; made where it is missing.
        split: begins the shards' names.
        seed: of the global shuffle, not negative.
        shard_mb: about the size of a shard, in 10^6 bytes.
        workers: processes.
        skip_broken: this many images that cannot be decoded are left out and recorded.
        quiet: no progress bar.

    Raises:
        UserError: images are broken, the folder holds the shards of another plan or is written by
            another run, the disk is full, or a number makes no sense.
    """
    if not 0 <= seed < 2**32 or shard_mb <= 0 or workers < 1 or skip_broken < 0:
        raise UserError(
            f"seed={seed}, shard-mb={shard_mb}, workers={workers}, skip-broken={skip_broken}: "
            "expected no negative number, a seed below 2^32, a shard size above 0 and a worker."
        )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", split):
        raise UserError(f"the split is {split!r}, expected a name of letters, digits, - and _.")
    output = Path(output)
    plans = plan_shards(images, split=split, seed=seed, shard_mb=shard_mb)
    try:
        output.mkdir(parents=True, exist_ok=True)
        with _only_writer(output):
            return _convert(images, output, plans, (split, seed, workers, skip_broken), quiet)
    except OSError as error:
        raise UserError(
            f"cannot write shards to {output}: {error}. Make room or name another folder; the "
            "next run goes on with the shards that are complete."
        ) from error


def plan_shards(images: Images, *, split: str, seed: int, shard_mb: float) -> list[ShardPlan]:
    """Shuffles images and divides them into shards of equally many, so of about equal bytes.

    The sizes of single images decide nothing, so that one which was damaged and is restored
    changes the shard that it is in, and no other.
    """
    # The legacy generator's numbers are frozen; those of numpy's newer ones may change.
    order = np.random.RandomState(seed).permutation(len(images))
    blocks = -(-images.sizes // tarfile.BLOCKSIZE) + 3
    total = int(blocks.sum()) * tarfile.BLOCKSIZE
    count = min(math.ceil(total / (shard_mb * 1e6)), len(images))
    digest = hashlib.sha256(f"{PLAN_VERSION} {split} {seed} {count}\n".encode())
    digest.update("\n".join(images.classes).encode() + b"\n\n" + "\n".join(images.names).encode())
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
    """Writes a shard, its index and, once both are on disk, its JSON, whose content it returns."""
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
    for place, name in enumerate(plan.names):
        offset = None if plan.offsets is None else int(plan.offsets[place])
        data = read_image_bytes(plan.root, name, int(plan.sizes[place]), offset)
        try:
            # The only sure sign of a good image; cheap beside reading it.
            decode_fast(data)
        except BrokenImageError as error:
            skipped.append({"name": name, "reason": str(error)})
            continue
        key = make_key(name, int(plan.indices[place]))
        yield RawSample(key, int(plan.labels[place]), data, name)


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
        logger.info("%s has %d of %d shards already", output, len(entries), len(plans))
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
    """The JSONs of the shards that are complete, by name.

    Raises:
        UserError: the folder holds shards of another plan.
    """
    for path in output.glob(".*.tmp"):
        path.unlink()  # of a run that was killed; none other is writing
    entries = {}
    known = {plan.name for plan in plans}
    for path in sorted(output.glob("*.json")):
        try:
            entry = json.loads(path.read_bytes())
            plan = entry["plan"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is not of a shard; move it away.") from None
        if plan != plans[0].plan:
            raise UserError(
                f"{output} holds shards of other images or settings ({path.name}): expected "
                "nothing, or what an interrupted run with the same list, classes, split, seed "
                "and shard size left. Name another folder, or delete this one's content."
            )
        name = entry.get("name")
        # A shard that lacks broken images is written again: they may have been restored.
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
            f"{output} has {free / 1e9:.1f} GB free, expected {needed / 1e9:.1f} GB for "
            f"{len(pending)} shards. Make room, or name a folder on another disk."
        )


def _too_many_broken(
    output: Path, skipped: list[dict[str, str]], tolerated: int, root: Path
) -> UserError:
    lines = [f"{entry['name']} ({entry['reason']})" for entry in skipped]
    with atomic_file(output / "broken.txt") as stream:
        stream.write("".join(line + "\n" for line in lines).encode())
    return UserError(
        f"{len(skipped)} images of {root} are missing or cannot be decoded, tolerated are "
        f"{tolerated}: {first_of(lines)}. All are listed in {output / 'broken.txt'}. Restore them "
        f"and run again, or leave them out with --skip-broken {len(skipped)}."
    )


def _written(
    pending: list[ShardPlan], output: Path, workers: int
) -> Iterator[tuple[dict[str, Any], int]]:
    """Writes shards, and yields their JSON's content and number of images as they are done."""
    if workers == 1 or len(pending) <= 1:
        for plan in pending:
            yield write_shard(plan, output), len(plan.names)
        return
    for plan, entry in run_parallel(write_shard, pending, output, workers):
        yield entry, len(plan.names)


@contextlib.contextmanager
def _only_writer(output: Path) -> Iterator[None]:
    """Keeps a second run out of the folder.

    Raises:
        UserError: another run is writing.
    """
    with open(output / ".lock", "w") as lock:
        for attempt in range(20):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                # The workers of a run that was just killed take a moment to notice.
                if attempt == 19:
                    raise UserError(
                        f"another run is writing to {output}. Wait for it, or stop it."
                    ) from None
                time.sleep(0.25)
        yield
