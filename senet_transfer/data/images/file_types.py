"""Functions that identify image files, hidden files and system files by their names."""

import re

# Supported image formats of Pillow and their file extensions. Some of Pillow's other plugins run
# external programs, read only metadata or read vector graphics.
FORMATS = {
    "AVIF": (".avif", ".avifs"),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "GIF": (".gif",),
    "ICO": (".ico",),
    "JPEG": (".jfif", ".jpe", ".jpeg", ".jpg"),
    "JPEG2000": (".j2c", ".j2k", ".jp2", ".jpc", ".jpf", ".jpx"),
    "MPO": (".mpo",),
    "PCX": (".pcx",),
    "PNG": (".apng", ".png"),
    "PPM": (".pbm", ".pfm", ".pgm", ".pnm", ".ppm"),
    "QOI": (".qoi",),
    "SGI": (".sgi",),
    "TGA": (".tga",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}

IMAGE_SUFFIXES = tuple(sorted(suffix for suffixes in FORMATS.values() for suffix in suffixes))

# Files and folders created by Windows, macOS, NAS devices and file systems, in lower case. Names
# that start with a dot are also hidden, such as `._photo.jpg`, the macOS metadata for `photo.jpg`.
_SYSTEM = {
    "$recycle.bin",
    "#recycle",
    "#snapshot",
    "__macosx",
    "@eadir",
    "@recycle",
    "@tmp",
    "desktop.ini",
    "ehthumbs.db",
    "lost+found",
    "system volume information",
    "thumbs.db",
}


def is_hidden(name: str) -> bool:
    """Return True if any component of a relative path is hidden, or is a system file or folder.

    Hidden files are not part of a dataset, even if they have the extension of an image file.
    """
    parts = [part for part in re.split(r"[/\\]", name) if part not in ("", ".", "..")]
    return any(part.startswith(".") or part.lower() in _SYSTEM for part in parts)


def is_array_name(name: str) -> bool:
    """Return True if a relative path refers to a NumPy file (.npy) that is not hidden."""
    return name.lower().endswith(".npy") and not is_hidden(name)


def is_image_name(name: str) -> bool:
    """Return True if a relative path refers to an image file that is not hidden."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not is_hidden(name)
