"""Published weights by name, such as ``cadene/se_resnet50``, downloaded when they are needed."""

import difflib
import fnmatch
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from senet_transfer.errors import UserError
from senet_transfer.weights.hub.download import check_sha256, fetch
from senet_transfer.weights.hub.entries import SHELVES, Shelf

# Networks whose publishers spell their names otherwise.
_RENAMED = {"bninception": "bn_inception", "inceptionresnetv2": "inception_resnet_v2"}

_HASH = re.compile(r"-([0-9a-f]{8,64})\.")


@dataclass(frozen=True)
class Entry:
    """A published file of weights.

    Attributes:
        name: what users type.
        url: its address; the page that leads to it where it has to be fetched by hand.
        file: its name in the cache.
        sha256: the beginning of its SHA-256, as its publisher states it; None where none is
            stated, so that the file can't be verified.
        family: of weights, one of ``FAMILIES``.
        model: the name of its network here.
        licence: as its publisher states it, or empty: look there.
        note: what else there is to know, or empty.
        by_hand: whether it can't be downloaded by a program.
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

    @property
    def verified(self) -> bool:
        """Whether there is a hash to verify the file by."""
        return self.sha256 is not None

    @property
    def path(self) -> Path:
        """Where the file is, or will be: in torch.hub's cache, which most projects share."""
        return Path(torch.hub.get_dir()) / "checkpoints" / self.file


def _entry(shelf: Shelf, name: str, path: str) -> Entry:
    file = shelf.cached_as + path.rpartition("/")[2]
    stated = _HASH.search(file)
    return Entry(
        name=f"{shelf.title or shelf.family}/{name}",
        url=shelf.place if shelf.family == "caffe" else f"{shelf.place}/{path}",
        file=file,
        sha256=stated[1] if stated else None,
        family=shelf.family,
        model=_model(name),
        licence=shelf.licence,
        note=shelf.note,
        by_hand=shelf.by_hand,
    )


def _model(name: str) -> str:
    """This project's name of a network, from its publisher's."""
    name = name.partition(".")[0]
    return _RENAMED.get(name) or name.replace("R-", "resnet").replace("seres", "se_res")


CATALOGUE: dict[str, Entry] = {
    entry.name: entry
    for shelf in SHELVES
    for entry in (_entry(shelf, name, path) for name, path in shelf.files.items())
}


def list_catalogue(pattern: str = "*") -> list[str]:
    """The names of all published weights that match a shell-style pattern, such as "cadene/*"."""
    return sorted(fnmatch.filter(CATALOGUE, pattern))


def catalogue_entry(name: str) -> Entry:
    """The published weights of this name.

    Raises:
        UserError: there are none; the message names the nearest.
    """
    if name not in CATALOGUE:
        near = nearest_names(name)
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        raise UserError(
            f"There is no file {name}, and no published weights of this name are known here. "
            f"{hint}senet_transfer.list_catalogue() names all of them."
        )
    return CATALOGUE[name]


def nearest_names(name: str) -> list[str]:
    """The names of published weights that are most like this one; empty where none is."""
    begun = [known for known in CATALOGUE if known.startswith(name)]
    return begun[:4] or difflib.get_close_matches(name, CATALOGUE, n=4, cutoff=0.75)


def names_published(weights: str | Path) -> bool:
    """Whether this is meant as a name in the catalogue, be it one or not.

    A file of that name comes first, and a name is known by its publisher's part.
    """
    if isinstance(weights, Path) or os.path.exists(weights):
        return False
    publisher, slash, _ = weights.partition("/")
    return bool(slash) and any(name.startswith(f"{publisher}/") for name in CATALOGUE)


def resolve(name: str) -> Path:
    """The file of published weights, downloaded into torch.hub's cache unless it is there.

    Raises:
        UserError: an unknown name; weights that have to be fetched by hand, or can't be
            downloaded; a file of another hash. The message gives the address and the place.
    """
    entry = catalogue_entry(name)
    path = entry.path
    hint = f" Note: {entry.note}." if entry.note else ""
    if not path.is_file():
        if entry.by_hand:
            raise UserError(
                f"{name} has to be fetched by hand, from {entry.url} ({entry.note}). Put the file "
                f"at {path}, where this name finds it, or give its path."
            )
        return fetch(entry.url, path, entry.sha256, hint=hint)
    stat = path.stat()
    _check_once(path, stat.st_size, stat.st_mtime_ns, entry.sha256)
    return path


@lru_cache(maxsize=64)
def _check_once(path: Path, size: int, modified: int, sha256: str | None) -> None:
    """Verifies a file once in a process, as long as it does not change."""
    check_sha256(path, sha256)


def locate_weights(weights: str | Path, family: str | None = None) -> tuple[str | Path, str | None]:
    """Return a weight file and its family, given a path or a name in the catalogue.

    Args:
        weights: a path, which is returned unchanged, whether it exists or not; or a name.
        family: the family given by the user, which takes precedence; None: the catalogue's.

    Raises:
        UserError: the same errors as :func:`resolve`; or ``weights`` is neither a path nor a name.
    """
    if not isinstance(weights, str | Path):
        raise UserError(f"The weights are {weights!r}, expected a path, or a published name.")
    if not names_published(weights):
        return weights, family
    name = str(weights)
    return resolve(name), family or catalogue_entry(name).family
