"""Search for images whose names are spelled differently in the annotation file than on disk.

Annotation tools may write backslashes (on Windows), percent-encoded names, or accented letters in a
different Unicode normalisation form (NFC or NFD) than the file system.
"""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from urllib.parse import unquote

_SHOWN = 3


def is_inside(name: str) -> bool:
    """Return True if a path is relative and does not contain `..` as a folder name."""
    slashed = name.replace("\\", "/")
    return not slashed.startswith("/") and ".." not in slashed.split("/")


def find_missing(names: Sequence[str], image_dir: str) -> list[str]:
    """Return the names of images that do not exist in the image folder.

    Each folder is listed once, which is much faster on network storage than checking each file.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[os.path.dirname(name)].append(name)
    missing = []
    for folder, members in groups.items():
        try:
            there = set(os.listdir(os.path.join(image_dir, folder)))
        except OSError:
            there = set()
        # Check the remaining names individually, because the file system may ignore case or not
        # allow listing.
        missing += [
            name
            for name in members
            if os.path.basename(name) not in there
            and not os.path.exists(os.path.join(image_dir, name))
        ]
    return missing


def find_renamed(missing: Sequence[str], image_dir: str) -> dict[str, str]:
    """Find existing files for missing image names, such as `a/b.jpg` for `a\\b.jpg`.

    Only different spellings of the same name are resolved: backslashes, percent encoding and
    Unicode normalisation forms.

    Returns:
        Names of the existing files, keyed by missing name.
    """
    found = {}
    for name in missing:
        for spelling in _spellings(name):
            if is_inside(spelling) and os.path.isfile(os.path.join(image_dir, spelling)):
                found[name] = spelling
                break
    rest = [name for name in missing if name not in found]
    if any(not name.isascii() or "%" in name for name in rest):
        # The names of the folder and the file may use different Unicode forms.
        files = _by_key(image_dir, _plain)
        for name in rest:
            matches = files.get(_plain(name), [])
            if len(matches) == 1:
                found[name] = matches[0]
    return found


def describe_missing(missing: Sequence[str], image_dir: str) -> str:
    """Return a hint, such as similar file names, for an error message about missing images.

    The hint is empty if there are no files with similar names.
    """
    bare = os.path.basename(missing[0].replace("\\", "/"))
    if bare != missing[0] and os.path.isfile(os.path.join(image_dir, bare)):
        return f" The image folder contains {bare}, so the folder in the file_names is wrong."
    kinds = {
        "differ only in upper and lower case": _folded,
        "differ only in the file extension": _stem,
        "are in another folder": _base,
        "are in another folder and differ in upper and lower case or the file extension": _loose,
    }
    for difference, key in kinds.items():
        files = _by_key(image_dir, key)
        near = {name: files[key(name)][0] for name in missing if key(name) in files}
        if near:
            shown = [f"{there!r} for {name!r}" for name, there in list(near.items())[:_SHOWN]]
            return (
                f" For {len(near)} of them, the image folder contains similar names that "
                f"{difference}: {', '.join(shown)}. Rename the files, or correct the file_names."
            )
    return ""


def _spellings(name: str) -> Iterator[str]:
    slashed = name.replace("\\", "/")
    for plain in dict.fromkeys((slashed, unquote(slashed))):
        yield plain
        yield unicodedata.normalize("NFC", plain)
        yield unicodedata.normalize("NFD", plain)


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", unquote(name.replace("\\", "/")))


def _folded(name: str) -> str:
    return os.path.normpath(_plain(name).strip()).casefold()


def _stem(name: str) -> str:
    return os.path.splitext(os.path.normpath(_plain(name).strip()))[0]


def _base(name: str) -> str:
    return os.path.basename(_plain(name))


def _loose(name: str) -> str:
    return os.path.splitext(_base(name).strip())[0].casefold()


def _by_key(image_dir: str, key: Callable[[str], str]) -> dict[str, list[str]]:
    """Return the relative paths of all files in a folder tree, grouped by ``key(path)``."""
    found: dict[str, list[str]] = defaultdict(list)
    for folder, _, names in os.walk(image_dir):
        for name in names:
            path = os.path.relpath(os.path.join(folder, name), image_dir)
            found[key(path)].append(path)
    return found
