"""Predictors, which apply a model to images in batches; see :func:`senet_transfer.load`."""

import itertools
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.data.transforms import ResizeShortestEdge, ResizeTransform, Transform
from detectron2.structures import Instances
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from senet_transfer.data.build import eval_transform
from senet_transfer.data.detection.fast_images import ChannelResizeShortestEdge
from senet_transfer.data.images.decode import Reading
from senet_transfer.data.images.transforms import EvalTransform
from senet_transfer.data.reading import reading_of
from senet_transfer.data.workers import init_worker
from senet_transfer.engine.inference.augmentation import with_augmentation
from senet_transfer.engine.model_from import LoadedModel
from senet_transfer.engine.predictor.annotations import objects, segments
from senet_transfer.engine.predictor.inputs import Photo, find_photos, is_address, is_video
from senet_transfer.engine.predictor.predictions import Classes, Classification, Detections
from senet_transfer.engine.predictor.video import Video
from senet_transfer.errors import UserError
from senet_transfer.evaluation.classification_evaluator import TOP
from senet_transfer.preprocessing import channels_of

logger = logging.getLogger(__name__)

Result = TypeVar("Result", Classification, Detections)


class _ImagesAsIndices(Dataset):
    """Dataset whose indices are the images themselves.

    A data loader can then send images from an iterable to its workers without reading the whole
    iterable first.
    """

    def __getitem__(self, photo: Photo) -> Photo:
        return photo


@dataclass(frozen=True)
class Prepared:
    """Image that has been prepared for the model.

    Attributes:
        photo: The image.
        tensor: The model's input, uint8 ``(C, H, W)``, or ``(10, C, H, W)`` for ten crops of the
            image. None if the image can't be read.
        size: Height and width of the image.
        problem: The error that occurred while reading the image, or None.
    """

    photo: Photo
    tensor: Tensor | None = None
    size: tuple[int, int] = (0, 0)
    problem: UserError | None = None


class Predictor(ABC, Generic[Result]):
    """Callable that takes images and returns their classes or the objects in them.

    Attributes:
        classes: The classes of the model.
        device: The model's device.
        reading: Settings for reading images.
        half: True for half precision: float16 on a GPU, bfloat16 on the CPU.
        batch_size: The number of images per batch.
    """

    def __init__(
        self,
        classes: Classes,
        *,
        device: torch.device | str = "cpu",
        reading: Reading,
        half: bool = False,
        batch_size: int = 1,
    ):
        self.classes = classes
        self.device = torch.device(device)
        self.reading = reading
        self.half = half
        self.batch_size = batch_size

    def __call__(self, images: Any, *, batch_size: int = 0) -> Any:
        """Run inference on images.

        Args:
            images: A path or HTTP(S) URL, a PIL image, RGB or grayscale pixels (an array
                ``(H, W, 3)`` or ``(H, W)``, or a tensor ``(C, H, W)``, uint8), or a list of these.
                Alternatively, a folder, a glob pattern, a ``.txt`` list of paths, or a video.
            batch_size: The number of images per batch. If 0, the predictor's batch size is used.

        Returns:
            The result for a single image, or a list with one result per image.

        Raises:
            UserError: If an image can't be read.
        """
        found = list(self.stream(images, batch_size=batch_size))
        return found[0] if _is_single(images) else found

    def stream(
        self,
        images: Any,
        *,
        batch_size: int = 0,
        workers: int = 0,
        broken: list[str] | None = None,
    ) -> Iterator[Result]:
        """Yield the results one by one, without keeping all images in memory.

        Args:
            images: Images as in :meth:`__call__`, or any iterable of them.
            batch_size: The number of images per batch. If 0, the predictor's batch size is used.
            workers: The number of processes that read and resize images. Videos are read in the
                main process only.
            broken: A list to which a message is appended for each image that can't be read or
                processed. If None, the first such image raises an error.
        """
        size = batch_size or self.batch_size
        if size < 1 or workers < 0:
            raise UserError(
                f"batch_size is {size} and workers is {workers}; expected at least 1 image per "
                "batch, and a non-negative number of workers."
            )
        if isinstance(images, str | os.PathLike) and is_video(os.fspath(images)):
            workers = 0
        photos = (replace(photo, reading=self.reading) for photo in _photos(images))
        for batch in self._batches(photos, size, workers):
            if broken is not None:
                broken += [str(item.problem) for item in batch if item.problem]
                batch = [item for item in batch if not item.problem]
            yield from self._results(batch, broken)

    def _batches(
        self, photos: Iterator[Photo], size: int, workers: int
    ) -> Iterator[list[Prepared]]:
        batches = iter(lambda: list(itertools.islice(photos, size)), [])
        if workers:
            yield from DataLoader(
                _ImagesAsIndices(),
                batch_sampler=batches,
                num_workers=workers,
                collate_fn=self._prepared_batch,
                worker_init_fn=init_worker,
                # A new iterator draws a random number. It must not change PyTorch's global
                # generator.
                generator=torch.Generator(),
            )
            return
        yield from map(self._prepared_batch, batches)

    def _prepared_batch(self, photos: list[Photo]) -> list[Prepared]:
        return [self._prepared(photo) for photo in photos]

    def _prepared(self, photo: Photo) -> Prepared:
        try:
            return self.prepare(photo)
        except UserError as error:
            return Prepared(photo, problem=error)
        except Exception as error:  # such as insufficient memory
            reason = describe_problem(photo.name, "no prediction", error)
            return Prepared(photo, problem=UserError(reason))

    def _results(self, batch: list[Prepared], broken: list[str] | None) -> Iterator[Result]:
        """Yield the results for a batch.

        If the batch fails and ``broken`` is None, raise the error. If ``broken`` is a list, process
        the images one by one, and append a message for each image that fails.
        """
        try:
            for item in batch:
                if item.problem:
                    raise item.problem
            with torch.no_grad(), self._precision():
                found = self.predict(batch) if batch else []
        # A failed prediction must not affect the other images.
        except Exception as error:
            if broken is None:
                raise
            if len(batch) > 1:
                for item in batch:
                    yield from self._results([item], broken)
            else:
                broken.append(describe_problem(batch[0].photo.name, "no prediction", error))
            return
        yield from found

    def _precision(self) -> AbstractContextManager:
        kind = torch.bfloat16 if self.device.type == "cpu" else torch.float16
        return torch.autocast(self.device.type, kind, enabled=self.half)

    @abstractmethod
    def prepare(self, photo: Photo) -> Prepared:
        """Read and resize an image."""

    @abstractmethod
    def predict(self, batch: list[Prepared]) -> list[Result]:
        """Run the model on a batch of prepared images, and return one result per image."""


class ClassifierPredictor(Predictor[Classification]):
    """Predictor for image classification."""

    def __init__(
        self,
        run: Callable[[dict[str, Tensor]], Tensor],
        transform: EvalTransform,
        classes: Classes,
        *,
        top: int = TOP,
        **options: Any,
    ):
        """
        Args:
            run: A function that returns logits ``(N, C)`` for a batch ``{"image": images}``, uint8
                RGB ``(N, 3, H, W)``.
            transform: The evaluation transform of the model.
            classes: The classes of the model.
            top: The number of most probable classes to include in a result.
            options: Further arguments for :class:`Predictor`.
        """
        super().__init__(classes, reading=transform.reading, **options)
        self.run, self.transform, self.top = run, transform, top

    @classmethod
    def of(cls, loaded: LoadedModel, **options: Any) -> "ClassifierPredictor":
        """Return the predictor for a loaded classifier."""
        count = loaded.model.linear.out_features
        names = loaded.classes or [f"class {index}" for index in range(count)]
        transform = eval_transform(loaded.cfg)
        device = loaded.cfg.MODEL.DEVICE
        return cls(loaded.model, transform, Classes(tuple(names)), device=device, **options)

    def prepare(self, photo: Photo) -> Prepared:
        if self.reading.channels:
            return Prepared(photo, self.transform.view_of_channels(photo.bands()))
        return Prepared(photo, self.transform.view(photo.pillow()))

    def predict(self, batch: list[Prepared]) -> list[Classification]:
        images = torch.stack([item.tensor for item in batch if item.tensor is not None])
        logits = self.run({"image": images}).float()
        if not logits.isfinite().all():
            raise UserError(
                f"The logits of {batch[0].photo.name}, or of another image in its batch, are not "
                "finite. Either training diverged, or half precision is not sufficient for the "
                "model. Disable half precision if it is enabled, or use different weights."
            )
        rows = logits.softmax(1).cpu().numpy()
        return [
            Classification.of(item.photo, row, self.classes, self.top)
            for item, row in zip(batch, rows, strict=True)
        ]


class DetectorPredictor(Predictor[Detections]):
    """Predictor for object detection and segmentation."""

    def __init__(
        self,
        run: Callable[[list[dict[str, Any]]], list[dict[str, Any]]],
        resize: ResizeShortestEdge,
        classes: Classes,
        *,
        input_format: str = "BGR",
        threshold: float = 0.5,
        **options: Any,
    ):
        """
        Args:
            run: A function with the interface of Detectron2's meta-architectures.
            resize: The transform that resizes images.
            classes: The classes of the model.
            input_format: The model's channel order, such as "BGR"; "L" for grayscale images; or
                a format such as "C5" for images with 5 channels.
            threshold: The minimum score of the objects to include in a result.
            options: Further arguments for :class:`Predictor`.
        """
        super().__init__(classes, **options)
        if not 0 <= threshold <= 1:
            raise UserError(f"The threshold is {threshold}; expected a score between 0 and 1.")
        self.run, self.resize = run, resize
        self.input_format, self.threshold = input_format, threshold

    @classmethod
    def of(cls, loaded: LoadedModel, **options: Any) -> "DetectorPredictor":
        """Return the predictor for a loaded detector or segmentation model.

        The predictor uses test-time augmentation if ``TEST.AUG`` is enabled.
        """
        cfg = loaded.cfg
        model = with_augmentation(cfg, loaded.model) if cfg.TEST.AUG.ENABLED else loaded.model
        side = cfg.INPUT.MIN_SIZE_TEST
        resize = ResizeChannels if channels_of(cfg.INPUT.FORMAT) else Resize
        return cls(
            model,
            resize([side, side], cfg.INPUT.MAX_SIZE_TEST),
            Classes.of(cfg),
            input_format=cfg.INPUT.FORMAT,
            reading=reading_of(cfg),
            device=cfg.MODEL.DEVICE,
            **options,
        )

    def prepare(self, photo: Photo) -> Prepared:
        pixels = photo.bands() if self.reading.channels else photo.pixels()
        size = (pixels.shape[0], pixels.shape[1])
        if self.input_format != "RGB" and not self.reading.channels:
            pixels = convert_PIL_to_numpy(Image.fromarray(pixels), self.input_format)
        pixels = self.resize.get_transform(pixels).apply_image(pixels)
        tensor = torch.as_tensor(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        return Prepared(photo, tensor, size)

    def predict(self, batch: list[Prepared]) -> list[Detections]:
        inputs = [
            {"image": item.tensor, "height": item.size[0], "width": item.size[1]} for item in batch
        ]
        results = []
        for item, output in zip(batch, self.run(inputs), strict=True):
            found = objects(output, self.threshold)
            instances = Instances(item.size) if found is None else found
            results.append(Detections(item.photo, instances, self.classes, segments(output)))
        return results


class Resize(ResizeShortestEdge):
    """Detectron2's ``ResizeShortestEdge``, but the result is at least 1 pixel high and wide.

    Very elongated images would otherwise be resized to a height or width of 0.
    """

    def get_transform(self, image: np.ndarray) -> Transform:
        """Return the transform that resizes an image ``(H, W, C)``."""
        found = super().get_transform(image)
        if not isinstance(found, ResizeTransform) or min(found.new_h, found.new_w) > 0:
            return found
        new_h, new_w = max(found.new_h, 1), max(found.new_w, 1)
        return type(found)(found.h, found.w, new_h, new_w, found.interp)


class ResizeChannels(Resize, ChannelResizeShortestEdge):
    """Same as :class:`Resize`, but for images with any number of channels."""


def describe_problem(path: str, lacks: str, error: Exception) -> str:
    """Return an error message for an image, and log the traceback of an unexpected error."""
    if isinstance(error, UserError):
        return str(error)
    logger.info("The traceback for %s:", path, exc_info=error)
    return f"{path} has {lacks}: {type(error).__name__}: {error or 'no message'}"


def _is_single(images: Any) -> bool:
    """Return whether a predictor's argument is a single image."""
    if isinstance(images, str | os.PathLike):
        name = os.fspath(images)
        return not is_video(name) and (is_address(name) or _is_file(name))
    if isinstance(images, np.ndarray | Tensor):
        return images.ndim < 4
    return isinstance(images, Image.Image | Photo)


def _is_file(name: str) -> bool:
    return os.path.isfile(name) and not name.lower().endswith(".txt")


def _photos(images: Any) -> Iterator[Photo]:
    """Yield the images given to a predictor."""
    if isinstance(images, str | os.PathLike):
        name = os.fspath(images)
        if is_video(name):
            with Video(name) as video:
                yield from video
        elif _is_single(name):
            yield Photo.of(name)
        else:
            yield from find_photos([name])
    elif isinstance(images, Iterable) and not _is_single(images):
        for index, image in enumerate(images):
            if isinstance(image, str | os.PathLike):
                yield from _photos(image)
            else:
                yield Photo.of(image, f"image {index}")
    else:
        yield Photo.of(images)
