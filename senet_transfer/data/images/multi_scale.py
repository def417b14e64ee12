"""Transforms for evaluation at several scales, with one crop, ten crops or whole images.

Each crop or resized whole image on which the network is evaluated is called a view.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from senet_transfer.data.images.channels import decode_channels
from senet_transfer.data.images.decode import decode_exact
from senet_transfer.data.images.transforms import EvalTransform
from senet_transfer.errors import UserError

CROPS = (1, 10)


@dataclass(frozen=True)
class MultiScaleTransform:
    """Transform that returns the crops or the resized copies of an image at several scales.

    Attributes:
        parts: One transform per scale.
        dense: If True, return the resized images without cropping them.
    """

    parts: tuple[EvalTransform, ...]
    dense: bool = False

    @property
    def output_shape(self) -> tuple[int, ...] | None:
        """Shape ``(V, C, crop, crop)`` of an image's V crops; None if ``dense`` is set."""
        if self.dense:
            return None
        shapes = [part.output_shape for part in self.parts]
        views = sum(shape[0] if len(shape) == 4 else 1 for shape in shapes)
        return (views, *shapes[0][-3:])

    def __call__(self, data: bytes) -> Any:
        """Decode an image, and return its crops or its resized copies for all scales.

        Returns:
            The crops as a tensor ``(V, C, crop, crop)``. If ``dense`` is set, the resized images
            as a list with one tensor ``(C, H, W)`` per scale. The dtype is uint8.

        Raises:
            BrokenImageError: If the image cannot be decoded.
        """
        first = self.parts[0]
        if first.reading.channels:
            pixels = decode_channels(data, first.reading)
            views = [part.view_of_channels(pixels) for part in self.parts]
        else:
            image = decode_exact(data, first.reading)
            views = [part.view(image) for part in self.parts]
        if self.dense:
            return views
        return torch.cat([view if view.ndim == 4 else view[None] for view in views])


class WholeImageTransform(EvalTransform):
    """Transform that resizes an image without cropping it."""

    def view(self, image: Image.Image) -> Tensor:
        """Return the resized image, uint8 ``(C, H, W)``."""
        return F.pil_to_tensor(self.resized(image))


def pack(images: Sequence[Sequence[Tensor]]) -> dict[str, Any]:
    """Flatten resized images of different sizes and concatenate them into one tensor.

    A worker process needs one file descriptor per tensor that it sends, so sending a single tensor
    avoids exceeding the limit on open files.

    Args:
        images: One list per image with the resized versions of the image, uint8 ``(C, H, W)``.

    Returns:
        Dictionary with ``image``, a one-dimensional uint8 tensor with the values of all resized
        images, and ``shapes``, with one list of shapes per image.
    """
    return {
        "image": torch.cat([view.flatten() for views in images for view in views]),
        "shapes": [[tuple(view.shape) for view in views] for views in images],
    }


@dataclass(frozen=True)
class ViewOptions:
    """Options that specify the crops or whole images to evaluate.

    The values of options that are not set are taken from the model's transform.

    Attributes:
        mode: Evaluation mode, one of ``EVAL_MODES``.
        resize: Size after resizing, in pixels.
        crop: Crop size in pixels.
        scales: Several sizes after resizing, in pixels, as an alternative to ``resize``.
        crops: Number of crops per scale: 1 for the centre; 10 for the four corners and the centre
            of the image and of its mirror image.
        dense: If True, the network is applied to whole resized images.
    """

    mode: str = ""
    resize: int | None = None
    crop: int | None = None
    scales: tuple[int, ...] = ()
    crops: int | None = None
    dense: bool = False

    def __post_init__(self) -> None:
        if self.scales and self.resize is not None:
            raise UserError("Both --scales and --resize are given. Remove one of them.")
        if min(self.scales, default=1) < 1 or len(set(self.scales)) < len(self.scales):
            raise UserError(
                f"--scales is {' '.join(map(str, self.scales))}; expected distinct sizes of at "
                "least 1 pixel."
            )
        if self.crops is not None and (self.crops not in CROPS or self.mode):
            raise UserError(
                f"--crops is {self.crops}, and --crop-mode is {self.mode or 'not given'}; --crops "
                "must be 1 or 10 and can't be combined with --crop-mode. Correct --crops, or "
                "remove one of the options."
            )
        if self.dense and (self.crops or self.crop is not None or self.mode == "ten_crop"):
            raise UserError(
                "--dense evaluates whole images, so it can't be combined with --crops, --crop or "
                "the crop mode ten_crop. Remove these options."
            )

    def transform(self, default: EvalTransform) -> EvalTransform | MultiScaleTransform:
        """Return the transform that produces the crops or whole images to evaluate.

        Args:
            default: The model's transform, which provides the values of options that are not set.

        Raises:
            UserError: If a crop is larger than a scale.
        """
        crop = default.crop if self.crop is None else self.crop
        scales = self.scales or (default.resize if self.resize is None else self.resize,)
        if self.scales and not self.dense and crop > min(scales):
            raise UserError(
                f"--scales contains {min(scales)}, but the crop is {crop} pixels; expected a scale "
                "at least as large as the crop. Remove this scale, or pass a smaller --crop."
            )
        mode = self.mode or default.mode
        if self.crops == 10:
            mode = "ten_crop"
        elif mode == "ten_crop" and (self.crops or self.dense):
            mode = "short_side"
        if not self.dense:
            parts = [replace(default, mode=mode, resize=scale, crop=crop) for scale in scales]
            return parts[0] if len(parts) == 1 else MultiScaleTransform(tuple(parts))
        options = {field.name: getattr(default, field.name) for field in fields(default)}
        whole = [
            WholeImageTransform(**{**options, "mode": mode, "resize": scale, "crop": scale})
            for scale in scales
        ]
        return MultiScaleTransform(tuple(whole), dense=True)


def views_record(transform: EvalTransform | MultiScaleTransform) -> dict[str, Any]:
    """Return the entries of the result file that describe the evaluated scales and crops."""
    dense = isinstance(transform, MultiScaleTransform) and transform.dense
    parts = transform.parts if isinstance(transform, MultiScaleTransform) else (transform,)
    crops = 10 if parts[0].mode == "ten_crop" else 1
    return {
        "scales": [part.resize for part in parts],
        "crops": "dense" if dense else crops,
        "view": asdict(parts[0]),
    }
