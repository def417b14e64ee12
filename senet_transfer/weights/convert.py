"""Conversion of weights to the tensor names and file formats of other projects."""

import json
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from senet_transfer.errors import UserError
from senet_transfer.preprocessing import Preprocessing
from senet_transfer.utils.hashing import file_sha256, tensors_sha256
from senet_transfer.utils.private_api import set_state_dict_metadata
from senet_transfer.utils.text import first_of
from senet_transfer.weights.families import renaming_export as names_back
from senet_transfer.weights.families.architecture import Architecture
from senet_transfer.weights.families.registry import FAMILIES
from senet_transfer.weights.families.renaming import Rename
from senet_transfer.weights.formats.reader import OWN_HASH, OWN_METADATA
from senet_transfer.weights.load import pixel_contradictions
from senet_transfer.weights.mapping.source import Source
from senet_transfer.weights.save import (
    check_suffix,
    own_metadata,
    with_classes,
    write_own,
    written_whole,
)

# Metadata key for the origin of a converted file. OWN_METADATA can't be used, because it marks
# files with this project's tensor names.
MADE_FROM = "made_by_senet_transfer_from"

_OURS, DETECTRON2 = "senet_transfer", "detectron2"

_RESNETS = frozenset({"resnet18", "resnet34", "resnet50", "resnet101", "resnet152"})
_RESNEXTS = frozenset({"resnext50_32x4d", "resnext101_32x4d"})
_SE_BOTTLENECKS = frozenset(
    {f"se_{name}" for name in (*_RESNEXTS, "resnet50", "resnet101", "resnet152")}
)
_SE_BASIC = frozenset({"se_resnet18", "se_resnet34"})


@dataclass(frozen=True)
class Format:
    """Weight file format of another project, as a target for conversion.

    Attributes:
        title: Project name, for error messages.
        family: Weight family of the project's files.
        rename: Function that maps senet_transfer's tensor names to those of the other project.
        networks: senet_transfer's names of the networks that the other project supports.
        rename_deep: Same as ``rename``, for networks with a three-convolution stem.
        basic_divisor: Divisor of the hidden widths of SE layers in networks with basic blocks.
            The widths are rounded to multiples of this number.
    """

    title: str
    family: str
    rename: Rename
    networks: frozenset[str]
    rename_deep: Rename | None = None
    basic_divisor: int = 1


FORMATS: dict[str, Format] = {
    "torchvision": Format(
        "torchvision", "torchvision_v1", names_back.torchvision, _RESNETS | {"resnext50_32x4d"}
    ),
    "timm": Format(
        "timm",
        "timm",
        names_back.timm,
        _RESNETS | _RESNEXTS | _SE_BOTTLENECKS | _SE_BASIC | {"senet154"},
        rename_deep=names_back.timm_deep,
        basic_divisor=8,
    ),
    "timm_legacy": Format(
        "timm (legacy_se*)",
        "timm_legacy",
        names_back.cadene,
        _SE_BOTTLENECKS | _SE_BASIC | {"senet154"},
    ),
    "cadene": Format(
        "pretrainedmodels", "cadene", names_back.cadene, _SE_BOTTLENECKS | {"senet154"}
    ),
    "mmpretrain": Format(
        "mmpretrain",
        "mmpretrain",
        names_back.mmpretrain,
        _RESNETS | _RESNEXTS | {"se_resnet50", "se_resnet101"},
    ),
}

TARGETS = (_OURS, DETECTRON2, *FORMATS)


def target_for(path: Path, to: str | None) -> str:
    """Return ``to`` or, if it is None, the default conversion target for the path's suffix.

    Raises:
        UserError: If the target is unknown or does not support this suffix.
    """
    to = to or (DETECTRON2 if path.suffix == ".pkl" else _OURS)
    if to not in TARGETS:
        raise UserError(
            f"Weights can't be converted to {to!r}; expected one of: {', '.join(TARGETS)}."
        )
    check_suffix(path, (".pkl",) if to == DETECTRON2 else (".pth", ".safetensors"))
    return to


def family_of(to: str) -> str:
    """Return the weight family of a converted file, given the conversion target ``to``.

    ``to`` is one of :data:`TARGETS`.
    """
    return FORMATS[to].family if to in FORMATS else _OURS


def write_converted(source: Source, path: Path, to: str) -> list[str]:
    """Convert a weight file to another format, and store metadata about the origin of the weights.

    Args:
        source: Weight file, as returned by :func:`~.mapping.source.examine`.
        path: Path of the new file. Its suffix must be valid for the target; see :func:`target_for`.
        to: Conversion target, one of :data:`TARGETS`.

    Returns:
        Notes for the user about the new file, as complete sentences.

    Raises:
        UserError: If the target project has no equivalent network, or the file can't be written.
    """
    if source.unknown:
        raise UserError(
            f"{source.path}, detected as {source.detected_as}, contains {len(source.unknown)} "
            f"tensors with unknown names ({first_of(source.unknown, 4)}), which can't be "
            "converted. Remove these tensors from the file if they are not needed."
        )
    origin = {
        "family": source.family.name,
        "file": Path(source.path).name,
        "sha256": file_sha256(source.path),
    }
    metadata = own_metadata(source.architecture, source.geometry, source.preprocessing, origin)
    metadata = with_classes(metadata, source.classes)
    notes = [f"{note[0].upper()}{note[1:]}." for note in source.notes]
    if source.family.affine_norms:
        notes.append(
            "The norms in the file have no running statistics. Use the new file only with FrozenBN."
        )
    if to in FORMATS:
        _write_foreign(source, path, FORMATS[to], metadata)
        notes += _keys_for_images(source.preprocessing)
        if "linear.weight" not in source.tensors:
            notes.append(
                "The file has no classifier. Load the new file with strict=False, or into a model "
                "without a classifier."
            )
        return notes
    # Keep a detector's full tensor names, including those of the submodules.
    tensors = {
        source.original[name] if source.detector else name: tensor
        for name, tensor in source.tensors.items()
    }
    if to == _OURS:
        write_own(path, tensors, metadata)
        return notes
    _write_detectron2(path, tensors, metadata, heuristics=not source.detector)
    return [*notes, *_keys_for_detectron2(source)]


def _write_detectron2(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any], *, heuristics: bool
) -> None:
    # As in Detectron2's model zoo, omit num_batches_tracked and store numpy arrays, which do not
    # support bfloat16.
    tensors = {
        name: tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        for name, tensor in tensors.items()
        if not name.endswith(".num_batches_tracked")
    }
    content = {
        "model": {name: tensor.contiguous().numpy() for name, tensor in tensors.items()},
        "__author__": "senet_transfer",
        # This lets Detectron2 match a backbone's names with the suffixes of a detector's names.
        "matching_heuristics": heuristics,
        OWN_METADATA: {**metadata, OWN_HASH: tensors_sha256(tensors)},
    }
    with written_whole(path) as partial, open(partial, "wb") as file:
        pickle.dump(content, file, protocol=4)


def _keys_for_detectron2(source: Source) -> list[str]:
    """Return notes about the config keys that Detectron2 requires for the converted weights."""
    notes, keys = [], []
    if source.geometry.stride_in_1x1 is not None:
        keys.append(f"MODEL.RESNETS.STRIDE_IN_1X1 {source.geometry.stride_in_1x1}")
    if pixels := source.preprocessing:
        keys.append(f"INPUT.FORMAT {pixels.format}")
        keys += [f"MODEL.PIXEL_{n.upper()} {list(getattr(pixels, n))}" for n in ("mean", "std")]
    if keys:
        notes.append(f"Set these keys in Detectron2's config: {', '.join(keys)}.")
    arch = source.architecture
    if arch and (arch.se_stages or arch.deep_stem or source.geometry.stem_pool in ("ceil", "none")):
        notes.append(
            "Detectron2's own backbones support neither SE, the deep stem, a missing stem pool nor "
            "a stem pool in ceil mode. Detectron2 would ignore unknown tensors without an error. "
            "Load this file into a senet_transfer backbone."
        )
    return notes


def _keys_for_images(pixels: Preprocessing | None) -> list[str]:
    """Return a note about preprocessing settings that the new file can't store.

    Returns:
        A list that contains the note; empty if the file doesn't need to store such settings.
    """
    keys = []
    if pixels and pixels.upright:
        keys.append("INPUT.EXIF apply")
    if pixels and pixels.value_range:
        keys.append(f"INPUT.VALUE_RANGE {list(pixels.value_range)}")
    if pixels and pixels.mode != "short_side":
        keys.append(f"INPUT.CLASSIFICATION.TEST_MODE {pixels.mode}")
    if not keys:
        return []
    return [f"The new file doesn't specify how its model reads images: {', '.join(keys)}."]


def _write_foreign(source: Source, path: Path, form: Format, metadata: dict[str, Any]) -> None:
    _check_supported(source, form)
    tensors = _renamed(source, form)
    if path.suffix == ".safetensors":
        with written_whole(path) as partial:
            save_file(tensors, partial, {"format": "pt", MADE_FROM: json.dumps(metadata)})
        return
    state = OrderedDict(tensors)
    set_state_dict_metadata(state, {MADE_FROM: metadata})
    with written_whole(path) as partial, open(partial, "wb") as file:
        torch.save(state, file)


def _renamed(source: Source, form: Format) -> dict[str, Tensor]:
    deep = source.architecture is not None and source.architecture.deep_stem
    rename: Callable[[str], str | None] = (
        form.rename_deep if deep and form.rename_deep else form.rename
    )
    tensors = {}
    for name, tensor in source.tensors.items():
        theirs = rename(name)
        if theirs is None:
            raise UserError(
                f"{source.path} can't be converted: {form.title} has no tensor that corresponds to "
                f"{name}. Convert the file to the senet_transfer or detectron2 format instead."
            )
        if ".se.fc" in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]  # the other projects use 1x1 convolutions
        tensors[theirs] = tensor.contiguous().clone()
    return tensors


def _check_supported(source: Source, form: Format) -> None:
    """Raise a UserError if the target project has no equivalent of the network in the file."""
    arch = source.architecture
    problems = []
    if source.detector:
        problems.append(
            f"The file contains a detector, but {form.title} supports only backbones and "
            "classifiers."
        )
    if arch is None or arch.name not in form.networks:
        name = arch.name if arch else "unknown"
        networks = ", ".join(sorted(form.networks))
        problems.append(f"The file's network is {name}, but {form.title} supports only {networks}.")
    else:
        problems += _problems(source, arch, form)
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise UserError(
            f"{source.path}, detected as {source.detected_as}, can't be converted to "
            f"{form.title}:\n{lines}\nConvert the file to the senet_transfer or detectron2 format "
            "instead."
        )


def _problems(source: Source, arch: Architecture, form: Format) -> list[str]:
    problems = []
    family = FAMILIES[form.family]
    for name, theirs in family.geometry(arch).options().items():
        if (ours := getattr(source.geometry, name)) != theirs:
            said = "not specified" if ours is None else repr(ours)
            problems.append(f"{name} is {said} in the file, but {theirs!r} in {form.title}.")
    expected = family.preprocessing(arch)
    if source.preprocessing is None:
        problems.append("The file does not specify the preprocessing that its network expects.")
    elif expected:
        problems += pixel_contradictions(source.preprocessing, expected)
    if arch.se_stages:
        divisor = 1 if arch.bottleneck else form.basic_divisor
        found = (arch.se_stages, arch.se_ratio, arch.se_divisor, arch.se_bias)
        theirs = ((2, 3, 4, 5), 16, divisor, True)
        if found != theirs:
            problems.append(
                f"The SE options (stages, ratio, width divisor, biases) are {found} in the file, "
                f"but {theirs} in {form.title}."
            )
    return problems
