"""Detection of a weight file's format, and error messages for files of other kinds."""

import html
import re
from pathlib import Path

from senet_transfer.errors import UserError
from senet_transfer.utils.text import shown

ZIP, TAR, PICKLE, SAFETENSORS, CAFFE = "zip", "tar", "pickle", "safetensors", "caffe"

_HEAD = 4096
_MAX_SAFETENSORS_HEADER = 100 * 2**20
_SUFFIXES = (".pth", ".pt", ".tar", ".safetensors", ".pkl", ".caffemodel")
# First bytes of pickles of protocol 0 and 1, which have no magic number: a container or a class.
_OLD_PICKLE = re.compile(rb"[(}\]][dlqp(.]|c[A-Za-z_][\w.]*\n[\w.]+\n")
_OTHER_FORMATS = (
    (b"\x1f\x8b", "compressed (gzip)", "Unpack it first, with gunzip or tar -xzf"),
    (b"BZh", "compressed (bzip2)", "Unpack it first, with bunzip2 or tar -xjf"),
    (b"\xfd7zXZ", "compressed (xz)", "Unpack it first, with unxz or tar -xJf"),
    (b"7z\xbc\xaf", "a 7-zip archive", "Unpack it first"),
    (b"Rar!", "a RAR archive", "Unpack it first"),
    (b"\x89HDF", "an HDF5 file (Keras, or Caffe's .h5)", "Get the .pth or .caffemodel"),
    (b"\x93NUMPY", "a single numpy array", "Get the file with all weights"),
    (b"\x89PNG", "a PNG image", "Check the path"),
    (b"\xff\xd8\xff", "a JPEG image", "Check the path"),
    (b"%PDF", "a PDF document", "Check the path"),
)


def sniff(path: Path) -> str:
    """Return the format of a file: ZIP, TAR, PICKLE, SAFETENSORS or CAFFE.

    CAFFE has no magic number and is returned for a binary file of no other known format.

    Raises:
        UserError: The file is missing, empty, or not a weight file.
    """
    head = _head(path)
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
            raise UserError(f"{path}: {what}, not a weight file. {advice}.")
    if _OLD_PICKLE.match(head):
        return PICKLE
    _reject_text(path, head)
    return CAFFE


def _head(path: Path) -> bytes:
    try:
        if path.is_dir():
            inside = sorted(f.name for f in path.iterdir() if f.suffix in _SUFFIXES)[:4]
            advice = f"Name one of the files in it: {', '.join(inside)}" if inside else "Check it"
            raise UserError(f"{path}: a folder, expected a weight file. {advice}.")
        if not path.exists():
            raise UserError(f"{path}: no such file. Check the path (relative to {Path.cwd()}).")
        if not path.is_file():
            raise UserError(f"{path}: not an ordinary file. Name a weight file.")
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read: {error}. Check the path.") from error
    if not head:
        raise UserError(f"{path}: empty (0 bytes), as a failed download leaves it. Get it again.")
    return head


def _reject_text(path: Path, head: bytes) -> None:
    text = head.decode("utf-8", errors="replace").strip("\ufeff \t\r\n\0")
    lower = text.lower()
    if lower.startswith(("<!doctype", "<html", "<head", "<?xml")) or "<html" in lower:
        title = re.search(r"<title[^>]*>(.*?)</title>", text, re.IGNORECASE | re.DOTALL)
        words = title.group(1) if title else re.sub(r"<[^>]*>", " ", text)
        raise UserError(
            f'{path}: a web page ("{shown(html.unescape(words))}"), so the download failed. Open '
            "its address in a browser, download the file itself, and check its size."
        )
    if lower.startswith("version https://git-lfs"):
        raise UserError(
            f"{path}: a git-lfs pointer, not the file itself. Run `git lfs pull` in its repository."
        )
    # A character cut at the end of the head does not make the file binary.
    printable = sum(c.isprintable() or c in "\t\r\n" for c in text) - text[:-3].count("\ufffd")
    if not text or printable < 0.98 * len(text):
        return
    if re.search(r"^\s*layers?\s*:?\s*\{", text, re.MULTILINE):
        raise UserError(
            f"{path}: a Caffe network definition (text), without weights. Name its .caffemodel."
        )
    raise UserError(
        f'{path}: a text file that begins "{shown(text)}", not weights. If it was downloaded, the '
        "download failed: get it again."
    )
