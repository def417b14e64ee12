"""Functions for loading JSON annotation files, with descriptive errors for invalid files."""

import codecs
import json
import os
import stat

from senet_transfer.errors import UserError

# Number of bytes read at each end of a file to distinguish JSON from common mistakes.
_SNIFFED_BYTES = 512


def read_json_object(path: str) -> dict:
    """Load a JSON object from a file.

    Raises:
        UserError: If the file is missing, unreadable or truncated, or does not contain a JSON
            object.
    """
    problem = sniff_json(path)
    if problem:
        raise UserError(problem)
    try:
        # This encoding skips the byte order mark that some Windows programs write.
        with open(path, encoding="utf-8-sig") as file:
            data = json.load(file)
    except json.JSONDecodeError as error:
        # `from None` is used because the exception holds the document, which may be hundreds of
        # megabytes in size.
        cut = error.pos >= len(error.doc.rstrip()) or not error.doc.rstrip().endswith("}")
        how = "is truncated" if cut else f"is not valid JSON ({error.msg})"
        raise UserError(
            f"{path} {how} at line {error.lineno}, column {error.colno}; expected annotations in "
            "COCO format. Download or export the file again."
        ) from None
    # `json` raises ValueError for numbers with thousands of digits.
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(
            f"Cannot read {path} as JSON: {error}. Expected annotations in COCO format, encoded "
            "as UTF-8. Download or export the file again."
        ) from None
    if not isinstance(data, dict):
        raise UserError(_not_an_object(path, f"a {type(data).__name__}"))
    return data


def sniff_json(path: str) -> str | None:
    """Check from its first and last bytes that a file contains a JSON object.

    The file is not parsed, so that even large files can be checked quickly before a run starts.

    Returns:
        An error message, or None if no problem was found.
    """
    try:
        if stat.S_ISDIR(os.stat(path).st_mode):
            return (
                f"{path} is a folder; expected an annotation file in COCO format, or a folder with "
                "Pascal VOC, YOLO, LabelMe, CVAT, Label Studio or VIA annotations. Pass the path "
                "of the file."
            )
        with open(path, "rb") as file:
            head = file.read(_SNIFFED_BYTES)
            file.seek(max(0, os.fstat(file.fileno()).st_size - _SNIFFED_BYTES))
            tail = file.read(_SNIFFED_BYTES)
    except FileNotFoundError:
        return f"Annotation file not found: {path}. Check the path; `~` and $VARS are expanded."
    except OSError as error:
        return f"Cannot read annotation file {path}: {error.strerror or error}. Check the file."
    found = _describe_head(head.removeprefix(codecs.BOM_UTF8).lstrip())
    if found is not None:
        return _not_an_object(path, found)
    if not tail.rstrip().endswith(b"}"):
        return (
            f"{path} is truncated: it begins like a JSON object, but ends with {tail[-20:]!r}; "
            "expected a closing brace. Download or export the file again."
        )
    return None


def _describe_head(head: bytes) -> str | None:
    """Describe a file's content from its first bytes; return None if it may be a JSON object."""
    if not head:
        return "an empty file"
    known = {
        b"{": None,
        b"[": "a list (as in COCO's *results* format, which is for predictions)",
        b"<": "HTML or XML (did the download return a web page?)",
        b"version https://git-lfs": "a Git LFS pointer (`git lfs pull` downloads the actual file)",
        b"PK": "a zip archive, which must be unpacked first",
        b"\x1f\x8b": "a gzip archive, which must be unpacked first",
        b"\xff\xfe": "UTF-16 text instead of UTF-8",
        b"\xfe\xff": "UTF-16 text instead of UTF-8",
    }
    for start, found in known.items():
        if head.startswith(start):
            return found
    return f"data that begins with {head[:20]!r}"


def _not_an_object(path: str, found: str) -> str:
    return (
        f"{path} contains {found}; expected a JSON object with `images`, `annotations` and "
        "`categories` (COCO instances format). Pass the annotation file, or download or export it "
        "again."
    )
