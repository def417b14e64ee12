"""Registration of datasets with Detectron2, in COCO or another supported annotation format.

In contrast to Detectron2's `register_coco_instances`, the annotation file is validated on
registration and whenever it has changed, the same dataset can be registered repeatedly, and the
class names are available in the metadata before the dataset is loaded.
"""

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from detectron2.data import DatasetCatalog, MetadataCatalog

from senet_transfer.data.detection.annotation_checks import CocoSummary, read_coco_summary
from senet_transfer.data.detection.formats.source import (
    annotations_exist,
    annotations_state,
    default_image_folder,
)
from senet_transfer.data.detection.records import read_records
from senet_transfer.data.shapes.render import SHAPE_CLASSES, SHAPE_KEYPOINTS, SHAPE_SPLITS
from senet_transfer.errors import UserError

ENTRY_FORM = '["my_train", "path/to/train.json", "path/to/images"]'
_PARTS = (2, 3)  # the image folder is optional

# Words that distinguish the names of two keypoints that are swapped by a horizontal flip.
_SIDES = {"left": "right", "Left": "Right", "LEFT": "RIGHT"}

logger = logging.getLogger(__name__)


@dataclass
class CocoDataset:
    """Callable entry of Detectron2's `DatasetCatalog` that loads a dataset.

    There is no other list of the datasets registered by this project; :func:`registered_entry`
    looks them up in the catalog.

    Attributes:
        name: Dataset name in the catalogs.
        json_file: Annotation file in COCO format, or a file or folder in another supported format.
            The path may end with a colon and the name of a split.
        image_dir: Folder to which the `file_name` entries are relative.
        allow_empty: Whether to accept a file without annotations or with only crowd annotations.
        upright: Whether the annotations refer to the images with EXIF orientation applied.
        summary: Summary of the annotation file when it was last read; None if it has not been read.
        class_order: Class names in the order of the model outputs; if empty, the classes are sorted
            by category id.
    """

    name: str
    json_file: str
    image_dir: str
    allow_empty: bool = False
    upright: bool = True
    summary: CocoSummary | None = field(default=None, compare=False, repr=False)
    class_order: tuple[str, ...] = field(default=(), compare=False, repr=False)
    _state: object | None = field(default=None, compare=False, repr=False)

    def __call__(self) -> list[dict]:
        """Load the dataset as a list of Detectron2's dataset dicts.

        Raises:
            UserError: If the annotation file has changed and is no longer valid.
        """
        summary = self.refresh()
        records = read_records(self.json_file, self.image_dir, summary, upright=self.upright)
        logger.info("Loaded %d images from %s", len(records), self.json_file)
        return records

    def image_records(self) -> list[dict]:
        """Return one dataset dict per image, with its path, size and id but no annotations."""
        summary = self.refresh()
        return [
            {
                "file_name": os.path.join(self.image_dir, summary.renamed.get(name, name)),
                "width": width,
                "height": height,
                "image_id": number,
            }
            for name, width, height, number in summary.images
        ]

    def refresh(self, *, segmentations: bool = False) -> CocoSummary:
        """Read and validate the annotation file, unless it is unchanged since the last call.

        Args:
            segmentations: Whether to also check the segmentations, which mask heads require.

        Returns:
            The summary of the annotation file.

        Raises:
            UserError: If the file is invalid. The metadata is not changed in this case.
        """
        state = annotations_state(self.json_file, self.image_dir, upright=self.upright)
        known = self.summary
        if known and state is not None and state == self._state:
            if known.segmentations is None and segmentations:
                # The file's warnings have already been logged.
                self.summary = self._read(segmentations)
                self.order_classes(self.class_order)
            return self.summary or known
        summary = self._read(segmentations)
        logger.info(
            "Dataset '%s': %d images, %d annotations (%d crowd), %d classes",
            self.name,
            summary.num_images,
            summary.num_annotations,
            summary.num_crowd,
            len(summary.classes),
        )
        for warning in summary.warnings:
            logger.warning(warning)
        self.summary, self._state = summary, state
        self.order_classes(self.class_order)
        return summary

    def _read(self, segmentations: bool) -> CocoSummary:
        return read_coco_summary(
            self.json_file,
            self.image_dir,
            upright=self.upright,
            allow_empty=self.allow_empty,
            segmentations=segmentations,
        )

    def order_classes(self, classes: Sequence[str]) -> None:
        """Set the class order; by default, the classes are sorted by category id.

        This is required for a model whose training data has the same classes, but with different
        category ids.

        Args:
            classes: The class names in the new order. If they are not the class names of the
                annotation file, the classes are sorted by category id.
        """
        if self.summary is None:
            return
        ids = sorted(self.summary.id_map)
        by_id = [self.summary.classes[self.summary.id_map[number]] for number in ids]
        self.class_order = tuple(classes) if sorted(classes) == sorted(by_id) else ()
        self.summary.order_classes(self.class_order or by_id)
        self.publish(self.summary.classes, self.summary.id_map, self.summary.keypoints)

    def publish(
        self, classes: Sequence[str], id_map: dict[int, int], keypoints: Sequence[str] = ()
    ) -> None:
        """Write classes, keypoints and paths to the dataset's metadata, replacing existing values.

        Detectron2's `Metadata` raises an error if an attribute is set to a different value, so its
        `vars` are updated instead. The object itself is not replaced, because evaluators and
        visualisers keep references to it.
        """
        vars(MetadataCatalog.get(self.name)).update(
            json_file=self.json_file,
            image_root=self.image_dir,
            upright=self.upright,
            evaluator_type="coco",
            thing_classes=list(classes),
            thing_dataset_id_to_contiguous_id=dict(id_map),
        )
        if keypoints:
            vars(MetadataCatalog.get(self.name)).update(
                keypoint_names=list(keypoints), keypoint_flip_map=flip_pairs(keypoints)
            )


class ShapesDataset(CocoDataset):
    """Split of the rendered shapes dataset, which can be registered before its files exist."""

    def refresh(self, *, segmentations: bool = False) -> CocoSummary:
        if not os.path.exists(self.json_file):
            raise UserError(
                f"Dataset '{self.name}' has not been created: {os.path.abspath(self.json_file)} "
                "does not exist. Run `senet data shapes`, which takes a few "
                "seconds (`make demo` also runs this command)."
            )
        return super().refresh(segmentations=segmentations)


def register_coco_dataset(
    name: str,
    json_file: str | os.PathLike,
    image_dir: str | os.PathLike | None = None,
    *,
    allow_empty: bool = False,
    segmentations: bool = False,
    upright: bool = True,
) -> None:
    """Validate a dataset in COCO or another supported format, and register it with Detectron2.

    Registering the same dataset again has no effect. Registering the same name with different
    paths replaces the earlier registration.

    Args:
        name: Dataset name for `DATASETS.TRAIN` and `DATASETS.TEST`.
        json_file: Annotation file in COCO instances format, or a file or folder in another
            supported format, such as a folder in Pascal VOC format. The path may end with a colon
            and the name of a split, such as `voc:train`.
        image_dir: Folder to which the `file_name` entries are relative; None selects the format's
            default folder, which for COCO is the folder of the annotation file.
        allow_empty: Whether to accept a file without annotations or with only crowd annotations,
            such as a test set whose ground truth is not public.
        segmentations: Whether to also check the segmentations, which mask heads require. For a
            model with a mask head, this avoids reading the file a second time.
        upright: Whether the annotations refer to the images with EXIF orientation applied.

    Raises:
        UserError: If the file or folder is invalid, or the name belongs to a dataset that was not
            registered with this function. Existing registrations are not changed in this case.
    """
    if not isinstance(name, str) or not name.strip():
        raise UserError(
            f"The dataset name is {name!r}; expected a non-empty string. Choose a name."
        )
    path = os.path.abspath(json_file)
    folder = os.path.abspath(image_dir) if image_dir else default_image_folder(path)
    dataset = CocoDataset(name, path, folder, allow_empty, upright)
    known = registered_entry(name)
    # `type` is used instead of `isinstance` to protect the names of the shapes dataset.
    if type(known) is not CocoDataset and (known is not None or _has_metadata(name)):
        raise UserError(
            f"The name '{name}' is already used for a dataset registered by Detectron2, this "
            f"project or your own code; expected an unused name for {dataset.json_file}. Choose a "
            "different name."
        )
    if isinstance(known, CocoDataset) and known == dataset:
        known.refresh(segmentations=segmentations)
        known.order_classes(())
        return
    dataset.refresh(segmentations=segmentations)
    DatasetCatalog[name] = dataset


def register_datasets(
    entries: Sequence[Sequence[str]], *, segmentations: bool = False, upright: bool = True
) -> list[str]:
    """Register the datasets listed in `DATASETS.REGISTER`, and the shapes dataset.

    Args:
        entries: List of `[name, annotation file or folder, image folder]` entries. The image folder
            may be omitted. `~` and `$VARS` in paths are expanded. Relative paths are looked
            up in the working directory, then in `$DETECTRON2_DATASETS`.
        segmentations: See :func:`register_coco_dataset`.
        upright: See :func:`register_coco_dataset`.

    Returns:
        The names of the datasets in `entries`.

    Raises:
        UserError: If an entry is malformed, a file or folder is invalid, or a name is already used
            for a different dataset.
    """
    register_shapes()
    if not isinstance(entries, list | tuple):
        raise UserError(
            f"DATASETS.REGISTER is {entries!r}; expected a list of datasets, such as "
            f"[{ENTRY_FORM}]. Correct the config."
        )
    paths: dict[str, list[str]] = {}
    for index, entry in enumerate(entries):
        strings = isinstance(entry, list | tuple) and all(isinstance(part, str) for part in entry)
        if not strings or len(entry) not in _PARTS or not all(part.strip() for part in entry):
            raise UserError(
                f"DATASETS.REGISTER[{index}] is {entry!r}; expected a name, an annotation file and "
                f"an image folder, such as {ENTRY_FORM}. A single dataset must also be in a list: "
                f"[{ENTRY_FORM}]. Correct the config."
            )
        name, expanded = entry[0], [_expand(path) for path in entry[1:]]
        if paths.setdefault(name, expanded) != expanded:
            raise UserError(
                f"DATASETS.REGISTER lists '{name}' twice, with {paths[name]} and {expanded}; "
                "expected unique names. Rename one of the datasets."
            )
    for name, expanded in paths.items():
        register_coco_dataset(name, *expanded, segmentations=segmentations, upright=upright)
    return list(paths)


def register_shapes() -> None:
    """Register the datasets `shapes_{train,val,tiny}` without reading their files.

    The files are expected in `$DETECTRON2_DATASETS/shapes`; the environment variable is read on
    each call. Repeated calls are allowed.
    """
    # This is also the root of Detectron2's own datasets.
    root = os.path.join(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")), "shapes")
    for split in SHAPE_SPLITS:
        name = f"shapes_{split}"
        json_file = os.path.join(root, "annotations", f"instances_{split}.json")
        dataset = ShapesDataset(name, json_file, os.path.join(root, split))
        known = registered_entry(name)
        if known == dataset:
            continue
        if type(known) is not ShapesDataset and (known is not None or _has_metadata(name)):
            # Not an error, because most runs do not use the shapes dataset.
            logger.warning(
                "'%s' is already registered by other code; keeping the existing registration", name
            )
            continue
        id_map = {i + 1: i for i in range(len(SHAPE_CLASSES))}
        dataset.publish(SHAPE_CLASSES, id_map, SHAPE_KEYPOINTS)
        DatasetCatalog[name] = dataset


def registered_entry(name: str) -> object | None:
    """Return the catalog entry of a dataset without loading it; None if it is not registered."""
    if name not in DatasetCatalog:
        return None
    # `.get` is not used because Detectron2's catalog overrides it to load the dataset.
    return DatasetCatalog[name]


def flip_pairs(keypoints: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs of left and right keypoints that must be swapped after a horizontal flip."""
    pairs = []
    for name in keypoints:
        for left, right in _SIDES.items():
            other = name.replace(left, right)
            if other != name and other in keypoints:
                pairs.append((name, other))
    return pairs


def _has_metadata(name: str) -> bool:
    # For an unknown dataset, `MetadataCatalog.get` creates metadata that contains only the name.
    return name in MetadataCatalog and len(vars(MetadataCatalog.get(name))) > 1


def _expand(path: str) -> str:
    expanded = os.path.abspath(os.path.expandvars(os.path.expanduser(path)))
    unset = re.search(r"\$(\w+|\{\w+\})", expanded)
    if unset and not annotations_exist(expanded):
        raise UserError(
            f"DATASETS.REGISTER contains the path {path}, but the environment variable {unset[0]} "
            "is not set. Set the variable, or use the full path."
        )
    root = os.environ.get("DETECTRON2_DATASETS", "datasets")
    below = os.path.abspath(os.path.join(os.path.expanduser(root), path))
    return below if not annotations_exist(expanded) and annotations_exist(below) else expanded
