"""Writer for the HTML page about a dataset, used by ``senet data show``."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode

from senet_transfer.analysis.dataset_page.cards import duplicates_card, input_card, unusual_card
from senet_transfer.analysis.dataset_page.charts import image_charts, object_charts
from senet_transfer.analysis.dataset_page.fingerprints import (
    BITS,
    DISTANCE,
    Duplicates,
    Fingerprints,
    find_duplicates,
    fingerprint_images,
)
from senet_transfer.analysis.dataset_page.inputs import training_views
from senet_transfer.analysis.dataset_page.splits import Split, open_splits
from senet_transfer.analysis.dataset_page.statistics import AnchorFit, anchor_fit, imbalance
from senet_transfer.analysis.dataset_page.unusual import (
    IMAGE_KINDS,
    KINDS,
    Unusual,
    select,
    unusual_annotations,
    unusual_images,
)
from senet_transfer.analysis.report.html import write_html
from senet_transfer.config import is_classification
from senet_transfer.data.reading import reading_of
from senet_transfer.utils.text import first_of

# Maximum numbers of unusual annotations and of duplicate groups to show.
MOST_UNUSUAL, MOST_GROUPS = 20, 24
# The summary mentions class imbalance from this ratio of the largest to the smallest class, and
# objects without a matching anchor from this fraction of all objects.
MUCH_IMBALANCE, MANY_UNFIT = 10, 0.1


@dataclass(frozen=True)
class _Content:
    """Contents of the HTML page about a dataset.

    Attributes:
        cfg: The config.
        splits: The datasets, starting with the training data.
        prints: The fingerprints of each dataset.
        groups: The groups of duplicates. Images are numbered consecutively across all datasets.
        unusual: The unusual annotations or images.
        anchors: The largest IoU of each training object with any anchor.
    """

    cfg: CfgNode
    splits: list[Split]
    prints: list[Fingerprints]
    groups: list[Duplicates]
    unusual: list[Unusual]
    anchors: AnchorFit | None

    @cached_property
    def indices(self) -> list[tuple[int, int]]:
        """Dataset index and image index of each image, in the order used by ``groups``."""
        return [(k, index) for k, found in enumerate(self.prints) for index in found.index.tolist()]

    @cached_property
    def labels(self) -> list[np.ndarray]:
        """Labels of the images in each dataset. For detection data, all labels are 0."""
        return [split.images.labels() for split in self.splits]

    def is_shared(self, group: Duplicates) -> bool:
        """Return True if a group contains images from both the training and the evaluation data."""
        uses = {self.splits[self.indices[member][0]].trains for member in group.members}
        return len(uses) == 2

    def is_contradictory(self, group: Duplicates) -> bool:
        """Return True if a group contains images with different labels."""
        indices = [self.indices[member] for member in group.members]
        return len({int(self.labels[number][index]) for number, index in indices}) > 1


def write_data_page(
    cfg: CfgNode,
    output: Path,
    *,
    inputs: int = 12,
    limit: int = 20_000,
    workers: int = 2,
    say: Callable[[str], None] = print,
    quiet: bool = False,
) -> None:
    """Write the HTML page about the datasets of a config.

    Args:
        cfg: Config returned by :func:`~.splits.data_config`.
        output: The HTML file, which is written atomically.
        inputs: Number of training inputs to show.
        limit: Maximum number of images per dataset to decode for finding duplicates and, in
            classification data, for measuring the size and contrast of images. For larger datasets,
            a random sample is used.
        workers: Number of processes that decode images.
        say: A function that is called with a message if images can't be read.
        quiet: If True, show no progress bars.

    Raises:
        UserError: If the training data can't be loaded, or the page can't be written.
    """
    splits, reading = open_splits(cfg), reading_of(cfg)
    prints = [
        fingerprint_images(
            split.images,
            limit=limit,
            workers=1 if split.in_memory else workers,
            reading=reading,
            quiet=quiet,
            name=split.name,
        )
        for split in splits
    ]
    keys = ("digests", "bits", "contrast")
    groups = find_duplicates(*(np.concatenate([vars(one)[key] for one in prints]) for key in keys))
    objects = splits[0].objects
    anchors = None if objects is None else anchor_fit(cfg, objects)
    content = _Content(cfg, splits, prints, groups, _find_unusual(splits, prints), anchors)
    notes: list[str] = []
    for split, found in zip(splits, prints, strict=True):
        if found.broken:
            reasons = (f"{path} ({reason})" for path, reason in found.broken)
            notes.append(
                f"{split.role}: {len(found.broken)} images can't be read: {first_of(reasons, 5)}."
            )
    cards = []
    for item in select(content.unusual, MOST_UNUSUAL):
        try:
            cards.append(unusual_card(splits[item.split], item, reading))
        except MemoryError:
            raise
        except Exception as error:  # Decoders raise many types of exceptions for damaged files.
            notes.append(f"An image of the {splits[item.split].role} can't be shown: {error}")
    for note in notes:
        say(note)
    detection = not is_classification(cfg)
    data = {
        "classes": list(splits[0].classes),
        "inputs": [
            input_card(views, splits[0].classes, detection=detection)
            for views in training_views(cfg, inputs)
        ],
        "charts": _charts(content),
        "unusual": cards,
        "duplicates": [
            duplicates_card(
                [
                    (splits[number], index)
                    for number, index in map(content.indices.__getitem__, one.members)
                ],
                identical=one.identical,
                reading=reading,
            )
            for one in _sorted_groups(content)
        ],
    }
    options = cfg.MODEL.CLASSIFIER
    write_html(
        output,
        "dataset.html",
        title=f"Data: {', '.join(split.name for split in splits)}",
        notes=notes,
        data=data,
        detection=detection,
        mixes=not detection and (options.MIXUP > 0 or options.CUTMIX > 0),
        findings=_findings(content),
        splits=[_summary(split, found) for split, found in zip(splits, prints, strict=True)],
        class_rows=_class_rows(splits),
        anchors=_anchor_values(content),
        kinds=_kinds(content),
        sampled=[
            f"{len(found.index):,} of the {len(split.images):,} images in the {split.role}"
            for split, found in zip(splits, prints, strict=True)
            if len(found.index) + len(found.broken) < len(split.images)
        ],
        groups=len(groups),
        bits=(DISTANCE, BITS),
    )


def _find_unusual(splits: list[Split], prints: list[Fingerprints]) -> list[Unusual]:
    found: list[Unusual] = []
    for number, (split, one) in enumerate(zip(splits, prints, strict=True)):
        if split.objects is None:
            items = unusual_images(one.index, one.sizes, one.contrast)
        else:
            items = unusual_annotations(split.objects, split.classes)
        found += [replace(item, split=number) for item in items]
    return found


def _sorted_groups(content: _Content) -> list[Duplicates]:
    """Return the groups of duplicates to show.

    Groups with different labels come first, followed by groups that contain images from both the
    training and the evaluation data.
    """
    return sorted(
        content.groups,
        key=lambda group: (not content.is_contradictory(group), not content.is_shared(group)),
    )[:MOST_GROUPS]


def _charts(content: _Content) -> list[dict[str, Any]]:
    names = [split.role for split in content.splits]
    objects = [split.objects for split in content.splits if split.objects is not None]
    if not objects:
        return image_charts(names, [one.sizes for one in content.prints])
    return [
        *object_charts(content.cfg, names, objects, content.anchors),
        *image_charts(names, [one.sizes for one in objects]),
    ]


def _summary(split: Split, found: Fingerprints) -> dict[str, Any]:
    objects = split.objects
    sizes = found.sizes if objects is None else objects.sizes
    ends = sizes[np.argsort(sizes.prod(1), kind="stable")[[0, -1]]] if len(sizes) else sizes
    row = {
        "name": split.name,
        "role": split.role,
        "images": len(split.images),
        "sizes": " to ".join(dict.fromkeys(f"{width} x {height}" for width, height in ends)),
    }
    if objects is not None:
        row |= {"objects": len(objects.boxes), "empty": int((objects.counts == 0).sum())}
    return row


def _class_rows(splits: list[Split]) -> list[dict[str, Any]]:
    """Return image and object counts by class, sorted by decreasing number of training objects."""
    counts = [split.class_counts() for split in splits]
    order = np.argsort(-counts[0][1], kind="stable")
    return [
        {
            "name": splits[0].classes[label],
            "cells": [
                (
                    int(images[label]),
                    int(objects[label]),
                    100 * objects[label] / max(objects.max(), 1),
                )
                for images, objects in counts
            ],
        }
        for label in order.tolist()
    ]


def _anchor_values(content: _Content) -> dict[str, Any] | None:
    cfg, fit = content.cfg, content.anchors
    if fit is None or not len(fit.overlaps):
        return None
    return {
        "jitter": list(cfg.INPUT.LARGE_SCALE_JITTER.SIZE[::-1])
        if cfg.INPUT.LARGE_SCALE_JITTER.ENABLED
        else None,
        "short": int(np.median(cfg.INPUT.MIN_SIZE_TRAIN)),
        "long": int(cfg.INPUT.MAX_SIZE_TRAIN),
        "unfit": 100 * (fit.overlaps < 0.5).mean(),
        "labels": {label: 100 * (fit.labels == label).mean() for label in (1, -1, 0)},
        "thresholds": fit.thresholds,
        "inside": fit.border >= 0,
        "sizes": cfg.MODEL.ANCHOR_GENERATOR.SIZES,
        "ratios": cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS,
    }


def _kinds(content: _Content) -> list[tuple[str, list[int]]]:
    """Return a description of each type of unusual annotation or image, with counts per dataset."""
    counts = Counter((item.kind, item.split) for item in content.unusual)
    kinds = IMAGE_KINDS if is_classification(content.cfg) else KINDS
    numbers = range(len(content.splits))
    return [(text, [counts[kind, number] for number in numbers]) for kind, text in kinds.items()]


def _findings(content: _Content) -> list[tuple[str, str]]:
    """Return the sentences of the page's summary, each with the id of the section to link to.

    The most important findings come first.
    """
    return [
        *_group_findings(content),
        *_unusual_findings(content),
        *_class_findings(content),
        *_object_findings(content),
    ]


def _group_findings(content: _Content) -> list[tuple[str, str]]:
    shared = sum(map(content.is_shared, content.groups))
    contradictory = sum(map(content.is_contradictory, content.groups))
    groups = "groups of identical or almost identical images"
    texts = {
        f"{groups} in both training and evaluation data, which makes the evaluation too "
        "optimistic": shared,
        f"{groups} with different labels": contradictory,
        f"{groups} within one dataset": len(content.groups) - shared,
    }
    return [("duplicates", f"{text}: {count:,}.") for text, count in texts.items() if count]


def _unusual_findings(content: _Content) -> list[tuple[str, str]]:
    findings = []
    for text, counts in _kinds(content):
        pairs = zip(counts, content.splits, strict=True)
        if found := [f"{count:,} in the {split.role}" for count, split in pairs if count]:
            findings.append(("unusual", f"{text}: {', '.join(found)}."))
    return findings


def _class_findings(content: _Content) -> list[tuple[str, str]]:
    findings = []
    for split in content.splits:
        counts = split.class_counts()[1]
        what = "images" if split.objects is None else "objects"
        if imbalance(counts) >= MUCH_IMBALANCE:
            most = int(counts.argmax())
            least = int(np.where(counts, counts, counts.max()).argmin())
            findings.append(
                f"imbalanced {split.role}: {counts[most]:,} {what} of {split.classes[most]}, "
                f"{counts[least]:,} of {split.classes[least]}."
            )
        if empty := [split.classes[label] for label in np.flatnonzero(counts == 0).tolist()]:
            classes = f"{len(empty):,} classes" if len(empty) > 1 else "one class"
            findings.append(f"{split.role} without {what} of {classes}: {first_of(empty, 5)}.")
    return [("classes", text) for text in findings]


def _object_findings(content: _Content) -> list[tuple[str, str]]:
    findings = []
    for split in content.splits:
        if split.objects is not None and (empty := int((split.objects.counts == 0).sum())):
            skips = split.trains and content.cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
            left_out = ", which are excluded from training (DATALOADER.FILTER_EMPTY_ANNOTATIONS)"
            findings.append(
                f"images without objects in the {split.role}: {empty:,} of "
                f"{len(split.images):,}{left_out if skips else ''}."
            )
    anchors = _anchor_values(content)
    if anchors and anchors["unfit"] >= 100 * MANY_UNFIT:
        findings.append(
            "training objects without an anchor with an IoU of 0.5 or more: "
            f"{anchors['unfit']:.0f}%."
        )
    return [("statistics", text) for text in findings]
