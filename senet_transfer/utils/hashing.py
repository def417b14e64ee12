"""SHA-256 of files and of tensors, computed and verified."""

import hashlib
import re
from pathlib import Path

import torch

from senet_transfer.errors import UserError
from senet_transfer.utils.read_once import once_per_file


@once_per_file
def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_sha256(tensors: dict[str, torch.Tensor]) -> str:
    """A SHA-256 of names, types, shapes and values, whatever the order and the file format."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        # A copy: `contiguous` leaves odd strides on tensors of one element or none.
        tensor = tensors[name].detach().cpu().clone(memory_format=torch.contiguous_format)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def verify_sha256(path: Path, expected: str | None) -> list[str]:
    """Compares a file's SHA-256 with all that are stated, and says whether there was one.

    Args:
        path: the file.
        expected: as of :func:`read_tensors`; beside it, what a ``NAME.sha256`` says holds.

    Raises:
        UserError: it has another one.
    """
    stated = []
    if expected is not None:
        if not re.fullmatch("[0-9a-fA-F]{8,64}", expected):
            raise UserError(
                f"sha256={expected!r}: expected are 8 to 64 hexadecimal digits, the SHA-256 of "
                f"{path} or its beginning."
            )
        stated.append((expected.lower(), "as it was asked for"))
    beside = path.with_name(path.name + ".sha256")
    if beside.is_file():
        stated.append((_hash_in(beside, path.name), f"in {beside.name} beside it"))
    if not stated:
        return []
    found = file_sha256(path)
    for digest, where in stated:
        if not found.startswith(digest):
            raise UserError(
                f"{path}: its SHA-256 is {found}, but {digest} {where}. The file is damaged or "
                "another one. Get it again, or check the hash."
            )
    return ["sha256"]


def _hash_in(beside: Path, name: str) -> str:
    """The hash of the file ``name`` in a list that ``sha256sum`` wrote, or the only one there."""
    lines = [line.split() for line in beside.read_text(errors="replace").splitlines()[:1000]]
    lines = [words for words in lines if words and re.fullmatch("[0-9a-fA-F]{64}", words[0])]
    for words in lines:
        if len(words) == 1 or words[-1].lstrip("*").rpartition("/")[2] == name:
            return words[0].lower()
    raise UserError(
        f"{beside}: no SHA-256 of {name} in it. Expected is a line as sha256sum writes it; correct "
        "or remove it."
    )
