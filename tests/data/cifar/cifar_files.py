"""Small synthetic datasets in CIFAR's official file formats."""

import hashlib
import io
import pickle
import struct
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from senet_transfer.data.cifar import archives

CLASSES = ["cat", "dog", "ship"]


def made_up(images: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return synthetic uint8 images ``(N, 3072)`` and uint8 labels ``(N,)``."""
    rng = np.random.default_rng(seed)
    return (
        rng.integers(0, 256, (images, 3072), dtype=np.uint8),
        np.arange(images, dtype=np.uint8) % len(CLASSES),
    )


def binary_batch(images: int, seed: int = 0, coarse: bool = False) -> bytes:
    pixels, labels = made_up(images, seed)
    columns = [labels[:, None], pixels]
    if coarse:
        columns.insert(0, np.full((images, 1), 99, np.uint8))
    return np.hstack(columns).tobytes()


def python_batch(images: int, seed: int = 0, key: str = "labels", protocol: int = 2) -> bytes:
    """Return a pickled batch whose keys are bytes, like a Python 2 pickle loaded in Python 3."""
    pixels, labels = made_up(images, seed)
    batch = {
        b"data": pixels,
        key.encode(): labels.tolist(),
        b"filenames": [b"x.png"] * images,
        b"batch_label": b"batch",
    }
    return pickle.dumps(batch, protocol)


def official_files(form: str) -> dict[str, bytes]:
    """Return the contents of a small CIFAR archive's files, keyed by file name.

    The files contain 20 training images and 5 test images. ``form`` is one of :data:`FORMS`.
    """
    if form == "cifar-10-binary":
        files = {f"data_batch_{n}.bin": binary_batch(4, n) for n in range(1, 6)}
        files |= {"test_batch.bin": binary_batch(5, 9)}
        return files | {"batches.meta.txt": ("\n".join(CLASSES) + "\n\n").encode()}
    if form == "cifar-10-python":
        files = {f"data_batch_{n}": python_batch(4, n) for n in range(1, 6)}
        files |= {"test_batch": python_batch(5, 9)}
        return files | {"batches.meta": pickle.dumps({"label_names": CLASSES}, 0)}
    if form == "cifar-100-binary":
        names = {"fine_label_names.txt": "\n".join(CLASSES).encode(), "coarse.txt": b"animal\n"}
        return names | {
            "train.bin": binary_batch(20, 1, True),
            "test.bin": binary_batch(5, 9, True),
        }
    files = {"train": python_batch(20, 1, "fine_labels"), "test": python_batch(5, 9, "fine_labels")}
    return files | {"meta": pickle.dumps({b"fine_label_names": [n.encode() for n in CLASSES]})}


FORMS = ["cifar-10-binary", "cifar-10-python", "cifar-100-binary", "cifar-100-python"]


def write_tar(path: Path, files: dict[str, bytes], folder: str = "data") -> Path:
    mode = "w:" + {".gz": "gz", ".xz": "xz"}.get(path.suffix, "")
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}" if folder else name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def expected(form: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the training images ``(20, 3, 32, 32)`` and labels in a synthetic archive."""
    parts = [made_up(4, n) for n in range(1, 6)] if "10-" in form else [made_up(20, 1)]
    images, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
    return images.reshape(-1, 3, 32, 32), labels


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def make_official(
    form: str,
    archive: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: dict[str, bytes] | None = None,
) -> None:
    """Replace an official archive's checksums with those of a synthetic archive."""
    files, checksum = files or official_files(form), md5(archive.read_bytes())
    if form.endswith("binary"):
        forms = [
            replace(known, tgz_md5=checksum) if form in known.filename else known
            for known in archives.FORMS
        ]
        monkeypatch.setattr(archives, "FORMS", tuple(forms))
        return
    dataset = next(known for known in archives.DOWNLOADS.values() if form in known.filename)
    monkeypatch.setattr(dataset, "tgz_md5", checksum)
    for split in ("train_list", "test_list"):
        listed = [[name, md5(files[name])] for name, _ in getattr(dataset, split)]
        monkeypatch.setattr(dataset, split, listed)
    meta = dataset.meta
    monkeypatch.setattr(dataset, "meta", {**meta, "md5": md5(files[meta["filename"]])})


class Python2Pickler(pickle._Pickler):
    """Pickler that writes str objects as bytes, like Python 2."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_string(self, value: str | bytes) -> None:
        data = value if isinstance(value, bytes) else value.encode("latin-1")
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string


def python2_files(form: str) -> dict[str, bytes]:
    """Return the files of CIFAR's Python version as Python 2 pickles, like the official files."""
    files = {}
    for name, data in official_files(form).items():
        stream = io.BytesIO()
        Python2Pickler(stream, 2).dump(pickle.loads(data))
        files[name] = stream.getvalue()
    return files
