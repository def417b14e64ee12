"""Computation and verification of SHA-256 hashes of files and tensors."""

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
    """Return the SHA-256 hash of the tensors' names, dtypes, shapes and values.

    The hash is independent of the order of the tensors and of the format in which they were stored.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        # Clone instead of calling `contiguous`, which keeps unusual strides if a tensor has at most
        # one element.
        tensor = tensors[name].detach().cpu().clone(memory_format=torch.contiguous_format)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def verify_sha256(path: Path, expected: str | None) -> list[str]:
    """Verify a file against the expected SHA-256 hash and against its ``.sha256`` file.

    Args:
        path: Path of the file. If a file with this name plus ``.sha256`` exists in the same folder,
            the hash in it must match too.
        expected: Expected hash in hexadecimal, or at least its first 8 digits; None skips this
            check.

    Returns:
        The names of the checks that passed: ``["sha256"]``, or an empty list if no hash is known.

    Raises:
        UserError: If a hash does not match or is malformed.
    """
    stated = []
    if expected is not None:
        if not re.fullmatch("[0-9a-fA-F]{8,64}", expected):
            raise UserError(
                f"sha256 is {expected!r}; expected 8 to 64 hexadecimal digits: the SHA-256 "
                f"hash of {path}, or its first digits."
            )
        stated.append((expected.lower(), "was requested"))
    listing = path.with_name(path.name + ".sha256")
    if listing.is_file():
        stated.append((_hash_in(listing, path.name), f"is listed in {listing.name}"))
    if not stated:
        return []
    found = file_sha256(path)
    for digest, where in stated:
        if not found.startswith(digest):
            raise UserError(
                f"{path} has the SHA-256 {found}, but {digest} {where}. The file is damaged or is "
                "not the expected one. Download it again, or check the expected hash."
            )
    return ["sha256"]


def _hash_in(listing: Path, name: str) -> str:
    """Return the hash of the file ``name`` from a listing in ``sha256sum`` format.

    A line that contains only a hash applies to any file name.
    """
    lines = [line.split() for line in listing.read_text(errors="replace").splitlines()[:1000]]
    lines = [words for words in lines if words and re.fullmatch("[0-9a-fA-F]{64}", words[0])]
    for words in lines:
        if len(words) == 1 or words[-1].lstrip("*").rpartition("/")[2] == name:
            return words[0].lower()
    raise UserError(
        f"{listing} contains no SHA-256 hash for {name}; expected a line in sha256sum format. "
        "Correct or remove the file."
    )
