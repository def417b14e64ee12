"""SHA-256 hashes of files and tensors: computation and verification."""

import hashlib
import re
from pathlib import Path

import torch

from senet_transfer.errors import UserError
from senet_transfer.utils.read_once import once_per_file


@once_per_file
def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 hash of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_sha256(tensors: dict[str, torch.Tensor]) -> str:
    """Return a SHA-256 hash of the names, dtypes, shapes and values of tensors.

    The hash depends neither on the order of the tensors nor on the format they were stored in.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        # `contiguous` keeps unusual strides of tensors with at most one element; a clone does not.
        tensor = tensors[name].detach().cpu().clone(memory_format=torch.contiguous_format)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def verify_sha256(path: Path, expected: str | None) -> list[str]:
    """Verify a file against the expected SHA-256 hash and against its ``.sha256`` file.

    Args:
        path: the path of the file. If a file with ``.sha256`` added to this name exists next to it,
            the hash in it must match too.
        expected: the hash in hexadecimal, or at least its first 8 digits; None to skip it.

    Returns:
        ``["sha256"]`` if a hash was verified, otherwise an empty list.

    Raises:
        UserError: if a hash does not match or is malformed.
    """
    stated = []
    if expected is not None:
        if not re.fullmatch("[0-9a-fA-F]{8,64}", expected):
            raise UserError(
                f"sha256={expected!r}: expected 8 to 64 hexadecimal digits, the SHA-256 of "
                f"{path} or its first digits."
            )
        stated.append((expected.lower(), "was requested"))
    listing = path.with_name(path.name + ".sha256")
    if listing.is_file():
        stated.append((_hash_in(listing, path.name), f"is in {listing.name} next to it"))
    if not stated:
        return []
    found = file_sha256(path)
    for digest, where in stated:
        if not found.startswith(digest):
            raise UserError(
                f"{path}: its SHA-256 is {found}, but {digest} {where}. The file is damaged or "
                "not the expected one. Download it again, or check the hash."
            )
    return ["sha256"]


def _hash_in(listing: Path, name: str) -> str:
    """Return the hash of the file ``name`` from a file in the format of ``sha256sum``.

    A line that holds only a hash applies to every name.
    """
    lines = [line.split() for line in listing.read_text(errors="replace").splitlines()[:1000]]
    lines = [words for words in lines if words and re.fullmatch("[0-9a-fA-F]{64}", words[0])]
    for words in lines:
        if len(words) == 1 or words[-1].lstrip("*").rpartition("/")[2] == name:
            return words[0].lower()
    raise UserError(
        f"{listing} has no SHA-256 of {name}. Expected a line in the format of sha256sum; correct "
        "or remove the file."
    )
