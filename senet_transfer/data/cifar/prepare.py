"""From what people download to the prepared files of :mod:`senet_transfer.data.cifar.in_memory`."""

import logging
from pathlib import Path

import torch

from senet_transfer.data.cifar.archives import read_official_archive, read_official_folder
from senet_transfer.data.cifar.image_files import read_image_splits
from senet_transfer.data.cifar.in_memory import ImageArrays, load_images, save_images, split_file
from senet_transfer.errors import UserError

logger = logging.getLogger(__name__)


def read_source(
    source: Path, *, verify: bool = True, quiet: bool = False
) -> dict[str, ImageArrays]:
    """Reads any of the forms in which CIFAR and its like come.

    Args:
        source: an official archive (binary or python version), a folder into which one was
            unpacked, or a folder with a folder or archive a split, `train` and `test`, with a
            folder a class in it.
        verify: whether official data must be the official data, by checksum or count.
        quiet: no progress bars.

    Returns:
        The splits by name, "train" and "test".

    Raises:
        UserError: it is none of these, or damaged.
    """
    if not source.exists():
        raise UserError(f"There is no {source}. Name an archive or a folder.")
    if source.is_dir():
        splits = read_official_folder(source, verify=verify) or read_image_splits(
            source, quiet=quiet
        )
    else:
        splits = read_official_archive(source, verify=verify)
    if splits is None:
        raise UserError(
            f"{source} is neither an official archive of CIFAR-10 or CIFAR-100 (binary or python "
            "version), packed or unpacked, nor a folder with train and test (or train.tar.xz and "
            "test.tar.xz) that have a folder a class. Name one of these."
        )
    return splits


def prepare_cifar(
    source: str | Path, output: str | Path, *, verify: bool = True, quiet: bool = False
) -> Path:
    """Writes the prepared files of a data set, or finds that they are there.

    Args:
        source: as for :func:`read_source`.
        output: the folder to write `train.safetensors` and `test.safetensors` to.
        verify: as for :func:`read_source`.
        quiet: no progress bars.

    Returns:
        The folder.

    Raises:
        UserError: the source is none or damaged, or the folder holds another data set.
    """
    source, output = Path(source).expanduser(), Path(output).expanduser()
    splits = read_source(source, verify=verify, quiet=quiet)
    # All is compared before anything is written.
    there = {split for split, data in splits.items() if _is_there(split_file(output, split), data)}
    for split, data in splits.items():
        path = split_file(output, split)
        if split not in there:
            save_images(data, path, source.name)
        counts = data.class_counts()
        logger.info(
            "%s %s: %s images, %s classes of %s to %s images",
            path,
            "was there already" if split in there else "written",
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
            f"{path} holds another data set ({len(found):,} images of {found.num_classes} "
            f"classes) than the source. Name another folder, or move it away; it was not changed."
        )
    return True
