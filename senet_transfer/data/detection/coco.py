"""Detection data sets in COCO's format, registered with Detectron2 by name and two paths.

Differs from Detectron2's `register_coco_instances`: the annotation file is checked when it is
registered and whenever it has changed since; registering twice is harmless; the class names are
known at once.
"""

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from senet_transfer.data.detection.annotation_checks import CocoSummary, read_coco_summary
from senet_transfer.data.shapes.render import SHAPE_CLASSES, SHAPE_SPLITS
from senet_transfer.errors import UserError

ENTRY_FORM = '["my_train", "path/to/train.json", "path/to/images"]'

logger = logging.getLogger(__name__)


@dataclass
class CocoDataset:
    """What Detectron2's catalog holds for a data set of this project; calling it loads it.

    The catalog's entry is also the record of what was registered, so that there is no second list
    to keep in step with it.

    Attributes:
        name: its name in the catalogs.
        json_file: annotation file in COCO's format.
        image_dir: folder that the file's `file_name`s are relative to.
        allow_empty: whether a file without objects to find is accepted.
        summary: what the file held when it was last read; None before that.
    """

    name: str
    json_file: str
    image_dir: str
    allow_empty: bool = False
    summary: CocoSummary | None = field(default=None, compare=False, repr=False)
    _state: tuple[int, int] | None = field(default=None, compare=False, repr=False)

    def __call__(self) -> list[dict]:
        """Loads the data set as Detectron2's own loader does.

        Raises:
            UserError: if the annotation file has changed and is no longer valid.
        """
        self.refresh()
        return load_coco_json(self.json_file, self.image_dir, self.name)

    def refresh(self) -> None:
        """Reads and checks the annotation file, unless it is the one that was read before.

        Raises:
            UserError: if it is not valid. The metadata are then left as they were.
        """
        state = _file_state(self.json_file)
        if state is not None and state == self._state:
            return
        summary = read_coco_summary(self.json_file, self.image_dir, allow_empty=self.allow_empty)
        logger.info(
            "Data set '%s': %d images, %d annotations (%d crowd), %d classes",
            self.name,
            summary.num_images,
            summary.num_annotations,
            summary.num_crowd,
            len(summary.classes),
        )
        for warning in summary.warnings:
            logger.warning(warning)
        self.summary, self._state = summary, state
        self.publish(summary.classes, summary.id_map)

    def publish(self, classes: Sequence[str], id_map: dict[int, int]) -> None:
        """Makes the catalog's metadata say this, whatever they said before.

        `Metadata` itself refuses to change a value, which a file that has changed requires. The
        object stays the same one, as evaluators and visualisers hold on to it.
        """
        vars(MetadataCatalog.get(self.name)).update(
            json_file=self.json_file,
            image_root=self.image_dir,
            evaluator_type="coco",
            thing_classes=list(classes),
            thing_dataset_id_to_contiguous_id=dict(id_map),
        )


class ShapesDataset(CocoDataset):
    """A split of the rendered shapes, which may not be on disk yet."""

    def refresh(self) -> None:
        if not os.path.exists(self.json_file):
            raise UserError(
                f"Data set '{self.name}' has not been made: {os.path.abspath(self.json_file)} does "
                "not exist. Run `python datasets/prepare_shapes.py`, which takes some seconds "
                "(`make demo` does so too)."
            )
        super().refresh()


def register_coco_dataset(
    name: str,
    json_file: str | os.PathLike,
    image_dir: str | os.PathLike,
    *,
    allow_empty: bool = False,
) -> None:
    """Checks a data set in COCO's format and registers it with Detectron2.

    Registering the same again does nothing, and the same name with other paths replaces the
    earlier registration.

    Args:
        name: what `DATASETS.TRAIN` and `DATASETS.TEST` will call it.
        json_file: annotation file in COCO's instances format.
        image_dir: folder that the file's `file_name`s are relative to.
        allow_empty: accept a file without objects to find, as for a test set whose ground truth
            is not public.

    Raises:
        UserError: if the file or the folder is not as it should be, or the name is taken by
            somebody else. What was registered before then stays as it was.
    """
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"A data set's name must be some text; found {name!r}. Give it a name.")
    dataset = CocoDataset(name, os.path.abspath(json_file), os.path.abspath(image_dir), allow_empty)
    known = registered_entry(name)
    # `type`, not `isinstance`: the shapes keep their names.
    if type(known) is not CocoDataset and (known is not None or _has_metadata(name)):
        raise UserError(
            f"The name '{name}' belongs to a data set that is registered already, by Detectron2, "
            f"by this project or by your own code; expected a free name for {dataset.json_file}. "
            "Choose another."
        )
    if known == dataset:
        known.refresh()
        return
    dataset.refresh()
    DatasetCatalog[name] = dataset


def register_datasets(entries: Sequence[Sequence[str]]) -> list[str]:
    """Register the data sets that the config key `DATASETS.REGISTER` lists, and the shapes.

    Args:
        entries: `[name, annotation file, image folder]` each. In paths, `~` and `$VARS` are
            expanded; what is relative is so to the current folder.

    Returns:
        The names in `entries`.

    Raises:
        UserError: if an entry has another form, or as `register_coco_dataset` does.
    """
    register_shapes()
    if not isinstance(entries, list | tuple):
        raise UserError(
            f"DATASETS.REGISTER is {entries!r}; expected a list of data sets, such as "
            f"[{ENTRY_FORM}]. Correct the config."
        )
    paths: dict[str, tuple[str, str]] = {}
    for index, entry in enumerate(entries):
        strings = isinstance(entry, list | tuple) and all(isinstance(part, str) for part in entry)
        if not strings or len(entry) != 3 or not all(part.strip() for part in entry):
            raise UserError(
                f"DATASETS.REGISTER[{index}] is {entry!r}; expected a name, an annotation file and "
                f"an image folder, such as {ENTRY_FORM}. A single data set is in a list, too: "
                f"[{ENTRY_FORM}]. Correct the config."
            )
        name, json_file, image_dir = entry
        expanded = _expand(json_file), _expand(image_dir)
        if paths.setdefault(name, expanded) != expanded:
            raise UserError(
                f"DATASETS.REGISTER lists '{name}' twice, with {paths[name]} and {expanded}; "
                "expected a name of its own for each data set. Rename one."
            )
    for name, (json_file, image_dir) in paths.items():
        register_coco_dataset(name, json_file, image_dir)
    return list(paths)


def register_shapes() -> None:
    """Registers `shapes_{train,val,tiny}`, without reading a file.

    Their place is `$DETECTRON2_DATASETS/shapes`, looked up at each call. Repeating it is harmless.
    """
    # As Detectron2 looks it up, so that all data are under one root.
    root = os.path.join(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")), "shapes")
    for split in SHAPE_SPLITS:
        name = f"shapes_{split}"
        json_file = os.path.join(root, "annotations", f"instances_{split}.json")
        dataset = ShapesDataset(name, json_file, os.path.join(root, split))
        known = registered_entry(name)
        if known == dataset:
            continue
        if type(known) is not ShapesDataset and (known is not None or _has_metadata(name)):
            # No other run may fail because of somebody's choice of a name.
            logger.warning("'%s' is registered already, not by this project; left as it is", name)
            continue
        dataset.publish(SHAPE_CLASSES, {i + 1: i for i in range(len(SHAPE_CLASSES))})
        DatasetCatalog[name] = dataset


def registered_entry(name: str) -> object | None:
    """What the catalog holds for `name`, without loading it; None if the name is unknown."""
    if name not in DatasetCatalog:
        return None
    # Not `.get`: Detectron2's catalog overrides that to load the data set.
    return DatasetCatalog[name]


def _has_metadata(name: str) -> bool:
    # Asking for a name creates metadata that hold the name alone.
    return name in MetadataCatalog and len(vars(MetadataCatalog.get(name))) > 1


def _file_state(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def _expand(path: str) -> str:
    expanded = os.path.abspath(os.path.expandvars(os.path.expanduser(path)))
    unset = re.search(r"\$(\w+|\{\w+\})", expanded)
    if unset and not os.path.exists(expanded):
        raise UserError(
            f"DATASETS.REGISTER has the path {path}, but the environment variable {unset[0]} is "
            "not set. Set it, or write the path out."
        )
    return expanded
