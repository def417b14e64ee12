"""This project's own weight files, which say themselves what their network is."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from senet_transfer.errors import UserError
from senet_transfer.weights.files import OWN_HASH, OWN_METADATA, tensors_sha256
from senet_transfer.weights.target import Target, target_of

_VERSION = 1


def model_metadata(model: nn.Module) -> dict[str, Any]:
    """What a file should say of a model: its network, geometry, preprocessing and origin.

    Returns:
        Plain values, for the entry "senet_transfer" of a checkpoint.
    """
    return _metadata(target_of(model))


def _metadata(target: Target) -> dict[str, Any]:
    pixels = target.pixels()
    preprocessing = asdict(target.trunk_preprocessing())
    if pixels:
        preprocessing |= {name: getattr(pixels, name) for name in ("format", "mean", "std")}
    return {
        "version": _VERSION,
        "model": target.architecture.name if target.architecture else "",
        "geometry": asdict(target.geometry),
        "preprocessing": {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in preprocessing.items()
        },
        "source": getattr(target.trunk, "weights_source", {}),
    }


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Writes a model's tensors, and what they are, to a ``.pth`` or ``.safetensors`` file.

    The file is whole or not there at all: it is written beside its place and moved there.

    Args:
        model: a trunk, a classifier or a detector.
        path: the file; its suffix decides the format.

    Raises:
        UserError: another suffix, or the file can't be written.
    """
    path = Path(path)
    if path.suffix not in (".pth", ".safetensors"):
        raise UserError(f"{path}: weights are saved as .pth or .safetensors, not {path.suffix!r}.")
    target = target_of(model)
    tensors = {
        target.own_names[name]: tensor.detach().cpu().contiguous().clone()
        for name, tensor in target.tensors.items()
    }
    metadata = {**_metadata(target), OWN_HASH: tensors_sha256(tensors)}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            save_file(tensors, partial, {"format": "pt", OWN_METADATA: json.dumps(metadata)})
        else:
            torch.save({"model": tensors, OWN_METADATA: metadata}, partial)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path} can't be written: {error}. Choose another place.") from error
    finally:
        partial.unlink(missing_ok=True)
