"""Conversion of CIFAR and other datasets of 32x32 images to safetensors files."""

import logging
from pathlib import Path

import torch

from senet_transfer.data.cifar.archives import read_official
from senet_transfer.data.cifar.image_files import read_image_splits
from senet_transfer.data.cifar.in_memory import ImageArrays, load_images, save_images, split_file
from senet_transfer.errors import UserError

logger = logging.getLogger(__name__)


def read_source(
    source: Path, *, verify: bool = True, quiet: bool = False
) -> dict[str, ImageArrays]:
    """Read CIFAR or another dataset of 32x32 images in any supported format.

    Args:
        source: Official archive (binary or Python version), an unpacked official archive, or a
            folder with `train` and `test` subfolders or archives, each with one folder per class.
        verify: See :func:`~senet_transfer.data.cifar.archives.read_official`.
        quiet: Whether to hide progress bars.

    Returns:
        Dictionary from split name ("train" or "test") to images.

    Raises:
        UserError: If the data has an unsupported format, is damaged or fails verification.
    """
    if not source.exists():
        raise UserError(
            f"{source} does not exist; expected an archive or a folder. Check the path."
        )
    splits = read_official(source, verify=verify)
    if splits is None and source.is_dir():
        splits = read_image_splits(source, quiet=quiet)
    if splits is None:
        raise UserError(
            f"{source} has an unsupported format; expected an official CIFAR-10 or CIFAR-100 "
            "archive (binary or Python version), an unpacked archive, or a folder with train and "
            "test (or train.tar.xz and test.tar.xz), each with one folder per class. Pass one of "
            "these."
        )
    return splits


def prepare_cifar(
    source: str | Path, output: str | Path, *, verify: bool = True, quiet: bool = False
) -> Path:
    """Convert a dataset of 32x32 images to safetensors files.

    Existing files with the same content are kept.

    Args:
        source: See :func:`read_source`.
        output: Folder for `train.safetensors` and `test.safetensors`.
        verify: See :func:`read_source`.
        quiet: Whether to hide progress bars.

    Returns:
        The output folder.

    Raises:
        UserError: If the source cannot be read, or the folder contains a different dataset.
    """
    source, output = Path(source).expanduser(), Path(output).expanduser()
    splits = read_source(source, verify=verify, quiet=quiet)
    # Compare both splits before writing either.
    there = {split for split, data in splits.items() if _is_there(split_file(output, split), data)}
    for split, data in splits.items():
        path = split_file(output, split)
        if split not in there:
            save_images(data, path, source.name)
        counts = data.class_counts()
        logger.info(
            "%s %s: %s images, %s classes with %s to %s images each",
            path,
            "already exists" if split in there else "written",
            f"{len(data):,}",
            data.num_classes,
            f"{min(counts):,}",
            f"{max(counts):,}",
        )
    return output


def _is_there(path: Path, data: ImageArrays) -> bool:
    if not path.exists():
        return False
    found = load_images(path)
    same = (
        list(found.classes) == list(data.classes)
        and torch.equal(found.labels, data.labels)
        and torch.equal(found.images, data.images)
    )
    if not same:
        raise UserError(
            f"{path} already exists and contains a different dataset ({len(found):,} images, "
            f"{found.num_classes} classes). The file was not changed. Choose a different folder, "
            "or move the file."
        )
    return True
