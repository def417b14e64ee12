"""Saving of weight files in this project's format, with metadata that describes the network."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from senet_transfer.errors import UserError
from senet_transfer.preprocessing import Preprocessing
from senet_transfer.utils.atomic_io import atomic_path
from senet_transfer.utils.hashing import tensors_sha256
from senet_transfer.weights.families.architecture import Architecture
from senet_transfer.weights.families.geometry import Geometry
from senet_transfer.weights.families.statements import named_model
from senet_transfer.weights.formats.reader import OWN_HASH, OWN_METADATA
from senet_transfer.weights.mapping.target import Target, target_of

_VERSION = 1

_MAX_CLASSES = 10_000


def model_metadata(model: nn.Module, classes: Sequence[str] = ()) -> dict[str, Any]:
    """Return a model's metadata: network, layer options, preprocessing, origin and classes.

    Args:
        model: Backbone, classifier or detector.
        classes: Class names in the order of the model's outputs, if they are known.

    Returns:
        Values of plain Python types for a checkpoint's "senet_transfer" entry.
    """
    return with_classes(_metadata(target_of(model)), classes)


def with_classes(metadata: dict[str, Any], classes: Sequence[str]) -> dict[str, Any]:
    """Return a network's metadata with the class names added, if there are any.

    Class names are not stored for more than 10,000 classes, because readers limit the size of
    metadata.
    """
    if not 0 < len(classes) <= _MAX_CLASSES:
        return metadata
    return {**metadata, "classes": list(classes)}


def _metadata(target: Target) -> dict[str, Any]:
    pixels = target.pixels()
    preprocessing = target.backbone_preprocessing()
    if pixels:
        preprocessing = replace(
            preprocessing, format=pixels.format, mean=pixels.mean, std=pixels.std
        )
    source = getattr(target.backbone, "weights_source", {})
    metadata = own_metadata(target.architecture, target.geometry, preprocessing, source)
    return {**metadata, "model": target.network} if target.network else metadata


def own_metadata(
    architecture: Architecture | None,
    geometry: Geometry,
    preprocessing: Preprocessing | None,
    source: dict[str, Any],
) -> dict[str, Any]:
    """Return a network's metadata, given its architecture, options, preprocessing and origin."""
    metadata = {
        "version": _VERSION,
        "model": named_model(architecture, geometry),
        "geometry": asdict(geometry),
        "source": source,
    }
    if preprocessing:
        metadata["preprocessing"] = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(preprocessing).items()
        }
    return metadata


def save_weights(model: nn.Module, path: str | Path, classes: Sequence[str] = ()) -> None:
    """Write a model's tensors and metadata to a ``.pth`` or ``.safetensors`` file.

    The file is written atomically, by renaming a temporary file.

    Args:
        model: Backbone, classifier or detector.
        path: Path of the file; its suffix selects the format.
        classes: Class names in the order of the model's outputs, if they are known.

    Raises:
        UserError: If the suffix is unknown, or the file can't be written.
    """
    target = target_of(model)
    tensors = {target.own_names[name]: tensor for name, tensor in target.tensors.items()}
    write_own(Path(path), tensors, with_classes(_metadata(target), classes))


def write_own(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write tensors and metadata in this project's format; see :func:`save_weights`."""
    check_suffix(path)
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    metadata = {**metadata, OWN_HASH: tensors_sha256(tensors)}
    with written_whole(path) as partial:
        if path.suffix == ".safetensors":
            # Use a single entry, because the order of several entries in the file would be random.
            save_file(tensors, partial, {OWN_METADATA: json.dumps(metadata)})
        else:
            with open(partial, "wb") as stream:  # open() reports why a file can't be written
                torch.save({"model": tensors, OWN_METADATA: metadata}, stream)


def check_suffix(path: Path, suffixes: tuple[str, ...] = (".pth", ".safetensors")) -> None:
    """Raise a UserError if a file's suffix is not one of ``suffixes``."""
    if path.suffix not in suffixes:
        raise UserError(
            f"{path}: Weight files must have the suffix {' or '.join(suffixes)}, not "
            f"{path.suffix!r}."
        )


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path``, and rename the written file to ``path`` on success.

    Raises:
        UserError: If the file can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as partial:
            yield partial
    # If the disk is full, torch raises a RuntimeError and safetensors a SafetensorError.
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = error if isinstance(error, OSError) else error.__context__ or error
        raise UserError(f"Cannot write {path}: {reason}. Choose a different path.") from error
