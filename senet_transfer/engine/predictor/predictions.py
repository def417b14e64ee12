"""Results of predictors: the classes of an image, or the objects in it."""

import base64
import functools
import html
import io
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.structures import Instances, RotatedBoxes
from PIL import Image

from senet_transfer.config.architectures import PROPOSALS, predicts
from senet_transfer.data.images.places365 import places365_classes
from senet_transfer.engine.inference.drawing import ClassNames, PredictionDrawing
from senet_transfer.engine.predictor.annotations import object_annotations, segment_annotations
from senet_transfer.engine.predictor.inputs import Photo

if TYPE_CHECKING:
    import supervision


@dataclass(frozen=True)
class Classes:
    """Names and ids of the classes that a model predicts.

    Attributes:
        things: Names of a classifier's classes, or of a detector's object classes.
        stuff: Names of the classes of a semantic segmentation.
        ids: COCO category ids of ``things``. If empty, the ids are 1 to N.
        keypoints: Names of an object's keypoints.
    """

    things: tuple[str, ...]
    stuff: tuple[str, ...] = ()
    ids: tuple[int, ...] = ()
    keypoints: tuple[str, ...] = ()

    @classmethod
    def of(cls, cfg: CfgNode) -> "Classes":
        """Return the classes in a detector's config."""
        if predicts(cfg) == {PROPOSALS}:
            return cls(("object",))
        data = cfg.DATASETS
        keypoints = tuple(data.KEYPOINTS) if cfg.MODEL.KEYPOINT_ON else ()
        return cls(
            tuple(data.CLASSES), tuple(data.STUFF_CLASSES), tuple(data.CATEGORY_IDS), keypoints
        )

    @functools.cached_property
    def drawn(self) -> ClassNames:
        """The class names and the fonts for drawing them."""
        return ClassNames.of(self.things, self.stuff)

    @functools.cached_property
    def outdoors(self) -> np.ndarray | None:
        """Bool array ``(C,)``, True for outdoor classes; None if any class isn't in Places365."""
        known = places365_classes()
        if not self.things or not known.keys() >= set(self.things):
            return None
        return np.array([known[name] for name in self.things])

    @functools.cached_property
    def categories(self) -> list[dict[str, Any]]:
        """The categories in COCO format: object classes, followed by segmentation classes."""
        ids = list(self.ids)
        if len(ids) != len(self.things):
            ids = list(range(1, len(self.things) + 1))
        first = max(ids, default=0) + 1
        ids += range(first, first + len(self.stuff))
        found: list[dict[str, Any]] = [
            {"id": id, "name": name} for id, name in zip(ids, self.things + self.stuff, strict=True)
        ]
        if self.keypoints:
            for category in found[: len(self.things)]:
                category |= {"keypoints": list(self.keypoints), "skeleton": []}
        return found


class _Shown(ABC):
    """Base class for results that notebooks display as an image with a caption."""

    photo: Photo

    @abstractmethod
    def plot(self) -> Image.Image:
        """Return the image with the results drawn on it."""

    def _repr_html_(self) -> str:
        stored = io.BytesIO()
        self.plot().save(stored, "JPEG", quality=90)
        data = base64.b64encode(stored.getvalue()).decode()
        return (
            f'<img src="data:image/jpeg;base64,{data}" style="max-width: 100%">'
            f"<div>{html.escape(repr(self))}</div>"
        )


@dataclass(frozen=True, eq=False, repr=False)
class Classification(_Shown):
    """Predicted classes of an image.

    Attributes:
        photo: The image.
        labels: Indices of the most probable classes, most probable first.
        names: Names of the most probable classes.
        scores: Probabilities of the most probable classes.
        probabilities: Probabilities of all classes, float32 ``(C,)``.
        classes: All classes of the model.
        outdoor: Probability of an outdoor scene: the sum of the probabilities of the outdoor
            classes. None if any class of the model is not in Places365.
    """

    photo: Photo
    labels: list[int]
    names: list[str]
    scores: list[float]
    probabilities: np.ndarray
    classes: Classes
    outdoor: float | None = None

    @classmethod
    def of(
        cls, photo: Photo, probabilities: np.ndarray, classes: Classes, top: int
    ) -> "Classification":
        """Return the ``top`` most probable classes of an image from the probabilities ``(C,)``."""
        best = np.argsort(-probabilities, kind="stable")[:top].tolist()
        outdoor = None
        if classes.outdoors is not None:
            outdoor = float(probabilities[classes.outdoors].sum())
        return cls(
            photo,
            best,
            [classes.things[label] for label in best],
            probabilities[best].tolist(),
            probabilities,
            classes,
            outdoor,
        )

    def __repr__(self) -> str:
        rows = [f"{n} {s:.1%}" for n, s in zip(self.names, self.scores, strict=True)]
        if self.outdoor is not None:
            rows.append(f"outdoors {self.outdoor:.1%}")
        return f"{self.photo.name}: {', '.join(rows)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the image's path and the names, indices and probabilities of the top classes."""
        rows = zip(self.names, self.labels, self.scores, strict=True)
        found: dict[str, Any] = {
            "file_name": self.photo.name,
            "top": [{"class": n, "label": k, "probability": score} for n, k, score in rows],
        }
        return found if self.outdoor is None else {**found, "outdoor": self.outdoor}

    def plot(self) -> Image.Image:
        """Return the image with the names and probabilities of its classes drawn on it."""
        drawing = PredictionDrawing(np.asarray(self.photo.pillow()), self.classes.drawn)
        drawing.draw_classes(self.labels, self.scores)
        return Image.fromarray(drawing.image)

    def to_supervision(self) -> "supervision.Classifications":
        """Return the probabilities of all classes as ``supervision.Classifications``."""
        from supervision import Classifications

        return Classifications(np.arange(len(self.probabilities)), confidence=self.probabilities)


@dataclass(frozen=True, eq=False, repr=False)
class Detections(_Shown):
    """Objects in an image and, for a segmentation model, the mask of each class.

    Attributes:
        photo: The image.
        instances: The objects as Detectron2's ``Instances``, on the CPU.
        classes: The classes of the model.
        segments: Masks ``(H, W)`` of a semantic segmentation, keyed by class index.
    """

    photo: Photo
    instances: Instances
    classes: Classes
    segments: dict[int, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.instances) if self.instances.get_fields() else 0

    @property
    def boxes(self) -> np.ndarray:
        """Boxes, float32 ``(N, 4)``: x1, y1, x2, y2 in pixel coordinates.

        The coordinates refer to the image as the model reads it. ``INPUT.EXIF`` determines whether
        the EXIF orientation is applied. Rotated boxes are ``(N, 5)``; see
        :func:`~.annotations.object_annotations`.
        """
        if not len(self):
            return np.zeros((0, 4), np.float32)
        return self.instances.pred_boxes.tensor.numpy()

    @property
    def scores(self) -> np.ndarray:
        """Scores in [0, 1], float32 ``(N,)``, in decreasing order."""
        return self.instances.scores.numpy() if len(self) else np.zeros(0, np.float32)

    @property
    def labels(self) -> np.ndarray:
        """Class indices, int64 ``(N,)``."""
        return self.instances.pred_classes.numpy() if len(self) else np.zeros(0, np.int64)

    @property
    def names(self) -> list[str]:
        """Class name of each object."""
        return [self.classes.things[label] for label in self.labels]

    @property
    def masks(self) -> np.ndarray | None:
        """Masks, bool ``(N, H, W)``; None if the model does not predict masks."""
        found = self.instances
        return found.pred_masks.numpy() if found.has("pred_masks") else None

    @property
    def keypoints(self) -> np.ndarray | None:
        """Keypoints, float32 ``(N, K, 3)``, each with the values x, y and score.

        None if the model does not predict keypoints.
        """
        found = self.instances
        return found.pred_keypoints.numpy() if found.has("pred_keypoints") else None

    def __repr__(self) -> str:
        rows = [f"{n} {s:.0%}" for n, s in zip(self.names, self.scores, strict=True)]
        rows += [self.classes.stuff[index] for index in self.segments]
        count = f"{len(self)} object{'s' * (len(self) != 1)}"
        return f"{self.photo.name}: {count}" + (f": {', '.join(rows)}" if rows else "")

    def to_dict(self) -> dict[str, Any]:
        """Return a dict with the image path, the image size and the objects.

        Each object contains its class name, class index, score and box. If the model predicts masks
        or keypoints, each object also contains ``segmentation`` or ``keypoints`` in COCO format.
        """
        height, width = self.instances.image_size
        objects = []
        rows = zip(self.names, self.labels.tolist(), self.scores.tolist(), self.boxes, strict=True)
        for (name, label, score, box), coco in zip(rows, self.to_coco(), strict=False):
            entry = {"class": name, "label": label, "score": score, "box": box.tolist()}
            entry |= {key: coco[key] for key in ("segmentation", "keypoints") if key in coco}
            objects.append(entry)
        return {
            "file_name": self.photo.name,
            "height": height,
            "width": width,
            "objects": objects,
        }

    def to_coco(self, image_id: int = 1) -> list[dict[str, Any]]:
        """Return the objects and segments as COCO annotations.

        The category ids are those in ``classes.categories``.
        """
        found = object_annotations(self.instances, image_id) if len(self) else []
        found += segment_annotations(self.segments, image_id, len(self.classes.things))
        for annotation in found:
            index = annotation["category_id"]
            annotation["category_id"] = self.classes.categories[index]["id"]
        return found

    def to_supervision(self) -> "supervision.Detections":
        """Return the objects as ``supervision.Detections``. Rotated boxes are not supported."""
        from supervision import Detections as Supervision

        if len(self) and isinstance(self.instances.pred_boxes, RotatedBoxes):
            raise ValueError(
                "supervision.Detections does not support rotated boxes. Use to_coco() or to_dict()."
            )
        return Supervision(
            xyxy=self.boxes.copy(),
            mask=self.masks,
            confidence=self.scores.copy(),
            class_id=self.labels.copy(),
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def plot(self) -> Image.Image:
        """Return the image with boxes, masks, keypoints, class names and scores drawn on it."""
        drawing = PredictionDrawing(self.photo.pixels(), self.classes.drawn)
        drawing.draw_segments(self.segments)
        if len(self):
            drawing.draw_instances(self.instances)
        return Image.fromarray(drawing.image)
