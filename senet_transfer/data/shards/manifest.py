"""The manifest of a folder of shards: what is in it, to be counted against.

A tar that was cut between two members reads without an error, so only a count that was written
down tells that samples are missing.
"""

import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from senet_transfer.data.shards.storage import RemoteOptions, join, read_bytes
from senet_transfer.errors import UserError
from senet_transfer.utils.atomic_io import write_json

MANIFEST = "manifest.json"
FORMAT = "senet_transfer classification shards"
VERSION = 1


@dataclass(frozen=True)
class Shard:
    """One tar file.

    Attributes:
        name: of the file, beside the manifest.
        samples: the number of images.
        bytes: the file's size.
        sha256: of the file, in hexadecimal.
        class_counts: images by label; labels without images are left out.
    """

    name: str
    samples: int
    bytes: int
    sha256: str
    class_counts: dict[int, int] = field(default_factory=dict)

    @property
    def index_name(self) -> str:
        """The file beside it that says where each image lies: rows of offset, size, label."""
        return self.name.removesuffix(".tar") + ".index.npy"


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds.

    Attributes:
        classes: names, the label being the position.
        shards: in order.
        split: such as `val` or `train_standard`.
        seed: of the global shuffle.
        plan: a hash of all that decides the shards' bytes; equal plans give equal shards.
        skipped: images that were left out as broken, with the reason.
    """

    classes: list[str]
    shards: list[Shard]
    split: str = ""
    seed: int = 0
    plan: str = ""
    skipped: list[dict[str, str]] = field(default_factory=list)

    @property
    def samples(self) -> int:
        """The number of images in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def num_classes(self) -> int:
        """The number of classes, with those that have no images."""
        return len(self.classes)

    def save(self, folder: Path) -> None:
        """Write the manifest into a folder, atomically."""
        write_json(
            folder / MANIFEST,
            {"format": FORMAT, "version": VERSION, "samples": self.samples} | asdict(self),
            indent=1,
            sort_keys=True,
        )


def load_manifest(base: str, storage: RemoteOptions | None = None) -> Manifest:
    """Reads and checks the manifest of a folder of shards.

    Args:
        base: the folder's path or address.
        storage: how remote files are read.

    Raises:
        UserError: it is missing, damaged or does not add up.
    """
    where = join(base, MANIFEST)
    try:
        content = json.loads(read_bytes(where, storage or RemoteOptions()))
    except ValueError as error:
        raise UserError(f"{where} is not readable JSON: {error}. Prepare the data again.") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(
            f"{where} is not a manifest of this project's shards: expected the "
            f'entry "format": "{FORMAT}". Make one with '
            "datasets/prepare_places365.py or prepare_folder.py."
        )
    if content.get("version") != VERSION:
        raise UserError(
            f"{where} has version {content.get('version')}, expected {VERSION}. Prepare the data "
            "again with this release, or use the release that wrote it."
        )
    try:
        manifest = _parse(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{where} is damaged: {type(error).__name__}: {error}. Prepare the data again."
        ) from error
    _check(manifest, content, base, where)
    return manifest


def parse_shard(entry: dict[str, Any]) -> Shard:
    """A shard from its JSON."""
    counts = {int(label): int(count) for label, count in entry["class_counts"].items()}
    return Shard(
        str(entry["name"]),
        int(entry["samples"]),
        int(entry["bytes"]),
        str(entry["sha256"]),
        counts,
    )


def parse_index(data: bytes, shard: Shard, where: str) -> np.ndarray:
    """The index of a shard, rows of offset, size, label as int64.

    Raises:
        UserError: it is damaged, or of another shard.
    """
    try:
        index = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # NumPy evaluates the header, and stumbles over nearly anything
        raise UserError(f"{where} is damaged: {error}. Prepare the data again.") from None
    if index.dtype != np.int64 or index.shape != (shard.samples, 3):
        raise UserError(
            f"{where} has shape {index.shape} and type {index.dtype}, expected "
            f"({shard.samples}, 3) and int64. It belongs to other shards; prepare the data again."
        )
    return index


def _parse(content: dict[str, Any]) -> Manifest:
    return Manifest(
        classes=[str(name) for name in content["classes"]],
        shards=[parse_shard(entry) for entry in content["shards"]],
        split=str(content["split"]),
        seed=int(content["seed"]),
        plan=str(content["plan"]),
        skipped=list(content["skipped"]),
    )


def _check(manifest: Manifest, content: dict[str, Any], base: str, where: str) -> None:
    for shard in manifest.shards:
        join(base, shard.name)
        outside = [label for label in shard.class_counts if not 0 <= label < len(manifest.classes)]
        if sum(shard.class_counts.values()) != shard.samples or outside or shard.samples < 1:
            raise UserError(
                f"{where} does not add up at {shard.name}: {shard.samples} samples, "
                f"{sum(shard.class_counts.values())} labels, labels out of range: {outside[:5]}. "
                "Prepare the data again."
            )
    if not manifest.shards or manifest.samples != content["samples"]:
        raise UserError(
            f"{where} says {content['samples']} samples, its {len(manifest.shards)} shards "
            f"together {manifest.samples}. Prepare the data again."
        )
