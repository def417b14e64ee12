"""Reader of weight files of any format.

The format is detected from the content, not the name. Nothing in a file is executed, and the memory
and time to read it are bounded by its size.
"""

import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from senet_transfer.errors import UserError
from senet_transfer.utils.hashing import tensors_sha256, verify_sha256
from senet_transfer.utils.safe_pickle import load_plain
from senet_transfer.utils.text import first_of, shown
from senet_transfer.weights.formats.caffe.caffemodel import caffe_tensors, read_caffemodel
from senet_transfer.weights.formats.caffe.layers import CaffeLayer
from senet_transfer.weights.formats.sniff import CAFFE, PICKLE, SAFETENSORS, TAR, ZIP, sniff
from senet_transfer.weights.formats.state_dict import Checkpoint, collect
from senet_transfer.weights.formats.torch_file import LEGACY_MAGIC, read_legacy, read_tar, read_zip

# Key of this project's own metadata: a dictionary stored next to the tensors (as JSON in a
# .safetensors, whose metadata are strings).
OWN_METADATA = "senet_transfer"
# Key in it of the tensors' hash, by tensors_sha256: the only checksum of a .safetensors or .pkl.
OWN_HASH = "tensors_sha256"

_LISTED = 5


@dataclass(frozen=True)
class WeightFile:
    """Content of a weight file.

    Attributes:
        path: the file.
        format: "pth", "safetensors", "pkl" or "caffemodel".
        tensors: The tensors by name, in memory of their own. The usual wrappers are removed, and
            ``module.`` if every name has it; otherwise names are the file's.
        metadata: small plain values stored with the tensors: ``arch``, ``epoch``, ``meta``,
            ``__author__``, ``matching_heuristics``, this project's own under :data:`OWN_METADATA`.
        layers: of a Caffe file, with their parameters; otherwise empty.
        verified: the checks that the content passed: "sha256", "zip CRC", or "values" if there is
            no checksum and the numbers were checked (see :func:`check_values`).
    """

    path: Path
    format: str
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)
    layers: tuple[CaffeLayer, ...] = ()
    verified: tuple[str, ...] = ()


def read_tensors(path: str | Path, sha256: str | None = None) -> WeightFile:
    """Read a weight file: ``torch.save``'s formats, safetensors, pickles, Caffe's.

    A SHA-256 next to the file (``NAME.sha256``, as ``sha256sum`` writes it) is verified too.

    Args:
        path: the file.
        sha256: the expected SHA-256 in hexadecimal, or its first eight digits or more (what
            publishers put into file names).

    Raises:
        UserError: the file is missing, damaged, of an unknown format, without tensors, has another
            hash, or holds more than tensors and plain values. The message says how to fix it.
    """
    path = Path(path)
    kind = sniff(path)
    verified = verify_sha256(path, sha256)
    try:
        name, checkpoint, layers = _READERS[kind](path)
        _verify_own_hash(path, checkpoint, verified)
    except (UserError, NameError, ImportError):  # the last two can only be our own mistakes
        raise
    except Exception as error:  # a damaged or hostile file can raise anything in any reader
        raise UserError(
            f"{path}: damaged or incomplete ({path.stat().st_size:,} bytes): "
            f"{shown(error, 300) or type(error).__name__}. Get the file again."
        ) from error
    if kind == ZIP:
        verified.append("zip CRC")
    if not verified:
        check_values(checkpoint.tensors, path)
        verified.append("values")
    return WeightFile(
        path, name, checkpoint.tensors, checkpoint.metadata, tuple(layers), tuple(verified)
    )


def check_values(tensors: dict[str, torch.Tensor], path: str | Path = "weights") -> None:
    """Check for non-finite values and negative variances, the visible damage without a checksum.

    Raises:
        UserError: there are such values; the message names the tensors.
    """
    bad = []
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad.append(f"{shown(name)} (not finite)")
        elif re.search(r"(running_var|variance|_riv)$", name) and bool((tensor < 0).any()):
            bad.append(f"{shown(name)} (a negative variance)")
    if bad:
        raise UserError(
            f"{path}: impossible values in {first_of(bad, _LISTED)}. The file is damaged, "
            "or its training diverged. Get the file again."
        )


def _verify_own_hash(path: Path, checkpoint: Checkpoint, verified: list[str]) -> None:
    own = checkpoint.metadata.get(OWN_METADATA)
    stated = own.get(OWN_HASH) if isinstance(own, dict) else None
    if stated is None:
        return
    if tensors_sha256(checkpoint.tensors) != stated:
        raise UserError(
            f"{path}: its tensors are not those that it was saved with (their SHA-256 differs from "
            "the one in its metadata). The file is damaged or was edited. Get it again."
        )
    verified.append("sha256")


def _read_pickle(path: Path) -> tuple[str, Checkpoint, list[CaffeLayer]]:
    stream = io.BytesIO(path.read_bytes())
    first = load_plain(stream, path)
    if isinstance(first, int) and first == LEGACY_MAGIC:
        return "pth", read_legacy(stream, path), []
    return "pkl", collect(first, path, path.stat().st_size), []


def _read_safetensors(path: Path) -> tuple[str, Checkpoint, list[CaffeLayer]]:
    with safe_open(path, framework="pt", device="cpu") as file:
        metadata: dict[str, Any] = dict(file.metadata() or {})
        # Copies, because the library's tensors are mapped from the file, which may be replaced.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    if not tensors:
        raise UserError(f"{path}: no tensors inside. Check the file.")
    if OWN_METADATA in metadata:
        metadata[OWN_METADATA] = json.loads(metadata[OWN_METADATA])
    return "safetensors", Checkpoint(tensors, metadata), []


def _read_caffe(path: Path) -> tuple[str, Checkpoint, list[CaffeLayer]]:
    name, layers = read_caffemodel(path)
    tensors = caffe_tensors(layers, path)
    if not tensors:
        raise UserError(f"{path}: a Caffe file, but no layer in it has blobs. Get it again.")
    return "caffemodel", Checkpoint(tensors, {"name": name}), layers


_READERS: dict[str, Callable[[Path], tuple[str, Checkpoint, list[CaffeLayer]]]] = {
    ZIP: lambda path: ("pth", read_zip(path), []),
    TAR: lambda path: ("pth", read_tar(path), []),
    PICKLE: _read_pickle,
    SAFETENSORS: _read_safetensors,
    CAFFE: _read_caffe,
}
