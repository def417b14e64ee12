"""Manifest of a shard folder: classes, shards and sample counts.

A tar file that is truncated between two members can be read without an error, so missing samples
are detected by comparing the sample count with the manifest.
"""

import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from senet_transfer.data.shards.storage import AbsentFileError, RemoteOptions, join, read_bytes
from senet_transfer.errors import UserError
from senet_transfer.utils.atomic_io import write_json

MANIFEST = "manifest.json"
FORMAT = "senet_transfer classification shards"
VERSION = 1


@dataclass(frozen=True)
class Shard:
    """Manifest entry for a shard, a single tar file.

    Attributes:
        name: File name in the manifest's folder.
        samples: Number of images.
        bytes: File size in bytes.
        sha256: SHA-256 checksum of the file, in hexadecimal.
        class_counts: Number of images per label; labels without images are left out.
    """

    name: str
    samples: int
    bytes: int
    sha256: str
    class_counts: dict[int, int] = field(default_factory=dict)

    @property
    def index_name(self) -> str:
        """Name of the shard's index file, which contains each image's offset, size and label."""
        return self.name.removesuffix(".tar") + ".index.npy"


@dataclass(frozen=True)
class Manifest:
    """Contents of a shard folder.

    Attributes:
        classes: Class names, indexed by label.
        shards: Shards in order.
        split: Split name, such as `val` or `train_standard`.
        seed: Random seed of the global shuffle.
        plan: Hash of everything that determines the content of the shards. Equal hashes mean
            identical shards.
        skipped: Broken images that were left out, with the reasons.
    """

    classes: list[str]
    shards: list[Shard]
    split: str = ""
    seed: int = 0
    plan: str = ""
    skipped: list[dict[str, str]] = field(default_factory=list)

    @property
    def samples(self) -> int:
        """Number of images in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def num_classes(self) -> int:
        """Number of classes, including those without images."""
        return len(self.classes)

    def save(self, folder: Path) -> None:
        """Write the manifest to a folder atomically."""
        write_json(
            folder / MANIFEST,
            {"format": FORMAT, "version": VERSION, "samples": self.samples} | asdict(self),
            indent=1,
            sort_keys=True,
        )


def load_manifest(base: str, storage: RemoteOptions | None = None) -> Manifest:
    """Load and validate the manifest of a shard folder.

    Args:
        base: Path or URL of the folder.
        storage: Options for reading remote files.

    Raises:
        UserError: If the manifest is missing, damaged or inconsistent.
    """
    where = join(base, MANIFEST)
    try:
        content = json.loads(read_bytes(where, storage or RemoteOptions()))
    except AbsentFileError as error:
        raise UserError(
            f"{where} does not exist. Check the URL. Remote shards require a manifest, because "
            "counting their samples would require downloading all shards. Run `senet data manifest "
            "FOLDER` where the shards are stored, and upload manifest.json and the index files."
        ) from error
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON: {error}. Prepare the data again.") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(
            f'{where} is not a shard manifest of this project; expected the entry "format": '
            f'"{FORMAT}". Prepare the data with datasets/prepare_places365.py or '
            "prepare_folder.py."
        )
    if content.get("version") != VERSION:
        raise UserError(
            f"{where} is a manifest of version {content.get('version')}; expected version "
            f"{VERSION}. Prepare the data again with the installed release of senet_transfer, or "
            "install the release that wrote the manifest."
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
    """Create a shard's manifest entry from its JSON object."""
    counts = {int(label): int(count) for label, count in entry["class_counts"].items()}
    return Shard(
        str(entry["name"]),
        int(entry["samples"]),
        int(entry["bytes"]),
        str(entry["sha256"]),
        counts,
    )


def parse_index(data: bytes, shard: Shard, where: str) -> np.ndarray:
    """Parse a shard's index: each image's offset, size and label, int64 `(N, 3)`.

    Raises:
        UserError: If the index is damaged or belongs to a different shard.
    """
    try:
        index = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # NumPy raises exceptions of many types for a damaged header
        raise UserError(f"{where} is damaged: {error}. Prepare the data again.") from None
    if index.dtype != np.int64 or index.shape != (shard.samples, 3):
        raise UserError(
            f"{where} has shape {index.shape} and type {index.dtype}; expected ({shard.samples}, "
            "3) and int64. It belongs to a different shard. Prepare the data again."
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
                f"{where} is inconsistent: {shard.name} has {shard.samples} samples, "
                f"{sum(shard.class_counts.values())} labels and the invalid labels {outside[:5]}; "
                "expected one valid label per sample. Prepare the data again."
            )
    if not manifest.shards or manifest.samples != content["samples"]:
        raise UserError(
            f"{where} specifies {content['samples']} samples, but its {len(manifest.shards)} "
            f"shards contain {manifest.samples} in total. Prepare the data again."
        )
