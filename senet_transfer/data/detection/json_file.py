"""Loads an annotation file, and says what else it is when it is not JSON."""

import json
import os
import stat

from senet_transfer.errors import UserError

# Enough of a file's ends to tell JSON from what servers and tools leave in its place.
_SNIFFED_BYTES = 512


def read_json_object(path: str) -> dict:
    """Loads a JSON file that must hold an object.

    Raises:
        UserError: if the file is missing, unreadable, cut off, or something else than that.
    """
    problem = sniff_json(path)
    if problem:
        raise UserError(problem)
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
    except json.JSONDecodeError as error:
        # `from None`: the exception holds the whole document, which may be hundreds of megabytes.
        cut = error.pos >= len(error.doc.rstrip()) or not error.doc.rstrip().endswith("}")
        how = "ends before the JSON does (cut off)" if cut else f"is not JSON ({error.msg})"
        raise UserError(
            f"{path} {how}, at line {error.lineno}, column {error.colno}; expected annotations in "
            "COCO's format. Download or export the file again."
        ) from None
    # ValueError: a number of thousands of digits.
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(
            f"{path} cannot be read as JSON: {error}; expected annotations in COCO's format, "
            "encoded as UTF-8. Download or export the file again."
        ) from None
    if not isinstance(data, dict):
        raise UserError(_not_an_object(path, f"a {type(data).__name__}"))
    return data


def sniff_json(path: str) -> str | None:
    """Tells from a file's first and last bytes why it cannot hold a JSON object.

    Costs two small reads whatever the size of the file, so that it can be asked of every file
    before a run begins.

    Returns:
        The whole message for the user, or None if nothing speaks against the file.
    """
    try:
        if stat.S_ISDIR(os.stat(path).st_mode):
            return f"{path} is a folder; expected the annotation file, in COCO's JSON format."
        with open(path, "rb") as file:
            head = file.read(_SNIFFED_BYTES)
            file.seek(max(0, os.fstat(file.fileno()).st_size - _SNIFFED_BYTES))
            tail = file.read(_SNIFFED_BYTES)
    except FileNotFoundError:
        return f"Annotation file not found: {path}. Check the path; `~` and $VARS are expanded."
    except OSError as error:
        return f"Annotation file {path} cannot be read: {error.strerror or error}."
    found = _describe_head(head.lstrip())
    if found is not None:
        return _not_an_object(path, found)
    if not tail.rstrip().endswith(b"}"):
        return (
            f"{path} is cut off: it begins as a JSON object and ends with {tail[-20:]!r}; expected "
            "a closing brace. Download or export the file again."
        )
    return None


def _describe_head(head: bytes) -> str | None:
    """Names what begins with `head`, or returns None if that can be a JSON object."""
    if not head:
        return "an empty file"
    known = {
        b"{": None,
        b"[": "a list (COCO's *results* format, that of predictions, is one)",
        b"<": "HTML or XML (a download that was answered with a web page?)",
        b"version https://git-lfs": "a Git LFS pointer; `git lfs pull` fetches the file itself",
        b"PK": "a zip archive, which must be unpacked first",
        b"\x1f\x8b": "a gzip archive, which must be unpacked first",
        b"\xef\xbb\xbf": "UTF-8 with a byte order mark, which the COCO tools cannot read",
        b"\xff\xfe": "UTF-16 text; it must be UTF-8",
        b"\xfe\xff": "UTF-16 text; it must be UTF-8",
    }
    for start, found in known.items():
        if head.startswith(start):
            return found
    return f"something that begins with {head[:20]!r}"


def _not_an_object(path: str, found: str) -> str:
    return (
        f"{path} holds {found}; expected a JSON object with `images`, `annotations` and "
        "`categories`, which is COCO's instances format. Give the annotation file itself, or "
        "download or export it again."
    )
