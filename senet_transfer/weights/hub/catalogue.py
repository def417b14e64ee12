"""Catalogue of published weights, such as ``cadene/se_resnet50``.

The weights are downloaded on first use, except for those in this package.
"""

import difflib
import fnmatch
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import torch
import yaml

from senet_transfer.errors import UserError
from senet_transfer.utils.hashing import file_sha256
from senet_transfer.utils.text import first_of
from senet_transfer.weights.hub.bundled import (
    PUBLISHER,
    bundled_files,
    is_bundled_name,
    stated_metadata,
)
from senet_transfer.weights.hub.download import check_sha256, fetch
from senet_transfer.weights.hub.repositories import hub_weights, is_hub_name
from senet_transfer.weights.hub.timm_networks import fetch_timm, timm_publishes

# Mapping from publishers' network names to this project's names, if they differ.
_RENAMED = {
    "bninception": "bn_inception",
    "inceptionresnetv2": "inception_resnet_v2",
    "wideresnet18": "places365_wideresnet18",
}

_HASH = re.compile(r"-([0-9a-f]{8,64})\.")


@dataclass(frozen=True)
class Entry:
    """Catalogue entry of a published weight file.

    Attributes:
        name: Catalogue name, such as "cadene/se_resnet50".
        url: URL of the file, or of a page with a link if the file must be downloaded by hand. Empty
            for a file in this package.
        file: File name in the cache or in ``folder``.
        sha256: First digits of the SHA-256 specified by the publisher. If there is none, the value
            is None and the file can't be verified.
        family: Weight family, one of ``FAMILIES``.
        model: This project's name for the network.
        licence: Licence specified by the publisher, or empty.
        note: Further information, or empty.
        by_hand: Whether the file must be downloaded by hand.
        view: Values of preprocessing fields (``resize``, ``crop`` or ``interpolation``) that the
            publisher specifies for this file and that differ from those of the weight family.
        folder: Folder of the file if it is included in this package; None for a file in the cache.
    """

    name: str
    url: str
    file: str
    sha256: str | None
    family: str
    model: str
    licence: str = ""
    note: str = ""
    by_hand: bool = False
    view: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    @property
    def verified(self) -> bool:
        """Return whether the catalogue contains a hash for verifying the file."""
        return self.sha256 is not None

    @property
    def path(self) -> Path:
        """Return the file's path in this package or in torch.hub's cache."""
        return (self.folder or Path(torch.hub.get_dir(), "checkpoints")) / self.file


@lru_cache(maxsize=1)
def load_catalogue() -> dict[str, Entry]:
    """Return the entries of all published weights as a dict by name. The result is cached."""
    text = (package_files(__package__) / "catalogue.yaml").read_text(encoding="utf-8")
    listed = (entry for group in yaml.safe_load(text) for entry in _entries(**group))
    return {entry.name: entry for entry in (*_bundled_entries(), *listed)}


def _bundled_entries() -> Iterator[Entry]:
    """Yield the catalogue entries of the weight files that are included in this package.

    The files are verified when they are used.
    """
    for name, (path, sha256) in bundled_files().items():
        stated = stated_metadata(path)
        yield Entry(
            name=f"{PUBLISHER}/{name}",
            url="",
            file=path.name,
            sha256=sha256,
            family="senet_transfer",
            model=stated.get("model") or "",
            licence=stated.get("licence", ""),
            note="in this package",
            folder=path.parent,
        )


def _entries(
    *,
    family: str,
    files: dict[str, str],
    address: str = "",
    page: str = "",
    publisher: str = "",
    licence: str = "",
    note: str = "",
    by_hand: bool = False,
    cache_prefix: str = "",
    view: dict[str, Any] | None = None,
) -> Iterator[Entry]:
    """Yield the catalogue entries of a group of files.

    The arguments are the keys of a group in ``catalogue.yaml``, which are explained in that file.
    """
    for name, path in files.items():
        file = cache_prefix + path.rpartition("/")[2]
        stated = _HASH.search(file)
        yield Entry(
            name=f"{publisher or family}/{name}",
            url=page or f"{address}/{path}",
            file=file,
            sha256=stated[1] if stated else None,
            family=family,
            model=own_model(name),
            licence=licence,
            note=note,
            by_hand=by_hand,
            view=view or {},
        )


def own_model(name: str) -> str:
    """Return this project's name for a published network, such as "resnet50" for "R-50"."""
    name = name.partition(".")[0]
    return _RENAMED.get(name) or name.replace("R-", "resnet").replace("seres", "se_res")


def list_catalogue(pattern: str = "*") -> list[str]:
    """Return the names of published weights that match a pattern, such as "cadene/*"."""
    return sorted(fnmatch.filter(load_catalogue(), pattern))


def catalogue_entry(name: str) -> Entry:
    """Return the catalogue entry called ``name``.

    Raises:
        UserError: If the name is unknown. The message suggests similar names.
    """
    catalogue = load_catalogue()
    if name not in catalogue:
        if is_bundled_name(name):
            known = first_of(list_catalogue(f"{PUBLISHER}/*")) or "none"
            raise UserError(
                f"{name} is neither an existing file nor the name of weights in this package. The "
                f"package contains: {known}."
            )
        near = nearest_names(name)
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        raise UserError(
            f"{name} is neither an existing file nor the name of published weights. {hint}Call "
            "senet_transfer.list_catalogue() for a list of all names."
        )
    return catalogue[name]


def nearest_names(name: str) -> list[str]:
    """Return up to four names of published weights that are similar to a name."""
    catalogue = load_catalogue()
    begun = [known for known in catalogue if known.startswith(name)]
    return begun[:4] or difflib.get_close_matches(name, catalogue, n=4, cutoff=0.75)


def names_published(weights: str | Path) -> bool:
    """Return whether a string has the form of a catalogue name, PUBLISHER/NAME.

    The publisher must be in the catalogue. If a file with this path exists, the result is False.
    """
    if isinstance(weights, Path) or os.path.exists(weights):
        return False
    if is_bundled_name(weights):
        return True
    publisher, slash, _ = weights.partition("/")
    return bool(slash) and any(name.startswith(f"{publisher}/") for name in load_catalogue())


def only_in_timm(name: str) -> bool:
    """Return whether a name refers to weights that timm provides but the catalogue does not.

    The result is also False for a network name without a tag if the catalogue contains weights for
    this network, because such a name is ambiguous.
    """
    known = any(other == name or other.startswith(f"{name}.") for other in load_catalogue())
    return names_published(name) and not known and timm_publishes(name)


def resolve(name: str) -> Path:
    """Return the path of published weights, after downloading them to torch.hub's cache if needed.

    If the catalogue contains a hash of the file, the hash is verified. Files included in this
    package are not downloaded.

    Raises:
        UserError: If the name is unknown, the file must be downloaded by hand, the download fails,
            or the cached file has a different hash. The message includes the URL and the path.
    """
    entry = catalogue_entry(name)
    path = entry.path
    hint = f" Note: {entry.note}." if entry.note else ""
    if not path.is_file():
        if entry.by_hand:
            raise UserError(
                f"{name} must be downloaded by hand from {entry.url} ({entry.note}). Save it as "
                f"{path}, or pass the path of the file."
            )
        return fetch(entry.url, path, entry.sha256, hint=hint)
    stat = path.stat()
    remedy = "Reinstall senet_transfer." if entry.folder else ""
    _check_once(path, stat.st_size, stat.st_mtime_ns, entry.sha256, remedy)
    return path


@lru_cache(maxsize=64)
def _check_once(path: Path, size: int, modified: int, sha256: str | None, remedy: str) -> None:
    """Verify a file once per process, or again if its size or modification time has changed."""
    check_sha256(path, sha256, remedy)


def published_entries(path: str | Path) -> list[Entry]:
    """Return the catalogue entries whose file name and hash match those of a file.

    Several publishers may list the same file. A file without a hash in the catalogue is recognised
    only at its path in the cache.
    """
    path = Path(path)
    named = [entry for entry in load_catalogue().values() if entry.file == path.name]
    if not named:
        return []
    found = file_sha256(path)
    return [e for e in named if (found.startswith(e.sha256) if e.sha256 else path == e.path)]


def locate_weights(weights: str | Path, family: str | None = None) -> tuple[str | Path, str | None]:
    """Return the path and the weight family for a path, catalogue name or Hub repository.

    If the name is "timm/NAME" and not in the catalogue, timm downloads its own pretrained weights.

    Args:
        weights: Path, catalogue name, or Hugging Face Hub repository such as "hf-hub:owner/name". A
            path is returned unchanged, even if it does not exist.
        family: Weight family; None for the family in the catalogue.

    Raises:
        UserError: If ``weights`` is neither a path nor a name, or the file can't be downloaded.
    """
    if not isinstance(weights, str | Path):
        raise UserError(f"weights is {weights!r}; expected a path or a catalogue name.")
    name = str(weights)
    if is_hub_name(weights):
        return hub_weights(name), family
    if not names_published(weights):
        return weights, family
    if only_in_timm(name):
        return fetch_timm(name), family or "timm"
    return resolve(name), family or catalogue_entry(name).family
