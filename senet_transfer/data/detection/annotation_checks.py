"""Validation of annotation files in COCO format.

Without these checks, an invalid file may cause an error hours into training, such as a KeyError in
the evaluator, or a low AP. A fast check accepts most valid annotations, and only the remaining
annotations are examined in detail. Validating COCO's 450 MB file of training annotations therefore
takes only a fraction of the time that `json.load` takes to parse it.
"""

import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from senet_transfer.data.detection.file_names import (
    describe_missing,
    find_missing,
    find_renamed,
    is_inside,
)
from senet_transfer.data.detection.formats.records import NOTES, SOURCE
from senet_transfer.data.detection.formats.source import read_annotations
from senet_transfer.data.detection.segmentations import segmentation_problem
from senet_transfer.errors import UserError

_REPAIR = "Correct or remove the entry and save the file again"
_BOX_FORM = "[x, y, width, height] in pixels"


@dataclass
class SegmentationSummary:
    """Result of checking the `segmentation` entries of an annotation file.

    Attributes:
        num_rle: Number of valid run-length encodings (RLE), except those of crowds.
        num_missing: Number of annotations without a segmentation.
        num_invalid: Number of annotations with an invalid segmentation.
        first_missing: Error message for the first annotation without a segmentation.
        first_problem: Error message for the first annotation with an invalid segmentation.
    """

    num_rle: int = 0
    num_missing: int = 0
    num_invalid: int = 0
    first_missing: str = ""
    first_problem: str = ""


@dataclass
class CocoSummary:
    """Classes, images and statistics of a valid annotation file in COCO format."""

    classes: list[str]  # sorted by category id, as in Detectron2
    id_map: dict[int, int]  # category id in the file -> index into `classes`
    num_images: int = 0
    num_annotations: int = 0
    num_crowd: int = 0
    num_zero_size: int = 0
    num_over_the_edge: int = 0
    num_not_evaluable: int = 0  # annotations without `area` or `iscrowd`, which COCO AP requires
    num_without_keypoints: int = 0  # annotations without `keypoints` or `num_keypoints`
    keypoints: list[str] = field(default_factory=list)  # of the first category with keypoints
    most_objects: int = 0  # largest number of objects in an image, except crowds
    num_trainable: int = 0  # annotations that are not crowds and have a box
    num_odd_areas: int = 0  # annotations whose `area` does not match their box
    segmentations: SegmentationSummary | None = None  # None if they were not checked
    # File name, width, height and id of each image.
    images: list[tuple[str, int, int, int]] = field(default_factory=list, repr=False)
    renamed: dict[str, str] = field(default_factory=dict)  # listed file name -> existing file name
    warnings: list[str] = field(default_factory=list)

    def order_classes(self, classes: Sequence[str]) -> None:
        """Set the order of the classes.

        Args:
            classes: All class names of the file, in the new order.
        """
        ids = {self.classes[index]: number for number, index in self.id_map.items()}
        self.classes = list(classes)
        self.id_map = {ids[name]: index for index, name in enumerate(classes)}


def read_coco_summary(
    json_file: str,
    image_dir: str,
    *,
    upright: bool = True,
    allow_empty: bool = False,
    segmentations: bool = False,
) -> CocoSummary:
    """Read and validate an annotation file, and check that its images exist.

    Invalid segmentations do not raise an error, because detectors without a mask head do not use
    segmentations.

    Args:
        json_file: Annotation file in COCO instances format, or a file or folder in another
            supported format.
        image_dir: Folder to which the `file_name` entries are relative.
        upright: Whether the annotations refer to the images with EXIF orientation applied.
        allow_empty: Whether to accept a file that contains no annotations or only crowd
            annotations, such as a test set whose ground truth is not public.
        segmentations: Whether to also check the segmentations (polygons or run-length encodings)
            of the objects, and to store the result in the summary.

    Returns:
        The classes, images and statistics of the file.

    Raises:
        UserError: If the file is invalid, or an image is missing. The message contains the path of
            the file and the first invalid entry.
    """
    _check_folder(image_dir, json_file)
    data = read_annotations(json_file, image_dir, upright=upright)
    return summarize_coco(
        data, json_file, image_dir, allow_empty=allow_empty, segmentations=segmentations
    )


def summarize_coco(
    data: dict,
    json_file: str,
    image_dir: str | None,
    *,
    allow_empty: bool = False,
    segmentations: bool = False,
) -> CocoSummary:
    """Validate annotations in COCO format after parsing; see :func:`read_coco_summary`.

    If `image_dir` is None, the images do not have to exist.
    """
    images = _section(json_file, data, "images")
    categories = _section(json_file, data, "categories")
    sizes = _check_images(json_file, images)
    summary = _check_categories(json_file, categories)
    summary.num_images = len(images)
    keys = ("file_name", "width", "height", "id")
    summary.images = [tuple(image[key] for key in keys) for image in images]
    if not allow_empty or data.get("annotations", []) != []:
        annotations = _section(json_file, data, "annotations")
        _check_annotations(json_file, annotations, sizes, summary)
        if summary.num_crowd == len(annotations) and not allow_empty:
            raise UserError(
                f"{json_file}: all {len(annotations)} annotations have iscrowd=1, which training "
                "ignores; expected at least one object with iscrowd=0. CVAT, for example, exports "
                "brush masks with iscrowd=1. If each annotation is a single object, set iscrowd to "
                "0."
            )
        if segmentations:
            summary.segmentations = _check_segmentations(json_file, annotations, sizes)
    summary.warnings += [f"{json_file}: {note}." for note in data.get(NOTES, ())]
    if image_dir is not None:
        names = [image["file_name"] for image in images]
        summary.renamed = _find_files(json_file, names, image_dir)
    if summary.renamed:
        listed, found = next(iter(summary.renamed.items()))
        summary.warnings.append(
            f"{json_file}: {len(summary.renamed)} of the {len(images)} file_names are spelled "
            f"differently from the image files on disk, such as {listed!r} for {found!r}."
        )
    return summary


def _section(json_file: str, data: dict, key: str) -> list[dict]:
    """Return `data[key]`; raise an error if it is not a non-empty list of JSON objects."""
    if key not in data:
        found = f"no `{key}` (its keys: {', '.join(map(repr, list(data)[:10])) or 'none'})"
    elif not isinstance(data[key], list):
        found = f"`{key}` of type {type(data[key]).__name__}"
    elif not data[key]:
        found = f"an empty `{key}` list"
    else:
        for index, item in enumerate(data[key]):
            if type(item) is not dict:
                raise _bad(json_file, key, index, item, "is not a JSON object", "{...}")
        return data[key]
    more = ""
    if key == "annotations":
        more = (
            " Individual images may have no objects, but the file must contain at least one "
            "annotation. To register a test set without ground truth, use allow_empty=True in "
            "Python."
        )
    raise UserError(
        f"{json_file} contains {found}; expected a non-empty `{key}` list, as in COCO instances "
        f"format. Check the path and the export settings.{more}"
    )


def _bad(
    json_file: str, section: str, index: int, item: object, found: str, expected: str
) -> UserError:
    name = f"{json_file}: {section}[{index}]"
    if isinstance(item, dict):
        name = _entry_name(json_file, section, index, item)
    return UserError(f"{name} {found}; expected {expected}. {_REPAIR}.")


def _entry_name(json_file: str, section: str, index: int, item: dict) -> str:
    """Return the file and position of an entry as text for error messages."""
    if SOURCE in item:
        return str(item[SOURCE])
    return f"{json_file}: {section}[{index}]" + (f" (id {item['id']!r})" if "id" in item else "")


def _check_unique_ids(json_file: str, section: str, items: list[dict]) -> None:
    if len({item["id"] for item in items}) == len(items):
        return
    first: dict = {}
    for index, item in enumerate(items):
        if first.setdefault(item["id"], index) != index:
            found = f"has the same id as {section}[{first[item['id']]}]"
            raise _bad(json_file, section, index, item, found, "unique ids")


def _check_images(json_file: str, images: list[dict]) -> dict:
    """Validate the image entries, and return a dictionary from image id to (width, height)."""
    for index, image in enumerate(images):
        try:
            name, width, height = image["file_name"], image["width"], image["height"]
            fine = (
                type(image["id"]) is type(width) is type(height) is int
                and width > 0
                and height > 0
                and type(name) is str
                and name
                and name[0] not in "/\\"
                and ".." not in name
            )
        except (KeyError, TypeError):
            fine = False
        if not fine:
            problem = _image_problem(image)
            if problem:
                raise _bad(json_file, "images", index, image, *problem)
    _check_unique_ids(json_file, "images", images)
    return {image["id"]: (image["width"], image["height"]) for image in images}


def _image_problem(image: dict) -> tuple[str, str] | None:
    """Return the error in an image entry and the expected value; None if the entry is valid."""
    name = image.get("file_name")
    if type(image.get("id")) is not int:
        # String ids would work here, but not in every implementation of the COCO metrics.
        found = f"has id {image['id']!r}" if "id" in image else "has no `id`"
        return found, "a whole number"
    if not isinstance(name, str) or not name.strip():
        found = f"has file_name {name!r}" if "file_name" in image else "has no `file_name`"
        return found, "the image's path relative to the image folder"
    if not is_inside(name):
        return (
            f"has file_name {name!r}",
            "a path inside the image folder, without a leading slash and without `..`",
        )
    for key in ("width", "height"):
        value = image.get(key)
        if type(value) is not int or value <= 0:
            found = f"has {key} {value!r}" if key in image else f"has no `{key}`"
            return found, "a positive integer (the image size in pixels)"
    return None


def _check_categories(json_file: str, categories: list[dict]) -> CocoSummary:
    names: dict[str, int] = {}
    for index, category in enumerate(categories):
        number, name = category.get("id"), category.get("name")
        found = expected = ""
        if type(number) is not int:
            found = f"has id {number!r}" if "id" in category else "has no `id`"
            expected = "a whole number"
        elif not isinstance(name, str) or not name.strip():
            found = f"has name {name!r}" if "name" in category else "has no `name`"
            expected = "the class's name"
        elif names.setdefault(name, index) != index:
            found = f"has the same name {name!r} as categories[{names[name]}]"
            expected = "unique names"
        if found:
            raise _bad(json_file, "categories", index, category, found, expected)
    _check_unique_ids(json_file, "categories", categories)
    ordered = sorted(categories, key=lambda category: category["id"])
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(" ".join(name.split()).casefold(), []).append(name)
    doubtful = [group for group in alike.values() if len(group) > 1]
    return CocoSummary(
        warnings=[
            f"{json_file}: the class names {' and '.join(map(repr, group))} differ only in spaces "
            "or upper and lower case. They are treated as different classes. If this is a "
            "mistake, merge them."
            for group in doubtful
        ],
        classes=[category["name"] for category in ordered],
        id_map={category["id"]: index for index, category in enumerate(ordered)},
        keypoints=next(filter(None, map(_keypoint_names, ordered)), []),
    )


def _keypoint_names(category: dict) -> list[str]:
    """Return a category's keypoint names; an empty list if they are missing or invalid."""
    names = category.get("keypoints")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return []
    return names if len(set(names)) == len(names) else []


def _check_annotations(
    json_file: str, annotations: list[dict], sizes: dict, summary: CocoSummary
) -> None:
    """Validate all annotations, and add statistics and warnings to `summary`."""
    id_map, over_the_edge, not_evaluable, odd_areas = summary.id_map, 0, 0, 0
    for index, item in enumerate(annotations):
        if not _is_usual(item, sizes, id_map):
            problem = _annotation_problem(item, sizes, id_map)
            if problem:
                raise _bad(json_file, "annotations", index, item, *problem)
        x, y, w, h = item["bbox"]
        width, height = sizes[item["image_id"]]
        # The tolerance is one pixel, because annotation tools round coordinates.
        if x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1:
            over_the_edge += 1
        area = item.get("area")
        if area is None or item.get("iscrowd") is None:
            not_evaluable += 1
        # An object's area is at most the area of its box. The tolerances allow for rounding.
        if area is not None and w * h > 9 and not 1 < area < 1.1 * (w + 2) * (h + 2):
            odd_areas += 1
    _check_unique_ids(json_file, "annotations", annotations)
    summary.num_annotations = len(annotations)
    summary.num_crowd = sum(1 for item in annotations if item.get("iscrowd"))
    objects = Counter(item["image_id"] for item in annotations if not item.get("iscrowd"))
    summary.most_objects = max(objects.values(), default=0)
    summary.num_zero_size = sum(1 for item in annotations if 0 in item["bbox"][2:])
    summary.num_over_the_edge = over_the_edge
    summary.num_not_evaluable = not_evaluable
    summary.num_odd_areas = odd_areas
    summary.num_trainable = sum(
        1 for item in annotations if not item.get("iscrowd") and 0 not in item["bbox"][2:]
    )
    summary.num_without_keypoints = sum(
        "keypoints" not in item or "num_keypoints" not in item for item in annotations
    )
    largest = max(max(item["bbox"]) for item in annotations)
    if largest == 0:
        raise UserError(
            f"{json_file}: all {len(annotations)} boxes are [0, 0, 0, 0]; expected {_BOX_FORM}. "
            "Export the file again with boxes, or compute the boxes from the segmentations if the "
            "file contains segmentations."
        )
    if largest <= 1:
        raise _bad(
            json_file,
            "annotations",
            0,
            annotations[0],
            f"has bbox {annotations[0]['bbox']!r}, and no box coordinate in the file is greater "
            "than 1",
            f"{_BOX_FORM}, not fractions of the image size",
        )
    summary.warnings += _warnings(json_file, summary)


def _is_usual(item: dict, sizes: dict, id_map: dict) -> bool:
    """Return True if a fast check shows that an annotation is valid.

    The check also returns False for some valid annotations. :func:`_annotation_problem` then
    examines the annotation in detail.
    """
    try:
        x, y, w, h = item["bbox"]
        width, height = sizes[item["image_id"]]
        area = item.get("area", 0)
        # The comparisons are False for NaN and infinity, and raise TypeError for strings.
        return (
            0 < w < math.inf
            and 0 < h < math.inf
            and -w < x < width
            and -h < y < height
            and item["category_id"] in id_map
            and type(item["id"]) is int
            and item.get("ignore", 0) == 0
            and item.get("iscrowd", 0) in (0, 1)
            and type(area) in (int, float)
            and -math.inf < area < math.inf
            and bool not in (type(x), type(y), type(w), type(h))
        )
    except (KeyError, TypeError, ValueError):
        return False


def _is_finite(value: object) -> bool:
    """Return True if a value is a finite integer or float."""
    return (type(value) is int or type(value) is float) and -math.inf < value < math.inf


def _annotation_problem(item: dict, sizes: dict, id_map: dict) -> tuple[str, str] | None:
    """Return the error in an annotation and the expected value; None if it is valid."""
    for key in ("id", "image_id", "category_id", "bbox"):
        if key not in item:
            return f"has no `{key}`", "id, image_id, category_id and bbox"
    if type(item["id"]) is not int:
        return f"has id {item['id']!r}", "a whole number"
    for key, known, of in (("image_id", sizes, "images"), ("category_id", id_map, "categories")):
        value = item[key]
        if isinstance(value, Collection) and not isinstance(value, str) or value not in known:
            return f"has {key} {value!r}, which is not in `{of}`", _some_of(known)
    # Tools such as pandas write null for missing values.
    if item.get("ignore") not in (0, None):
        return f"has `ignore` {item['ignore']!r}, which Detectron2 cannot load", "0 or no `ignore`"
    if item.get("iscrowd") not in (0, 1, None):
        return f"has iscrowd {item['iscrowd']!r}", "0 or 1"
    area = item.get("area")
    if area is not None and not _is_finite(area):
        return f"has area {area!r}", "a finite number, the area in square pixels"
    return _box_problem(item["bbox"], sizes[item["image_id"]])


def _box_problem(bbox: object, size: tuple[int, int]) -> tuple[str, str] | None:
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_finite, bbox)):
        return f"has bbox {bbox!r}", f"four finite numbers, {_BOX_FORM}"
    x, y, w, h = bbox
    if w < 0 or h < 0:
        return f"has bbox {bbox!r} with a negative size", _BOX_FORM
    # COCO itself contains a few boxes with zero width or height. Detectron2's mapper removes them.
    if w > 0 and h > 0 and (x + w <= 0 or y + h <= 0 or x >= size[0] or y >= size[1]):
        found = f"has bbox {bbox!r}, which is outside its image of {size[0]}x{size[1]} pixels"
        return found, f"{_BOX_FORM} relative to the image's top left corner"
    return None


def _check_segmentations(
    json_file: str, annotations: list[dict], sizes: dict
) -> SegmentationSummary:
    found = SegmentationSummary()
    for index, item in enumerate(annotations):
        segmentation = item.get("segmentation")
        problem = segmentation_problem(segmentation, *sizes[item["image_id"]])
        name = _entry_name(json_file, "annotations", index, item)
        if problem:
            found.num_invalid += 1
            found.first_problem = (
                found.first_problem or f"{name} {problem[0]}; expected {problem[1]}"
            )
        elif not segmentation:
            found.num_missing += 1
            found.first_missing = found.first_missing or f"{name} has no `segmentation`"
        elif isinstance(segmentation, dict) and not item.get("iscrowd"):
            found.num_rle += 1
    return found


def _some_of(known: Iterable) -> str:
    listed = list(known)
    kind = type(listed[0]).__name__
    return f"one of the {len(listed)} ids in this list (of type {kind}), such as {listed[:3]!r}"


def _warnings(json_file: str, summary: CocoSummary) -> list[str]:
    total, found = summary.num_annotations, []
    if summary.num_zero_size:
        found.append(
            f"{summary.num_zero_size} of {total} boxes have zero width or height; training ignores "
            "them"
        )
    if 2 * summary.num_crowd > total:
        found.append(
            f"{summary.num_crowd} of {total} annotations have iscrowd=1; training ignores them. If "
            "they are single objects, set iscrowd to 0"
        )
    if 2 * summary.num_odd_areas > total:
        found.append(
            f"the `area` of {summary.num_odd_areas} of {total} annotations does not match their "
            "box; COCO's AP by object size (APs, APm, APl) depends on `area`, but training does "
            "not"
        )
    if summary.num_over_the_edge:
        found.append(
            f"{summary.num_over_the_edge} of {total} boxes extend beyond their image and are "
            "clipped. If there are many, the boxes may be in the format [x1, y1, x2, y2] instead "
            f"of {_BOX_FORM}"
        )
    if summary.num_not_evaluable:
        found.append(
            f"{summary.num_not_evaluable} of {total} annotations have no `area` or no `iscrowd`; "
            "the file can be used for training, but not for evaluation with the COCO metrics"
        )
    return [f"{json_file}: {text}." for text in found]


def _check_folder(image_dir: str, json_file: str) -> None:
    if os.path.isdir(image_dir):
        return
    found = "does not exist"
    if os.path.exists(image_dir):
        found = "is not a folder"
        if os.path.isdir(json_file):
            found += " (were the annotation file and the folder swapped?)"
    raise UserError(
        f"Image folder {image_dir} {found}; expected the folder to which the `file_name` "
        f"entries in {json_file} are relative. Check the path; `~` and $VARS are expanded."
    )


def _find_files(json_file: str, names: list[str], image_dir: str) -> dict[str, str]:
    """Check that all images of an annotation file exist.

    Returns:
        Dictionary from the name in the annotation file to the name on disk, for images whose names
        are spelled differently.

    Raises:
        UserError: If images are missing from the folder.
    """
    missing = find_missing(names, image_dir)
    renamed = find_renamed(missing, image_dir) if missing else {}
    missing = [name for name in missing if name not in renamed]
    if not missing:
        return renamed
    raise UserError(
        f"{len(missing)} of the {len(names)} images listed in {json_file} are not in {image_dir}, "
        f"for example {', '.join(missing[:3])}.{describe_missing(missing, image_dir)} Expected all "
        "`file_name` entries to be relative to this folder. Pass the correct image folder, or "
        "remove these images from the annotation file."
    )
