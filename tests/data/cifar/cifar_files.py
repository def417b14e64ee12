"""Small data sets in the forms of the official ones, made up."""

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np

CLASSES = ["cat", "dog", "ship"]


def made_up(images: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images ``(N, 3072)`` and labels ``(N,)``, uint8."""
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
    """With the keys as bytes, as Python 3 writes what Python 2's text was."""
    pixels, labels = made_up(images, seed)
    batch = {
        b"data": pixels,
        key.encode(): labels.tolist(),
        b"filenames": [b"x.png"] * images,
        b"batch_label": b"batch",
    }
    return pickle.dumps(batch, protocol)


def official_files(form: str) -> dict[str, bytes]:
    """The members of an archive by name; 4 images a training batch, 5 for the test."""
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
    """The training images ``(20, 3, 32, 32)`` and labels."""
    parts = [made_up(4, n) for n in range(1, 6)] if "10-" in form else [made_up(20, 1)]
    images, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
    return images.reshape(-1, 3, 32, 32), labels
