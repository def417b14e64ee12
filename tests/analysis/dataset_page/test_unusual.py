"""Tests for finding unusual annotations and images."""

import xml.etree.ElementTree as ET
from collections import Counter

import numpy as np
import pytest

from senet_transfer.analysis.dataset_page.splits import Objects
from senet_transfer.analysis.dataset_page.unusual import (
    KINDS,
    deviations,
    select,
    unusual_annotations,
    unusual_images,
)

SIZE = (100, 80)


def make(*images):
    """Create the annotated objects of a dataset from a list of (box, class) pairs per image."""
    rows = [(box, label, k) for k, image in enumerate(images) for box, label in image]
    boxes, labels, places = zip(*rows, strict=True)
    sizes = np.array([SIZE] * len(images))
    return Objects(np.array(boxes, float), np.array(labels), np.array(places), sizes)


def test_deviations_are_robust():
    values = np.array([1.0, 2, 3, 4, 5, 1000])
    # The median is 3.5. The absolute deviations 2.5, 1.5, 0.5, 0.5, 1.5, 996.5 have the median 1.5.
    assert deviations(values)[0] == pytest.approx(-2.5 / (1.4826 * 1.5))
    assert deviations(np.ones(5)).tolist() == [0] * 5


def test_each_kind_of_mistake_is_found():
    random = np.random.default_rng(0)

    def cell(side=20.0, ratio=1.0):
        x, y = random.uniform(5, 50, 2)
        side *= random.uniform(0.9, 1.1)
        return ([x, y, x + side * ratio, y + side / ratio], 0)

    images = [[cell() for _ in range(9)] for _ in range(40)]
    images[3].append(([10, 10, 11, 40], 1))  # one pixel wide
    images[5].append(([90, 10, 110, 30], 1))  # half of the box is outside the image
    images[7] = images[7][:1]  # only one of nine objects is left
    box = images[9][0][0]
    images[9].append(([*box[:3], box[3] + 0.5], 0))  # almost the same box again
    images[11].append((images[11][0][0], 1))  # the same box with a different class
    images[13].append(cell(side=2.5))
    images[15].append(cell(ratio=2.2))
    images[17].append(([0, 10, 4, 40], 0))  # narrow, but only because the image border cuts it off
    found = unusual_annotations(make(*images), ["cell", "other"])
    assert {item.kind: item.image for item in found} == {
        "degenerate": 3, "outside": 5, "few": 7, "duplicate": 9, "conflict": 11, "size": 13,
        "aspect": 15,
    }  # fmt: skip
    assert len(found) == len(KINDS)
    why = {item.kind: item.why for item in found}
    assert why["degenerate"] == "The box of this other is 1 x 30 pixels."
    assert why["outside"].startswith("50% of the box of this other is outside the image of 100")
    assert why["few"].startswith("One object is annotated here. The median is 9")
    assert why["conflict"] == (
        "A box of class cell and one of class other are almost the same (IoU 1.00)."
    )


def test_error_kinds_alternate_and_no_annotation_is_shown_twice():
    tiny = [([x, 1, x + 1, 2 + x / 50], 0) for x in range(5, 75, 10)]
    outside = [([90, y, 120, y + 10], 1) for y in (5, 40)]
    both = [([-9, 60, 1, 60.5], 0)]
    found = unusual_annotations(make([*tiny, *outside, *both]), ["a", "b"])
    assert Counter(item.kind for item in found) == {"degenerate": 8, "outside": 3}
    chosen = select(found, 20)
    assert len(chosen) == 10
    assert [item.kind for item in chosen][:3] == ["degenerate", "outside", "degenerate"]
    assert len(select(found, 4)) == 4


def test_unusual_images_are_blank_large_or_elongated():
    sizes = np.array([[100, 80]] * 20 + [[2000, 1600], [400, 20], [100, 80]])
    contrast = np.array([40.0] * 22 + [0.5])
    found = unusual_images(np.arange(23) + 7, sizes, contrast)
    assert {(item.kind, item.image) for item in found} == {
        ("size", 27), ("aspect", 28), ("blank", 29)
    }  # fmt: skip


def test_annotation_errors_in_the_published_blood_cells_are_found(shared_data):
    root = shared_data / "bccd"
    names = (root / "ImageSets" / "Main" / "trainval.txt").read_text().split()
    classes = ["RBC", "WBC", "Platelets"]
    boxes, labels, images, sizes = [], [], [], []
    for k, name in enumerate(names):
        tree = ET.parse(root / "Annotations" / f"{name}.xml").getroot()
        sizes.append([int(tree.findtext(f"size/{key}")) for key in ("width", "height")])
        for item in tree.iter("object"):
            left, top, right, bottom = (
                float(item.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")
            )
            boxes.append([left - 1, top - 1, right, bottom])
            labels.append(classes.index(item.findtext("name")))
            images.append(k)
    objects = Objects(*map(np.array, (boxes, labels, images, sizes)))
    found = unusual_annotations(objects, classes)
    shown = {kind: {names[item.image] for item in found if item.kind == kind} for kind in KINDS}
    # Expected values were counted in the XML files: boxes of 1 x 1 pixels, and images with at most
    # four objects.
    assert shown["degenerate"] == {"BloodImage_00338", "BloodImage_00343"}
    counts = Counter(images)
    assert shown["few"] == {name for k, name in enumerate(names) if counts[k] <= 4}
    assert len(shown["few"]) == 14
    assert {item.kind for item in select(found, 20)} >= {"degenerate", "few", "duplicate", "size"}
