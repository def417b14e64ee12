"""Validation of the datasets of a training or evaluation run before the run starts."""

import difflib
import logging
import os
import re
from collections.abc import Sequence
from itertools import zip_longest

from detectron2.data import DatasetCatalog, MetadataCatalog

from senet_transfer.data.detection.annotation_checks import CocoSummary
from senet_transfer.data.detection.coco import ENTRY_FORM, CocoDataset, registered_entry
from senet_transfer.data.detection.formats.source import annotations_exist
from senet_transfer.data.detection.json_file import sniff_json
from senet_transfer.errors import UserError

OWN_DATA_COMMAND = """\
  senet train --config-file configs/finetune_detector.yaml \\
      --dataset my_train train.json images/ --dataset my_val val.json images/"""

# Keys of paths in Detectron2's metadata, for all types of datasets.
_FILE_KEYS = ("json_file", "panoptic_json")
_FOLDER_KEYS = ("image_root", "image_dir", "gt_dir", "dirname", "panoptic_root", "sem_seg_root")

logger = logging.getLogger(__name__)

_COCO_NAME = re.compile(r"(?:keypoints_)?coco_(2014|2017)_\w")


def dataset_classes(names: str | Sequence[str]) -> list[str]:
    """Return the class names of a run's datasets, all of which must have the same classes.

    If a dataset registered by this project has the same classes in a different order, its classes
    are reordered as in the first dataset.

    Args:
        names: Names of all datasets in `DATASETS.TRAIN` and `DATASETS.TEST`.

    Returns:
        The class names in the order of the model outputs; empty if there are no datasets.

    Raises:
        UserError: If a dataset is not registered or has no classes, or if two datasets have
            different classes.
    """
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        return []
    first = names[0]
    expected = _classes(first)
    for name in names[1:]:
        found = _classes(name)
        if found == expected or use_class_order([name], expected):
            continue
        index, pair = next(
            (i, pair) for i, pair in enumerate(zip_longest(expected, found)) if pair[0] != pair[1]
        )
        one, other = ("missing" if part is None else repr(part) for part in pair)
        raise UserError(
            f"The datasets '{first}' and '{name}' have different classes ({len(expected)} and "
            f"{len(found)} in total): class {index} is {one} in the first dataset and {other} "
            "in the second dataset. All datasets of a run must have the same classes in the same "
            "order (sorted by category id). Use the same `categories` in their annotation files."
        )
    return expected


def use_class_order(names: Sequence[str], classes: Sequence[str]) -> bool:
    """Set the class order of datasets; by default, the classes are sorted by category id.

    Returns:
        True if the order was set. False, without any change, if a dataset has different classes or
        was not registered by this project.
    """
    entries = [registered_entry(name) for name in names]
    datasets = [entry for entry in entries if isinstance(entry, CocoDataset)]
    same = [sorted(_classes(name)) == sorted(classes) for name in names]
    if len(datasets) != len(names) or not all(same):
        return False
    for dataset in datasets:
        dataset.order_classes(classes)
    return True


def check_datasets_on_disk(names: str | Sequence[str], *, evaluated: Sequence[str] = ()) -> None:
    """Check that the files of a run's datasets exist and are valid, without loading any images.

    Args:
        names: Names of all datasets in `DATASETS.TRAIN` and `DATASETS.TEST`.
        evaluated: Names of the datasets to evaluate with the COCO metrics.

    Raises:
        UserError: If a name is unknown, a file is missing or invalid, or a dataset cannot be used
            for evaluation. For missing files, the message explains how to obtain them.
    """
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        if name not in DatasetCatalog:
            raise _unknown(name)
    missing: dict[str, list[str]] = {}
    for name in names:
        dataset = registered_entry(name)
        if isinstance(dataset, CocoDataset):
            dataset.refresh()
            if name in evaluated:
                _check_evaluable(dataset)
        else:
            if name in evaluated and os.path.basename(name) != name and not _has_json(name):
                raise UserError(
                    f"The dataset '{name}' can't be evaluated, because Detectron2 would write a "
                    "file with this name outside the output folder. Register the dataset under "
                    "a name without slashes."
                )
            problems = _missing_paths(name)
            if problems:
                missing[name] = problems
    if missing:
        raise UserError(_explain_missing(missing))


def category_ids(name: str) -> list[int]:
    """Return a dataset's category ids in class order.

    If the metadata does not contain an id for each of the N classes, the ids 1 to N are returned.
    """
    metadata = MetadataCatalog.get(name)
    found = metadata.get("thing_dataset_id_to_contiguous_id")
    ids = sorted(found, key=found.get) if found else []
    classes = len(metadata.get("thing_classes", ()))
    return ids if len(ids) == classes else list(range(1, classes + 1))


def warn_of_many_objects(names: Sequence[str], limit: int) -> None:
    """Warn about datasets in which an image contains more objects than can be detected.

    Args:
        names: Names of the datasets to evaluate.
        limit: Maximum number of detections per image.
    """
    for name in names:
        dataset = registered_entry(name)
        if not isinstance(dataset, CocoDataset) or dataset.summary is None:
            continue
        if dataset.summary.most_objects > limit:
            logger.warning(
                "The dataset '%s' has up to %d objects per image, but at most %d are detected "
                "(TEST.DETECTIONS_PER_IMAGE), which limits the AP of any detector. Set "
                "TEST.DETECTIONS_PER_IMAGE to %d or more. The metrics then use the same limit.",
                name,
                dataset.summary.most_objects,
                limit,
                dataset.summary.most_objects,
            )


def check_segmentations(names: Sequence[str]) -> bool:
    """Check that all objects have a valid segmentation, which mask heads require.

    Datasets that are not registered by this project are not checked.

    Returns:
        True if the segmentation of an object (except crowds) is a run-length encoding, which
        requires ``INPUT.MASK_FORMAT: "bitmask"``.

    Raises:
        UserError: If an object has no segmentation or an invalid segmentation.
    """
    has_rle = False
    for name in names:
        dataset = registered_entry(name)
        if not isinstance(dataset, CocoDataset):
            continue
        summary = dataset.refresh(segmentations=True)
        found = summary.segmentations
        if found is None:
            continue
        for count, first in (
            (found.num_invalid, found.first_problem),
            (found.num_missing, found.first_missing),
        ):
            if count:
                kind = "an invalid" if first == found.first_problem else "no"
                raise UserError(
                    f"{first}. {count} of {summary.num_annotations} annotations have {kind} "
                    "segmentation, but MODEL.MASK_ON requires a valid segmentation for each "
                    "object. Correct the file, or set MODEL.MASK_ON to False to train on boxes "
                    "only."
                )
        has_rle = has_rle or found.num_rle > 0
    return has_rle


def check_trainable(names: Sequence[str]) -> None:
    """Check that the training data contains at least one object to train on.

    The check is skipped if any of the datasets is not registered by this project.

    Raises:
        UserError: If no dataset contains an object that is not a crowd and has a box of positive
            size.
    """
    datasets = [registered_entry(name) for name in names]
    own = [dataset for dataset in datasets if isinstance(dataset, CocoDataset)]
    summaries = [dataset.refresh() for dataset in own]
    if len(own) == len(datasets):
        check_objects([dataset.json_file for dataset in own], summaries)


def check_objects(files: Sequence[str], summaries: Sequence[CocoSummary]) -> None:
    """Raise a UserError if no annotation file contains an object that can be used for training."""
    if any(summary.num_trainable for summary in summaries):
        return
    total, zero, crowd = (
        sum(getattr(summary, key) for summary in summaries)
        for key in ("num_annotations", "num_zero_size", "num_crowd")
    )
    raise UserError(
        f"{' and '.join(files)}: none of the {total} annotations can be used for training: {zero} "
        f"boxes have zero width or height, and {crowd} annotations have iscrowd=1. Expected "
        "objects with iscrowd=0 and a box [x, y, width, height] in pixels. Check the export "
        "settings."
    )


def _classes(name: str) -> list[str]:
    dataset = registered_entry(name)
    metadata = MetadataCatalog.get(name) if name in MetadataCatalog else None
    if dataset is None and not (metadata and metadata.get("thing_classes")):
        raise _unknown(name)
    if isinstance(dataset, CocoDataset):
        # The classes of the shapes dataset are known before its files exist.
        if annotations_exist(dataset.json_file):
            dataset.refresh()
    elif not MetadataCatalog.get(name).get("thing_classes"):
        # Datasets registered with Detectron2's own function have no class names until they are
        # loaded.
        problems = _missing_paths(name)
        if problems:
            raise UserError(_explain_missing({name: problems}))
        DatasetCatalog.get(name)
    classes = MetadataCatalog.get(name).get("thing_classes")
    if not classes:
        raise UserError(
            f"The dataset '{name}' has no class names; expected a detection dataset with "
            "`thing_classes` in its metadata. Use a detection dataset, or set "
            f"MetadataCatalog.get({name!r}).thing_classes in the code that registers it."
        )
    return list(classes)


def _has_json(name: str) -> bool:
    return bool(MetadataCatalog.get(name).get("json_file"))


def _unknown(name: str) -> UserError:
    near = difflib.get_close_matches(name, DatasetCatalog.keys(), n=3, cutoff=0.6)
    guess = f" Did you mean {' or '.join(repr(match) for match in near)}?" if near else ""
    return UserError(
        f"Unknown dataset '{name}'.{guess} Expected a dataset provided by Detectron2 or this "
        "project, or your own data in COCO format. Register your data with `--dataset NAME JSON "
        f"FOLDER` on the command line, or in the config with DATASETS.REGISTER: [{ENTRY_FORM}]."
    )


def _check_evaluable(dataset: CocoDataset) -> None:
    summary = dataset.summary
    if summary is not None and summary.num_not_evaluable:
        raise UserError(
            f"{dataset.json_file}: {summary.num_not_evaluable} of {summary.num_annotations} "
            "annotations have no `area` or no `iscrowd`, which the COCO metrics require. Training "
            f"would fail with a KeyError in the first evaluation on '{dataset.name}'. Add both "
            "keys to the file (area in square pixels, iscrowd 0 or 1), or remove the dataset "
            "from DATASETS.TEST."
        )


def _missing_paths(name: str) -> list[str]:
    """Return a description of each missing or invalid file or folder of a dataset."""
    metadata, problems = MetadataCatalog.get(name).as_dict(), []
    for key in (*_FILE_KEYS, *_FOLDER_KEYS):
        path = metadata.get(key)
        if not isinstance(path, str) or "://" in path:
            continue
        shown = os.path.abspath(path)
        if key in _FOLDER_KEYS:
            if not os.path.isdir(path):
                problems.append(f"{shown}{os.sep} (missing)")
            elif _is_empty(path):
                problems.append(f"{shown}{os.sep} (empty)")
        elif not os.path.exists(path):
            problems.append(f"{shown} (missing)")
        else:
            problem = sniff_json(path)
            if problem:
                problems.append(problem)
    return problems


def _is_empty(folder: str) -> bool:
    with os.scandir(folder) as entries:  # faster than listing COCO's 118,287 images
        return next(entries, None) is None


def _explain_missing(missing: dict[str, list[str]]) -> str:
    names = ", ".join(f"'{name}'" for name in missing)
    # Datasets can share folders, so duplicate lines are removed.
    lines = dict.fromkeys(line for problems in missing.values() for line in problems)
    listing = "\n".join(f"  {line}" for line in lines)
    years = [match[1] for match in map(_COCO_NAME.match, missing) if match]
    parts = [f"Some files of {names} are missing or invalid:\n{listing}"]
    if years:
        parts += [_coco_layout(year) for year in dict.fromkeys(years)]
        parts.append("To try training without COCO, run `make demo`, which renders its own images.")
    else:
        parts.append(
            f"Expected the files at these paths. Detectron2's own datasets belong in {_root()} "
            "(see datasets/README.md)."
        )
    parts.append(
        f"To train on your own images with annotations in COCO format, run:\n{OWN_DATA_COMMAND}"
    )
    return "\n".join(parts)


def _coco_layout(year: str) -> str:
    return f"""\
Expected under {_root()}:
  coco/annotations/instances_train{year}.json   from annotations_trainval{year}.zip
  coco/annotations/instances_val{year}.json     from annotations_trainval{year}.zip
  coco/train{year}/*.jpg                         from train{year}.zip
  coco/val{year}/*.jpg                           from val{year}.zip
Download the three archives from https://cocodataset.org/#download and unpack them in coco/, or
link an existing copy: ln -s /path/to/coco {os.path.join(_root_path(), "coco")}"""


def _root_path() -> str:
    # Detectron2 reads $DETECTRON2_DATASETS only on import, and registers COCO below that folder.
    images = MetadataCatalog.get("coco_2017_train").image_root
    return os.path.abspath(os.path.join(images, "..", ".."))


def _root() -> str:
    is_set = "DETECTRON2_DATASETS" in os.environ
    origin = "as set when Detectron2 was imported" if is_set else "not set, default ./datasets"
    return f"{_root_path()} ($DETECTRON2_DATASETS; {origin})"
