"""Conversion of CIFAR and similar data to prepared files."""

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
    """Read CIFAR or similar data in any supported form.

    Args:
        source: An official archive (binary or python version), a folder to which one was unpacked,
            or a folder with a folder or archive for each split, `train` and `test`, that holds one
            folder per class.
        verify: As for :func:`~senet_transfer.data.cifar.archives.read_official`.
        quiet: Show no progress bars.

    Returns:
        The splits by name, "train" and "test".

    Raises:
        UserError: If the data has another form, is damaged or fails the verification.
    """
    if not source.exists():
        raise UserError(f"There is no {source}. Name an archive or a folder.")
    splits = read_official(source, verify=verify)
    if splits is None and source.is_dir():
        splits = read_image_splits(source, quiet=quiet)
    if splits is None:
        raise UserError(
            f"{source} is neither an official archive of CIFAR-10 or CIFAR-100 (binary or python "
            "version), packed or unpacked, nor a folder with train and test (or train.tar.xz and "
            "test.tar.xz) that hold one folder per class. Name one of these."
        )
    return splits


def prepare_cifar(
    source: str | Path, output: str | Path, *, verify: bool = True, quiet: bool = False
) -> Path:
    """Write the prepared files of a data set, or keep those that exist.

    Args:
        source: As for :func:`read_source`.
        output: Folder for `train.safetensors` and `test.safetensors`.
        verify: As for :func:`read_source`.
        quiet: Show no progress bars.

    Returns:
        The output folder.

    Raises:
        UserError: If the source can't be read, or the folder holds another data set.
    """
    source, output = Path(source).expanduser(), Path(output).expanduser()
    splits = read_source(source, verify=verify, quiet=quiet)
    # Compare both splits before writing one.
    there = {split for split, data in splits.items() if _is_there(split_file(output, split), data)}
    for split, data in splits.items():
        path = split_file(output, split)
        if split not in there:
            save_images(data, path, source.name)
        counts = data.class_counts()
        logger.info(
            "%s %s: %s images, %s classes of %s to %s images",
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
            f"{path} contains another data set ({len(found):,} images of {found.num_classes} "
            f"classes) than the source. Choose another folder, or move the file. It was not "
            "changed."
        )
    return True
