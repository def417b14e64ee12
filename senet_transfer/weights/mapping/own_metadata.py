"""Metadata that this project has written to a weight file."""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from typing import Any

from senet_transfer.errors import UserError
from senet_transfer.preprocessing import Preprocessing, channels_of
from senet_transfer.utils.text import shown
from senet_transfer.weights.families.geometry import Geometry
from senet_transfer.weights.formats.reader import OWN_METADATA, WeightFile
from senet_transfer.weights.hub.timm_networks import is_timm, timm_preprocessing


def own_options(file: WeightFile) -> tuple[Geometry, Preprocessing | None]:
    """Return the layer options and the preprocessing of a file that this project has written.

    Raises:
        UserError: If the metadata is invalid.
    """
    word = file.metadata[OWN_METADATA]
    if not isinstance(word, Mapping):
        raise UserError(
            f"{file.path}: The entry {OWN_METADATA!r} is a {type(word).__name__}; expected a dict. "
            "Save the model again with senet_transfer.save_weights."
        )
    geometry, pixels = word.get("geometry"), word.get("preprocessing")
    return (
        Geometry.from_dict(geometry) if isinstance(geometry, Mapping) else Geometry(),
        _preprocessing(file, pixels) if isinstance(pixels, Mapping) else None,
    )


def own_network(file: WeightFile) -> str:
    """Return the name of the timm network, or "" if the file's metadata contains no such name.

    Only metadata written by this project is considered.
    """
    word = file.metadata.get(OWN_METADATA)
    name = word.get("model") if isinstance(word, Mapping) else None
    return name if isinstance(name, str) and is_timm(name) else ""


def class_names(file: WeightFile) -> tuple[str, ...]:
    """Return the class names in the metadata written by this project or timm; () without them.

    Raises:
        UserError: If the names are not a list of strings.
    """
    if file.timm:
        return file.timm.classes
    word = file.metadata.get(OWN_METADATA)
    names = word.get("classes", ()) if isinstance(word, Mapping) else ()
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"{file.path} has invalid class names in its metadata: {shown(names)}. Expected a list "
            "of strings. Save the model again with senet_transfer.save_weights."
        )
    return tuple(names)


# Numbers of values for the mean and std of each image format.
_CHANNELS = {"RGB": (3,), "BGR": (3,), "L": (1, 3)}


def _preprocessing(file: WeightFile, values: Mapping[str, Any]) -> Preprocessing:
    known = {f.name: values[f.name] for f in fields(Preprocessing) if f.name in values}
    if "mode" not in known and (network := own_network(file)):
        # Older files don't contain the mode. They can be read without timm.
        with suppress(UserError):
            known["mode"] = timm_preprocessing(network).mode
    try:
        for name in ("mean", "std", "value_range"):
            if name in known:
                known[name] = tuple(float(value) for value in known[name])
        found = Preprocessing(**known)
        counts = _CHANNELS.get(found.format) or (channels_of(str(found.format)) or 0,)
        if counts == (0,) or found.interpolation not in ("bilinear", "bicubic"):
            raise ValueError("unknown channel order or interpolation")
        if len(found.mean) not in counts or len(found.std) != len(found.mean):
            raise ValueError("wrong number of values for mean or std")
        if not all(isinstance(side, int) and side > 0 for side in (found.resize, found.crop)):
            raise ValueError("resize and crop must be positive integers")
        if not isinstance(found.mode, str) or not isinstance(found.upright, bool):
            raise ValueError(
                "mode must be a string, and upright (whether to apply the EXIF orientation) must "
                "be a boolean"
            )
        if not _is_range(found.value_range):
            raise ValueError("value_range must be empty or (low, high) with low < high")
        return found
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{file.path} has invalid preprocessing in its metadata: {dict(values)} ({error}). "
            "Save the model again with senet_transfer.save_weights."
        ) from error


def _is_range(values: tuple[float, ...]) -> bool:
    """Return whether ``values`` is empty or contains two finite values in increasing order."""
    return not values or (
        len(values) == 2 and all(map(math.isfinite, values)) and values[0] < values[1]
    )
