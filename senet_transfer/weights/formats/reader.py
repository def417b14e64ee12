"""Reader for weight files in any supported format.

The format is detected from the content, not from the file name. No code in a file is executed, and
the memory and time for reading a file are bounded by its size.
"""

import io
import json
import math
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
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
from senet_transfer.weights.formats.shards import check_not_a_shard, shard_files
from senet_transfer.weights.formats.sniff import CAFFE, INDEX, PICKLE, SAFETENSORS, TAR, ZIP, sniff
from senet_transfer.weights.formats.state_dict import Checkpoint, check_named_ema, collect
from senet_transfer.weights.formats.tensor_names import ONLY_NETWORK, Wanted, select
from senet_transfer.weights.formats.timm_config import TimmConfig, read_timm_config
from senet_transfer.weights.formats.torch_file import LEGACY_MAGIC, read_legacy, read_tar, read_zip

# Key for this project's own metadata, a dictionary stored with the tensors. Safetensors files
# contain it as JSON, because their metadata values are strings.
OWN_METADATA = "senet_transfer"
# Key in this dictionary for the hash from tensors_sha256. It is the only checksum in .safetensors
# and .pkl files.
OWN_HASH = "tensors_sha256"

_LISTED = 5


@dataclass(frozen=True)
class WeightFile:
    """Content of a weight file.

    Attributes:
        path: Path of the file.
        format: File format: "pth", "safetensors", "pkl" or "caffemodel".
        tensors: Tensors by name, which do not share memory with the file. The names are those in
            the file, without the prefixes of common wrappers; see :func:`~.tensor_names.select`.
        metadata: Small values of plain Python types stored with the tensors, such as ``arch``,
            ``epoch``, ``meta``, ``__author__``, ``matching_heuristics``, and this project's
            metadata under :data:`OWN_METADATA`.
        layers: Layers of a Caffe file, with their parameters; empty for other formats.
        verified: Checks that the content has passed: "sha256", "zip CRC", or "values" if there is
            no checksum and only the values were checked; see :func:`check_values`.
        dropped: Names of omitted tensors, and why each was omitted.
        notes: Notes about the selection among several sets of weights, such as EMA weights.
        timm: Content of timm's ``config.json`` next to the file, if there is one.
    """

    path: Path
    format: str
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)
    layers: tuple[CaffeLayer, ...] = ()
    verified: tuple[str, ...] = ()
    dropped: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    timm: TimmConfig | None = None


def read_tensors(
    path: str | Path, sha256: str | None = None, wanted: Wanted = ONLY_NETWORK
) -> WeightFile:
    """Read a weight file in a ``torch.save``, safetensors, pickle or Caffe format.

    If the same folder contains a checksum file in ``sha256sum`` format, such as
    ``model.pth.sha256`` for ``model.pth``, the weight file is also verified against that hash.

    Args:
        path: Path of the file.
        sha256: Expected SHA-256 in hexadecimal, or at least its first eight digits, which
            publishers often include in file names.
        wanted: Network to read if the file contains several networks.

    Raises:
        UserError: If the file is missing or damaged, has an unknown format or a different hash, or
            contains no tensors, invalid values, or objects other than tensors and plain values. The
            message explains how to fix the problem.
    """
    path = Path(path)
    kind = sniff(path)
    verified = verify_sha256(path, sha256)
    try:
        name, checkpoint, layers = _READERS[kind](path, wanted)
        _verify_own_hash(path, checkpoint, verified)
    except (UserError, NameError, ImportError):  # the last two types indicate a bug in this package
        raise
    except Exception as error:  # damaged or hostile files can raise any exception
        raise UserError(
            f"{path} is damaged or incomplete ({path.stat().st_size:,} bytes): "
            f"{shown(error, 300) or type(error).__name__}. Download the file again."
        ) from error
    if kind == ZIP:
        verified.append("zip CRC")
    # Checksums do not show that training diverged.
    check_values(checkpoint.tensors, path)
    return WeightFile(
        path=path,
        format=name,
        tensors=checkpoint.tensors,
        metadata=checkpoint.metadata,
        layers=tuple(layers),
        verified=tuple(verified) or ("values",),
        dropped=checkpoint.dropped,
        notes=checkpoint.notes,
        timm=None if OWN_METADATA in checkpoint.metadata else read_timm_config(path),
    )


def check_values(tensors: dict[str, torch.Tensor], path: str | Path = "weights") -> None:
    """Check that all tensors are finite and that no variance is negative.

    Batch counters (``num_batches_tracked``) are not checked, because they have no effect on
    outputs and overflow in half precision.

    Raises:
        UserError: If a tensor contains an invalid value. The message lists these tensors.
    """
    bad = []
    for name, tensor in tensors.items():
        if name.endswith("num_batches_tracked"):
            continue
        if tensor.is_floating_point() and tensor.dtype.itemsize == 1:
            tensor = tensor.float()  # torch can't compare all float8 dtypes
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad.append(f"{shown(name)} (non-finite)")
        elif re.search(r"(running_var|variance|_riv)$", name) and _has_negative(tensor):
            bad.append(f"{shown(name)} (negative variance)")
    if bad:
        raise UserError(
            f"{path} contains invalid values: {first_of(bad, _LISTED)}. The file is damaged, or "
            "the training diverged. Download the file again, or use different weights."
        )


def _has_negative(tensor: torch.Tensor) -> bool:
    # PyTorch can't compare complex and most unsigned dtypes, which fit no model.
    comparable = tensor.dtype.is_signed and not tensor.is_complex()
    return comparable and bool((tensor < 0).any())


def _verify_own_hash(path: Path, checkpoint: Checkpoint, verified: list[str]) -> None:
    own = checkpoint.metadata.get(OWN_METADATA)
    stated = own.get(OWN_HASH) if isinstance(own, dict) else None
    if stated is None or checkpoint.dropped:  # the hash covers all tensors
        return
    names = checkpoint.file_names
    renamed = {names.get(name, name): tensor for name, tensor in checkpoint.tensors.items()}
    if stated not in (tensors_sha256(renamed), tensors_sha256(checkpoint.tensors)):
        raise UserError(
            f"The SHA-256 of the tensors in {path} does not match the one in the file's metadata. "
            "The file is damaged or was edited. Download or save it again."
        )
    verified.append("sha256")


def _read_pickle(path: Path, wanted: Wanted) -> tuple[str, Checkpoint, list[CaffeLayer]]:
    stream = io.BytesIO(path.read_bytes())
    first = load_plain(stream, path)
    if isinstance(first, int) and first == LEGACY_MAGIC:
        return "pth", read_legacy(stream, path, wanted), []
    return "pkl", collect(first, path, path.stat().st_size, wanted), []


def _read_safetensors(path: Path, wanted: Wanted) -> tuple[str, Checkpoint, list[CaffeLayer]]:
    check_not_a_shard(path)
    return "safetensors", _from_safetensors({path: None}, path, wanted), []


def _read_shards(path: Path, wanted: Wanted) -> tuple[str, Checkpoint, list[CaffeLayer]]:
    return "safetensors", _from_safetensors(shard_files(path), path, wanted), []


def _from_safetensors(
    files: Mapping[Path, set[str] | None], path: Path, wanted: Wanted
) -> Checkpoint:
    """Read one network from safetensors files.

    Args:
        files: Mapping from the path of each file to the names of the tensors that it must contain,
            or to None if any names are accepted.
        path: Path specified by the user, for error messages.
        wanted: Network to read.
    """
    with ExitStack() as stack:
        place: dict[str, Any] = {}
        metadata: dict[str, Any] = {}
        for file, names in files.items():
            opened = stack.enter_context(safe_open(file, framework="pt", device="cpu"))
            found = set(opened.keys())
            if names is not None and found != names:
                odd = first_of(map(shown, sorted(found ^ names)), _LISTED)
                raise UserError(
                    f"{file} does not contain exactly the tensors listed in {path.name}. "
                    f"Missing or unexpected tensors: {odd}. Download all files again."
                )
            place |= dict.fromkeys(opened.keys(), opened)
            metadata |= opened.metadata() or {}
        if not place:
            raise UserError(
                f"{path} contains no tensors; expected a model's weights. Check the file."
            )
        if OWN_METADATA in metadata:
            metadata[OWN_METADATA] = json.loads(metadata[OWN_METADATA])
        sizes = {n: math.prod(file.get_slice(n).get_shape()) for n, file in place.items()}
        selected = select(sizes, wanted.prefix, path)
        check_named_ema(path, wanted, selected)
        # Clone the tensors, because safetensors memory-maps the file, which may be replaced.
        tensors = {n: place[own].get_tensor(own).clone() for n, own in selected.kept.items()}
    return Checkpoint(tensors, metadata, selected.kept, selected.dropped)


def _read_caffe(path: Path, _: Wanted) -> tuple[str, Checkpoint, list[CaffeLayer]]:
    name, layers = read_caffemodel(path)
    tensors = caffe_tensors(layers, path)
    if not tensors:
        raise UserError(
            f"{path} is a Caffe file, but its layers contain no blobs. Download it again."
        )
    return "caffemodel", Checkpoint(tensors, {"name": name}), layers


_READERS: dict[str, Callable[[Path, Wanted], tuple[str, Checkpoint, list[CaffeLayer]]]] = {
    ZIP: lambda path, wanted: ("pth", read_zip(path, wanted), []),
    TAR: lambda path, wanted: ("pth", read_tar(path, wanted), []),
    PICKLE: _read_pickle,
    SAFETENSORS: _read_safetensors,
    INDEX: _read_shards,
    CAFFE: _read_caffe,
}
