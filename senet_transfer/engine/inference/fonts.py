"""Selection of installed fonts for the characters in class names."""

import functools
import logging
import unicodedata
from collections.abc import Sequence

from matplotlib.font_manager import FontEntry, fontManager, get_font

logger = logging.getLogger(__name__)

# DejaVu Sans is part of matplotlib and covers Latin, Greek, Cyrillic and more.
_DEFAULT = "DejaVu Sans"
# matplotlib's font that draws a placeholder box for every character.
_PLACEHOLDERS = "Last Resort"
_LONGEST = 40


def drawable_names(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Replace class names that can't be drawn, and find font families for all characters.

    A name with characters that no installed font contains is replaced by "class N", where N is its
    index from 0, and a warning is logged.

    Args:
        names: The class names.

    Returns:
        The names to draw, and the font families in the order of preference for matplotlib.
    """
    families, missing = _families("".join(names))
    drawn = [
        f"class {index}" if missing & set(name) else _one_line(name)
        for index, name in enumerate(names)
    ]
    replaced = [index for index, name in enumerate(names) if missing & set(name)]
    if replaced:
        listed = ", ".join(f"class {index} ({names[index]})" for index in replaced[:10])
        logger.warning(
            "No installed font contains the characters %s, so drawings show the class index for: "
            "%s%s. Install a font with these characters, such as Noto Sans CJK for "
            "Chinese, Japanese and Korean. JSON files contain the names unchanged.",
            "".join(sorted(missing)[:10]),
            listed,
            ", ..." if len(replaced) > 10 else "",
        )
    return drawn, families


def _one_line(name: str) -> str:
    printable = "".join(" " if unicodedata.category(c).startswith("C") else c for c in name)
    return printable if len(printable) <= _LONGEST else f"{printable[: _LONGEST - 1]}…"


@functools.lru_cache(maxsize=16)
def _families(text: str) -> tuple[list[str], set[str]]:
    """Return font families for the characters of a text, and the characters without a font."""
    missing = {c for c in text if unicodedata.category(c)[0] not in "CZ"}
    families, entries = [_DEFAULT], fontManager.ttflist
    first = next((entry for entry in entries if entry.name == _DEFAULT), None)
    if first is not None:
        missing -= _covered(first, missing)
    # Regular faces first: of two families with the same characters, the first is used.
    others = sorted(entries, key=lambda entry: (entry.style != "normal", str(entry.weight)))
    while missing:
        best = max(others, key=lambda entry: len(_covered(entry, missing)), default=None)
        if best is None or not (found := _covered(best, missing)):
            break
        families.append(best.name)
        missing -= found
    return families, missing


def _covered(entry: FontEntry, characters: set[str]) -> set[str]:
    """Return the characters that a font has glyphs for."""
    if entry.name.startswith(_PLACEHOLDERS):
        return set()
    try:
        font = get_font(entry.fname)
    except (OSError, RuntimeError):  # a font without outlines, such as a bitmap font for emoji
        return set()
    return {c for c in characters if font.get_char_index(ord(c))}


def clear_cache() -> None:
    """Clear the cache of font families, so that newly installed fonts are found."""
    _families.cache_clear()
