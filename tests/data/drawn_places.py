"""Small generated datasets in Places365's layout."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from senet_transfer.cli.data import prepare

SCRIPTS = Path(__file__).parents[2] / "datasets"

CLASSES = ["a/airfield", "b/barn", "s/swimming_pool/indoor", "s/swimming_pool/outdoor"]


def jpeg(seed: int, size: tuple[int, int] = (40, 32)) -> bytes:
    """Return a smooth JPEG image that differs for each seed."""
    noise = np.random.RandomState(seed).randint(0, 256, (4, 5, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.BILINEAR).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def write_val(root: Path, count: int, seed: int = 0) -> Path:
    """Write a Places365 validation split: the text files and the folder `val_256`."""
    folder = root / "val_256"
    folder.mkdir(parents=True)
    lines = []
    for index in range(count):
        name = f"Places365_val_{index + 1:08d}.jpg"
        (folder / name).write_bytes(jpeg(1000 * seed + index))
        lines.append(f"{name} {index * 7 % len(CLASSES)}\n")
    (root / "places365_val.txt").write_text("".join(lines))
    categories = (f"/{name} {label}\n" for label, name in enumerate(CLASSES))
    (root / "categories_places365.txt").write_text("".join(categories))
    return root


def shard_bytes(root: Path) -> dict[str, bytes]:
    """Return the contents of a shard folder's files, except the lock file, keyed by file name."""
    return {path.name: path.read_bytes() for path in root.iterdir() if path.name != ".lock"}


def keys_of_tar(path: Path) -> list[str]:
    """Return the sample keys in a shard, using only the tarfile module."""
    with tarfile.open(path) as tar:
        return [name.removesuffix(".cls") for name in tar.getnames() if name.endswith(".cls")]


def command(name):
    """Return a function that runs a `senet data` command and returns its exit status."""

    def call(words):
        try:
            prepare(name.removeprefix("prepare_"), [str(word) for word in words])
        except SystemExit as end:
            return end.code
        return 0

    return call
