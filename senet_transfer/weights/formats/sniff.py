"""Detection of a weight file's format, with specific errors for files that are not weight files."""

import html
import re
from pathlib import Path

from senet_transfer.errors import UserError
from senet_transfer.utils.text import shown
from senet_transfer.weights.formats import folders

ZIP, TAR, PICKLE, SAFETENSORS, CAFFE = "zip", "tar", "pickle", "safetensors", "caffe"
INDEX = "index"  # a JSON file that lists the files of a sharded model

_HEAD = 4096
_MAX_SAFETENSORS_HEADER = 100 * 2**20
# First bytes of protocol 0 and 1 pickles that contain a container or a class. These protocols have
# no magic number.
_OLD_PICKLE = re.compile(rb"[(}\]][dlqp(.]|c[A-Za-z_][\w.]*\n[\w.]+\n")
_OTHER_FORMATS = (
    (b"\x1f\x8b", "a gzip archive", "Unpack it first, with gunzip or tar -xzf"),
    (b"BZh", "a bzip2 archive", "Unpack it first, with bunzip2 or tar -xjf"),
    (b"\xfd7zXZ", "an xz archive", "Unpack it first, with unxz or tar -xJf"),
    (b"7z\xbc\xaf", "a 7-zip archive", "Unpack it first"),
    (b"Rar!", "a RAR archive", "Unpack it first"),
    (b"\x89HDF", "an HDF5 file (Keras, or Caffe's .h5)", "Use the .pth or .caffemodel file"),
    (b"\x93NUMPY", "a single numpy array", "Use the file with all weights"),
    (b"\x89PNG", "a PNG image", "Check the path"),
    (b"\xff\xd8\xff", "a JPEG image", "Check the path"),
    (b"%PDF", "a PDF document", "Check the path"),
)


def sniff(path: Path) -> str:
    """Detect the format of a file: ZIP, TAR, PICKLE, SAFETENSORS, INDEX or CAFFE.

    Caffe files have no magic number, so CAFFE is returned for every binary file that has no other
    known format.

    Raises:
        UserError: If the file is missing, empty, or not a weight file.
    """
    head = _head(path)
    if path.suffix == ".distcp" or path.name == ".metadata":
        raise UserError(
            f"{path} is part of a distributed checkpoint. {folders.describe(path.parent)}"
        )
    if head.startswith(b"PK\x03\x04"):
        return ZIP
    if head[257:262] == b"ustar":
        return TAR
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        return PICKLE
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _MAX_SAFETENSORS_HEADER:
        return SAFETENSORS
    for mark, what, advice in _OTHER_FORMATS:
        if head.startswith(mark):
            raise UserError(f"{path} is {what}, not a weight file. {advice}.")
    if _OLD_PICKLE.match(head):
        return PICKLE
    if head.lstrip()[:1] == b"{" and (path.name.endswith(".index.json") or b'"weight_map"' in head):
        return INDEX
    _reject_text(path, head)
    return CAFFE


def _head(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise UserError(folders.describe(path))
        if not path.exists():
            raise UserError(
                f"{path} does not exist. Check the path; relative paths are resolved from "
                f"{Path.cwd()}."
            )
        if not path.is_file():
            raise UserError(f"{path} is not a regular file. Use the path of a weight file.")
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read {path}: {error}. Check the path.") from error
    if not head:
        raise UserError(
            f"{path} is empty (0 bytes), probably after a failed download. Download it again."
        )
    return head


def _reject_text(path: Path, head: bytes) -> None:
    text = head.decode("utf-8", errors="replace").strip("\ufeff \t\r\n\0")
    lower = text.lower()
    if lower.startswith(("<!doctype", "<html", "<head", "<?xml")) or "<html" in lower:
        title = re.search(r"<title[^>]*>(.*?)</title>", text, re.IGNORECASE | re.DOTALL)
        words = title.group(1) if title else re.sub(r"<[^>]*>", " ", text)
        raise UserError(
            f'{path} is a web page ("{shown(html.unescape(words))}"), so the download failed. Open '
            "its URL in a browser, download the file itself, and check its size."
        )
    if lower.startswith("version https://git-lfs"):
        raise UserError(
            f"{path} is a Git LFS pointer, not the file itself. Run `git lfs pull` in its "
            "repository."
        )
    # A character cut off at the end of ``head`` does not mean that the file is binary.
    printable = sum(c.isprintable() or c in "\t\r\n" for c in text) - text[:-3].count("\ufffd")
    if not text or printable < 0.98 * len(text):
        return
    if re.search(r"^\s*layers?\s*:?\s*\{", text, re.MULTILINE):
        raise UserError(
            f"{path} is a Caffe network definition (text) without weights. Use the .caffemodel "
            "file."
        )
    raise UserError(
        f'{path} is a text file that begins with "{shown(text)}", not a weight file. If it was '
        "downloaded, the download failed. Download it again."
    )
