"""Weights under the names of another project, where it has a network that computes the same."""

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
from senet_transfer.weights.save import check_suffix, own_metadata, write_own, written_whole

# In another project's file what it was made from can't stand under OWN_METADATA, which says that
# the names are this project's.
MADE_FROM = "made_by_senet_transfer_from"

_OURS, _DETECTRON2 = "senet_transfer", "detectron2"

_RESNETS = frozenset({"resnet18", "resnet34", "resnet50", "resnet101", "resnet152"})
_RESNEXTS = frozenset({"resnext50_32x4d", "resnext101_32x4d"})
_SE_BOTTLENECKS = frozenset(
    {f"se_{name}" for name in (*_RESNEXTS, "resnet50", "resnet101", "resnet152")}
)
_SE_BASIC = frozenset({"se_resnet18", "se_resnet34"})


@dataclass(frozen=True)
class Format:
    """Another project's files.

    Attributes:
        title: the project, for messages.
        family: of the files, as they are read.
        rename: from this project's names to theirs.
        networks: those that the project has, by their names here.
        rename_deep: as ``rename``, for a stem of three convolutions.
        basic_divisor: what the hidden SE widths of its networks of basic blocks are multiples of.
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

TARGETS = (_OURS, _DETECTRON2, *FORMATS)


def target_for(path: Path, to: str | None) -> str:
    """What is to be written: what was asked for, or what the suffix stands for.

    Raises:
        UserError: an unknown target, or a suffix that it does not have.
    """
    to = to or (_DETECTRON2 if path.suffix == ".pkl" else _OURS)
    if to not in TARGETS:
        raise UserError(f"Weights can't be converted to {to!r}. Known: {', '.join(TARGETS)}.")
    check_suffix(path, (".pkl",) if to == _DETECTRON2 else (".pth", ".safetensors"))
    return to


def family_of(to: str) -> str:
    """The family that a file of :func:`write_converted` is read as."""
    return FORMATS[to].family if to in FORMATS else _OURS


def write_converted(source: Source, path: Path, to: str) -> list[str]:
    """Writes the tensors of a file, and where they come from, for another project or this one.

    Args:
        source: the file.
        path: the new one; see :func:`target_for`.
        to: one of :data:`TARGETS`.

    Returns:
        What is worth knowing about the new file, in sentences.

    Raises:
        UserError: the target has no network that computes what the file's does; or the file can't
            be written.
    """
    if source.unknown:
        raise UserError(
            f"{source.path}, taken for {source.taken_for}, has {len(source.unknown)} tensors of "
            f"names that the family does not have ({first_of(source.unknown, 4)}): what they do "
            "would be lost."
        )
    origin = {
        "family": source.family.name,
        "file": Path(source.path).name,
        "sha256": file_sha256(source.path),
    }
    metadata = own_metadata(source.architecture, source.geometry, source.preprocessing, origin)
    notes = [f"{note[0].upper()}{note[1:]}." for note in source.notes]
    if source.family.affine_norms:
        notes.append("Its norms have no statistics of their own: for FrozenBN alone.")
    if to in FORMATS:
        _write_foreign(source, path, FORMATS[to], metadata)
        if "linear.weight" not in source.tensors:
            notes.append("It has no classifier: there it loads with strict=False, or without one.")
        return notes
    # A detector's names tell which part of it a tensor is of; a backbone's are the same everywhere.
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
    # As in its model zoo: no counters, and numpy's types, of which bfloat16 is none.
    tensors = {
        name: tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        for name, tensor in tensors.items()
        if not name.endswith(".num_batches_tracked")
    }
    content = {
        "model": {name: tensor.contiguous().numpy() for name, tensor in tensors.items()},
        "__author__": "senet_transfer",
        # A backbone's names are matched with the ends of a detector's.
        "matching_heuristics": heuristics,
        OWN_METADATA: {**metadata, OWN_HASH: tensors_sha256(tensors)},
    }
    with written_whole(path) as partial, open(partial, "wb") as file:
        pickle.dump(content, file, protocol=4)


def _keys_for_detectron2(source: Source) -> list[str]:
    """What a config of Detectron2's has to say, which its files can't."""
    notes, keys = [], []
    if source.geometry.stride_in_1x1 is not None:
        keys.append(f"MODEL.RESNETS.STRIDE_IN_1X1 {source.geometry.stride_in_1x1}")
    if pixels := source.preprocessing:
        keys.append(f"INPUT.FORMAT {pixels.format}")
        keys += [f"MODEL.PIXEL_{n.upper()} {list(getattr(pixels, n))}" for n in ("mean", "std")]
    if keys:
        notes.append(f"Detectron2 has to be told: {', '.join(keys)}.")
    arch = source.architecture
    if arch and (arch.se_stages or arch.deep_stem or source.geometry.stem_pool == "ceil"):
        notes.append(
            "Detectron2's own backbones have neither SE nor the ceil pool, and drop tensors that "
            "they don't know without an error: load this file into a backbone of senet_transfer."
        )
    return notes


def _write_foreign(source: Source, path: Path, form: Format, metadata: dict[str, Any]) -> None:
    _check_expressible(source, form)
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
            raise UserError(f"{source.path}: {form.title} has no tensor like {name}.")
        if ".se.fc" in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]  # theirs are 1x1 convolutions
        tensors[theirs] = tensor.contiguous().clone()
    return tensors


def _check_expressible(source: Source, form: Format) -> None:
    """Raises UserError where the project has no network that computes what the file's does."""
    arch = source.architecture
    problems = []
    if source.detector:
        problems.append("The file is of a detector, of which it has no parts but the backbone.")
    if arch is None or arch.name not in form.networks:
        name = arch.name if arch else "no residual network"
        problems.append(f"The file's network is {name}; it has {', '.join(sorted(form.networks))}.")
    else:
        problems += _problems(source, arch, form)
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise UserError(
            f"{source.path}, taken for {source.taken_for}, can't be a file of {form.title}:\n"
            f"{lines}\nConvert it to senet_transfer or detectron2, whose files say what differs."
        )


def _problems(source: Source, arch: Architecture, form: Format) -> list[str]:
    problems = []
    family = FAMILIES[form.family]
    for name, theirs in family.geometry(arch).options().items():
        if (ours := getattr(source.geometry, name)) != theirs:
            said = "not stated" if ours is None else repr(ours)
            problems.append(f"{name} is {said} in the file, {theirs!r} in {form.title}.")
    expected = family.preprocessing(arch)
    if source.preprocessing is None:
        problems.append("The file does not state what pixels its network expects.")
    elif expected:
        problems += pixel_contradictions(source.preprocessing, expected)
    if arch.se_stages:
        divisor = 1 if arch.bottleneck else form.basic_divisor
        found = (arch.se_stages, arch.se_ratio, arch.se_divisor, arch.se_bias)
        theirs = ((2, 3, 4, 5), 16, divisor, True)
        if found != theirs:
            problems.append(
                "Its SE layers (stages, ratio, divisor of the widths, biases) are "
                f"{found} in the file, {theirs} in {form.title}."
            )
    return problems
