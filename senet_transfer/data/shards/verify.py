"""Verification of shards against their manifest and index."""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from senet_transfer.data.images.decode import ANY_RANGE, BrokenImageError, decode_fast
from senet_transfer.data.shards.manifest import Shard, load_manifest, parse_index
from senet_transfer.data.shards.tar import read_shard
from senet_transfer.errors import UserError
from senet_transfer.utils.parallel import run_parallel
from senet_transfer.utils.progress import progress

logger = logging.getLogger(__name__)


def verify(folder: str | Path, *, workers: int = 1, quiet: bool = False) -> int:
    """Verify the checksums, sample counts, labels and images of all shards in a local folder.

    Args:
        folder: Folder with shards and a manifest.
        workers: Number of worker processes.
        quiet: Whether to hide the progress bar.

    Returns:
        The number of images.

    Raises:
        UserError: If shards are damaged. The message lists each damaged shard with its error.
    """
    folder = Path(folder)
    manifest = load_manifest(str(folder))
    problems = []
    argument = (folder, manifest.num_classes)
    with progress(total=manifest.samples, unit="image", desc="verify", quiet=quiet) as bar:
        results: Iterator[tuple[Shard, str | None]]
        if workers == 1:
            results = ((shard, shard_problem(shard, argument)) for shard in manifest.shards)
        else:
            results = run_parallel(shard_problem, manifest.shards, argument, workers)
        for shard, problem in results:
            bar.update(shard.samples)
            if problem:
                problems.append(problem)
    if problems:
        raise UserError(f"{len(problems)} shards are damaged:\n" + "\n".join(sorted(problems)))
    logger.info("%s: %d images in %d shards are valid", folder, bar.total, len(manifest.shards))
    return manifest.samples


def shard_problem(shard: Shard, argument: tuple[Path, int]) -> str | None:
    """Describe the first error in a shard; return None if the shard is valid."""
    folder, num_classes = argument
    path = folder / shard.name
    try:
        with open(path, "rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
            if found != shard.sha256:
                return (
                    f"{path} has SHA-256 {found}; expected {shard.sha256}, the hash in the "
                    "manifest. Delete the shard and its .json file, and run the preparation again."
                )
            where = folder / shard.index_name
            index = parse_index(where.read_bytes(), shard, str(where))
            counts: Counter[int] = Counter()
            stream.seek(0)
            samples = read_shard(stream, str(path), samples=shard.samples, num_classes=num_classes)
            for sample, (offset, size, label) in zip(samples, index.tolist(), strict=True):
                counts[sample.label] += 1
                position = stream.tell()
                stream.seek(offset)
                same = stream.read(size) == sample.data and label == sample.label
                stream.seek(position)
                if not same:
                    return f"{path} does not match {where.name} at {sample.key}. Prepare it again."
                decode_fast(sample.data, reading=ANY_RANGE)
    except BrokenImageError as error:
        return f"{path} contains {sample.key}, which cannot be decoded: {error}. Prepare it again."
    except OSError as error:
        return f"Cannot read {path}: {error}. Prepare it again."
    except UserError as error:
        return str(error)
    return (
        None if counts == shard.class_counts else f"The labels in {path} do not match its manifest."
    )
