"""Selection of one network's tensors from the flat names of a state dict.

Wrappers for distributed training, compilation and averaging change the names of a model's tensors.
Training scripts may also store several networks, or counters, in one state dict. The same rules
apply to all file formats.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from senet_transfer.errors import UserError
from senet_transfer.utils.text import first_of, shown

# Prefixes that DataParallel and torch.compile add to all tensor names of a model.
PREFIXES = ("module.", "_orig_mod.")
# Parts that torch.compile, FSDP, activation checkpointing and Lightning Fabric insert anywhere in a
# name. No network's own modules have these names.
_INSERTED = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
# Counters of averaged models (torch.optim.swa_utils, mmengine, ema_pytorch), with one element.
_COUNTERS = frozenset(
    {"n_averaged", "steps", "step", "initted", "num_updates", "updates", "decay", "global_step"}
)
_MAX_DEPTH = 6
_AVERAGED_WRAPPERS = frozenset({"module", "ema_model", "online_model", "model", "averaged_model"})
MMCV_COPY = "copy of mmcv's EMAHook"
_FLAT_PARAMETER = re.compile(r"(.*\.)?_?flat_param(_\d+)?")


@dataclass(frozen=True)
class Wanted:
    """Specification of one network in a file that may contain several.

    Attributes:
        prefix: Prefix of the network's tensor names, or the key of its state dict, with or without
            a trailing dot. Empty for a file with a single network.
        ema: Whether to use the averaged (EMA) weights if the file contains both averaged and
            non-averaged weights. If None, the convention of the project that saved the file
            applies.
    """

    prefix: str = ""
    ema: bool | None = None


ONLY_NETWORK = Wanted()


@dataclass
class Selected:
    """Tensor names that belong to the selected network.

    Attributes:
        kept: Original name of each selected tensor, by its name without prefixes.
        dropped: Names of the omitted tensors, and why each was omitted.
    """

    kept: dict[str, str]
    dropped: dict[str, str] = field(default_factory=dict)


def select(sizes: Mapping[str, int], prefix: str, path: Path) -> Selected:
    """Select a network's tensors and remove the prefixes that wrappers have added.

    Args:
        sizes: Number of elements of each tensor by its name in the file.
        prefix: Prefix of the network's tensor names, which is removed; empty if there is none.
        path: Path of the file, for error messages.

    Raises:
        UserError: If no name has the prefix, or the tensors are parts of FSDP's flat parameters.
    """
    flat = [name for name in sizes if _FLAT_PARAMETER.fullmatch(name)]
    if flat:
        raise UserError(
            f"{path} contains flat FSDP parameters ({first_of(flat, 2)}). The network's tensors "
            "can't be restored from them without the network's code. Save the model again with "
            "StateDictType.FULL_STATE_DICT, or with "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict and "
            "full_state_dict=True."
        )
    selected = Selected(_without_inserted(sizes))
    _drop_copies(selected)
    _drop_counters(selected, sizes)
    if prefix:
        _keep_prefix(selected, prefix, path)
    selected.kept = _stripped(selected.kept)
    return selected


def _without_inserted(names: Iterable[str]) -> dict[str, str]:
    """Remove components such as ``_orig_mod`` that wrappers have inserted into tensor names.

    The result maps the shortened names to the original names. If two shortened names would be
    equal, no name is shortened.
    """
    names = list(names)
    kept = {_INSERTED.sub("", name): name for name in names}
    return kept if len(kept) == len(names) else {name: name for name in names}


def _drop_copies(selected: Selected) -> None:
    """Drop the copies of the weights that mmcv's EMAHook stores in buffers of the model.

    Their names are derived from those of the weights. For example, ``ema_conv1_weight`` is a copy
    of ``conv1.weight``.
    """
    copies = {f"ema_{name.replace('.', '_')}" for name in selected.kept if "." in name}
    for name in copies & selected.kept.keys():
        selected.dropped[selected.kept.pop(name)] = MMCV_COPY


def _drop_counters(selected: Selected, sizes: Mapping[str, int]) -> None:
    """Drop the counters of averaged models, which are not part of the network.

    ``n_averaged`` is dropped if there are other tensors with the same prefix, apart from counters.
    Any other counter is dropped only if all these tensors belong to a wrapped model. For example,
    ``ema.step`` is dropped if their names all start with ``ema.ema_model.``.
    """
    found: dict[str, list[str]] = {}
    for name, own in selected.kept.items():
        parent, _, leaf = name.rpartition(".")
        if leaf in _COUNTERS and sizes[own] == 1 and parent.count(".") < _MAX_DEPTH:
            found.setdefault(parent, []).append(name)
    siblings: dict[str, set[str]] = {parent: set() for parent in found}
    counters = {name for names in found.values() for name in names}
    for name in selected.kept.keys() - counters:
        parts = name.split(".", _MAX_DEPTH + 1)
        for depth, part in enumerate(parts):
            parent = ".".join(parts[:depth])
            if parent in siblings:
                siblings[parent].add(part)
    for parent, names in found.items():
        wrapped = siblings[parent] <= _AVERAGED_WRAPPERS
        for name in names if siblings[parent] else ():
            if wrapped or name.endswith("n_averaged"):
                selected.dropped[selected.kept.pop(name)] = (
                    "counter that is not part of the network"
                )


def has_prefix(names: Iterable[str], prefix: str) -> bool:
    """Return whether any tensor name has a prefix, ignoring prefixes that wrappers have added."""
    kept = _without_inserted(names)
    start = prefix.removesuffix(".") + "."
    return any(n.startswith(start) for state in (kept, _stripped(kept)) for n in state)


def outside_prefix(prefix: str) -> str:
    """Return the reason for omitting a tensor whose name does not have the specified prefix."""
    return f"outside the prefix {prefix.removesuffix('.')}."


def _keep_prefix(selected: Selected, prefix: str, path: Path) -> None:
    start = prefix.removesuffix(".") + "."
    if not any(name.startswith(start) for name in selected.kept):
        selected.kept = _stripped(selected.kept)
    kept = {n.removeprefix(start): own for n, own in selected.kept.items() if n.startswith(start)}
    if not kept:
        known = dict.fromkeys(name.partition(".")[0] for name in selected.kept)
        raise UserError(
            f"{path} contains no tensors with the prefix {shown(prefix)!r}. Its tensor names begin "
            f"with {first_of(map(shown, known), 8)}. Check prefix= (MODEL.WEIGHTS_PREFIX)."
        )
    for name, own in selected.kept.items():
        if not name.startswith(start):
            selected.dropped[own] = outside_prefix(prefix)
    selected.kept = kept


def _stripped(kept: dict[str, str]) -> dict[str, str]:
    while prefix := next(
        (p for p in PREFIXES if kept and all(n.startswith(p) for n in kept)), None
    ):
        kept = {name.removeprefix(prefix): own for name, own in kept.items()}
    return kept
