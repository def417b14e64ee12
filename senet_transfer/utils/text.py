"""Formatting of text for messages."""

import os
import re
import statistics
from collections.abc import Iterable, Sequence

from senet_transfer.errors import UserError


def first_of(names: Iterable[str], limit: int = 20) -> str:
    """Join up to ``limit`` names with commas, and add the number of remaining names.

    Args:
        names: Names to list, in order.
        limit: Maximum number of names in the text.

    Returns:
        Text such as ``"a, b, and 3 more"``.
    """
    names = list(names)
    text = ", ".join(names[:limit])
    return f"{text}, and {len(names) - limit} more" if len(names) > limit else text


def shown(text: object, limit: int = 80) -> str:
    """Convert untrusted text to a short line of printable characters for a message."""
    words = "".join(c if c.isprintable() else " " for c in str(text)[: 4 * limit]).split()
    line = " ".join(words)
    return line if len(line) <= limit else line[: limit - 3] + "..."


def first_line(error: BaseException) -> str:
    """Return the first line of an error message without its full stop, to quote it in a sentence.

    If the message is empty, the name of the exception's class is returned.
    """
    lines = str(error).strip().splitlines()
    return lines[0].removesuffix(".") if lines else type(error).__name__


def counted(number: int, singular: str, plural: str = "") -> str:
    """Return a number with a noun, such as "1 image" or "1,200 images".

    Args:
        number: The number.
        singular: The noun in the singular.
        plural: The noun in the plural; by default, the singular with an s.
    """
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def check_utf8(path: str, use: str) -> None:
    """Raise a UserError if a path is not valid UTF-8.

    Args:
        path: The path to check.
        use: What requires UTF-8, for the message, such as "videos".
    """
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"The path {os.fsencode(path)!r} is not valid UTF-8, which is required for {use}. "
            "Rename the file or the folder."
        ) from None


def mean_text(values: Sequence[float]) -> str:
    """Format the mean and, for several values, their sample standard deviation.

    Both have two decimals, such as ``"7.30 ± 0.12"``.
    """
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def folder_name(text: str) -> str:
    """Convert text to a folder name that can't refer to a location outside the parent folder.

    Slashes, backslashes and control characters are replaced by underscores, as are the dots in the
    names ``.`` and ``..``.
    """
    name = re.sub(r"[/\\\x00-\x1f]", "_", text)
    return "_" * len(name) if set(name) <= {"."} else name


def differences(found: Sequence[str], expected: Sequence[str], limit: int = 3) -> str:
    """Describe the first differences between two ordered lists of names.

    Returns:
        Text such as ``"1: 'dog' instead of 'cat'; 'cat' is missing"``, or "" if there are none.
    """
    parts = [
        f"{index}: {one!r} instead of {other!r}"
        for index, (one, other) in enumerate(zip(found, expected, strict=False))
        if one != other
    ][:limit]
    for names, others, what in ((expected, found, "missing"), (found, expected, "unexpected")):
        known = set(others)
        if absent := [repr(name) for name in names if name not in known]:
            parts.append(f"{first_of(absent, limit)} {'are' if absent[1:] else 'is'} {what}")
    return "; ".join(parts)
