"""Names of image files, and of files and folders that operating systems and devices add to data."""

import re

# Pillow's formats for photographs, with the extensions of their files. Its other plugins run
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

# Files and folders of Windows, macOS, NAS devices and file systems, in lower case. Names that start
# with a dot are also hidden, such as `._photo.jpg`, macOS's metadata of `photo.jpg`.
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
    """Return True if a part of a relative path is hidden, or is a system file or folder.

    Such a file is not part of a data set even if it has the extension of an image.
    """
    parts = [part for part in re.split(r"[/\\]", name) if part not in ("", ".", "..")]
    return any(part.startswith(".") or part.lower() in _SYSTEM for part in parts)


def is_array_name(name: str) -> bool:
    """Return True if a relative path is that of a NumPy array that is not hidden."""
    return name.lower().endswith(".npy") and not is_hidden(name)


def is_image_name(name: str) -> bool:
    """Return True if a relative path is that of an image that is not hidden."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not is_hidden(name)
