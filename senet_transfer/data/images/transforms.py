"""Transforms that convert encoded images to square network inputs.

All outputs are uint8; the model normalises them on its device.
"""

import hashlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from senet_transfer.data.images.channels import decode_channels
from senet_transfer.data.images.decode import (
    AS_STORED,
    SIDEWAYS,
    Reading,
    decode_exact,
    decode_fast,
    jpeg_orientation,
    jpeg_size,
)
from senet_transfer.errors import UserError

EVAL_MODES = ("short_side", "squash", "ten_crop")


def sample_rng(seed: int, epoch: int, key: str) -> random.Random:
    """Return a random generator that depends only on the seed, the epoch and the sample key."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{key}".encode(), digest_size=16).digest()
    return random.Random(int.from_bytes(digest, "little"))


@dataclass(frozen=True)
class TrainTransform:
    """Random resized crop with a random horizontal flip.

    Follows Szegedy et al. 2015. Crops are sampled as in torchvision's RandomResizedCrop.

    Attributes:
        size: Side length of the output, in pixels.
        scale: Minimum and maximum area of the crop, as fractions of the image area.
        ratio: Minimum and maximum aspect ratio (width / height) of the crop.
        flip: Probability of a horizontal flip.
        interpolation: Antialiased interpolation, "bilinear" or "bicubic".
        draft: Whether to decode JPEG images at 1/2, 1/4 or 1/8 of their size if the crop is still
            at least as large as the output. This is faster for large images, but changes the
            pixels.
        reading: Settings for reading images. Images are converted to RGB unless these settings
            specify a number of channels.
        augment: Additional augmentation of the flipped crop, which uses PyTorch's global generator;
            see :func:`.build_augmentation`.
    """

    size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    interpolation: str = "bilinear"
    draft: bool = False
    reading: Reading = AS_STORED
    augment: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        pairs = len(self.scale) == len(self.ratio) == 2
        if (
            self.size < 1
            or not pairs
            or not 0 < self.scale[0] <= self.scale[1] <= 1
            or not 0 < self.ratio[0] <= self.ratio[1]
        ):
            raise UserError(
                f"Invalid crop: size={self.size}, scale={self.scale}, ratio={self.ratio}; "
                "expected a size of at least 1, and (minimum, maximum) pairs for scale (0 < scale "
                "<= 1) and ratio (ratio > 0)."
            )
        _interpolation(self.interpolation)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape `(C, size, size)` of the output."""
        return (self.reading.channels or 3, self.size, self.size)

    def __call__(self, data: bytes, rng: random.Random) -> Tensor:
        """Return a random crop of an encoded image, uint8 `(C, size, size)`.

        Raises:
            BrokenImageError: If the image cannot be decoded.
        """
        pixels, (top, left, height, width) = self._decoded(data, rng)
        # PyTorch resizes contiguous channels-last images 1.5 times as fast as other layouts.
        crop = torch.from_numpy(pixels[top : top + height, left : left + width].copy())
        square = F.resize(
            crop.permute(2, 0, 1)[None],
            [self.size, self.size],
            interpolation=_interpolation(self.interpolation),
            antialias=True,
        )
        image = square[0].flip(-1) if rng.random() < self.flip else square[0]
        if self.augment is None:
            return image
        # Seeding this generator is faster than torch.manual_seed, and does not affect GPUs.
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(rng.getrandbits(63))
            return self.augment(image)

    def _decoded(
        self, data: bytes, rng: random.Random
    ) -> tuple[np.ndarray, tuple[int, int, int, int]]:
        """Return the decoded pixels (H, W, C) and the crop region (top, left, height, width)."""
        size = jpeg_size(data) if self.draft and not self.reading.channels else None
        if size is None:
            if self.reading.channels:
                pixels = decode_channels(data, self.reading)
            else:
                pixels = decode_fast(data, reading=self.reading)
            full_height, full_width = pixels.shape[:2]
            return pixels, self.region(full_height, full_width, rng)
        if self.reading.upright and jpeg_orientation(data) in SIDEWAYS:
            size = size[::-1]
        top, left, height, width = self.region(*size, rng)
        least = math.ceil(min(size) * self.size / min(height, width))
        pixels = decode_fast(data, least, self.reading)
        down, right = (found / full for found, full in zip(pixels.shape, size, strict=False))
        return pixels, (
            math.floor(top * down),
            math.floor(left * right),
            math.ceil(height * down),
            math.ceil(width * right),
        )

    def region(self, height: int, width: int, rng: random.Random) -> tuple[int, int, int, int]:
        """Sample a crop region and return its top, left, height and width."""
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(10):
            area = height * width * rng.uniform(*self.scale)
            aspect = math.exp(rng.uniform(low, high))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return (
                    int(rng.random() * (height - h + 1)),
                    int(rng.random() * (width - w + 1)),
                    h,
                    w,
                )
        # A very elongated image may have no valid region. Use the largest central region with a
        # valid ratio.
        w = min(width, max(1, round(height * self.ratio[1])))
        h = min(height, max(1, round(width / self.ratio[0])))
        return (height - h) // 2, (width - w) // 2, h, w


@dataclass(frozen=True)
class EvalTransform:
    """Deterministic resize and crop for evaluation.

    Images are decoded and resized with Pillow. Resizing tensors instead would change pixel values
    by up to 1, which changes the logits in the third significant digit.

    Attributes:
        mode: "short_side" resizes the short side to `resize` and crops the centre; "squash" resizes
            both sides to `resize` and crops the centre; "ten_crop" resizes the short side to
            `resize` and crops the four corners and the centre of the image and of its mirror image.
        resize: Side length after resizing, in pixels.
        crop: Side length of the crop, in pixels.
        interpolation: Interpolation mode, "bilinear" or "bicubic".
        reading: Settings for reading images. Images are converted to RGB unless these settings
            specify a number of channels.
    """

    mode: str = "short_side"
    resize: int = 256
    crop: int = 224
    interpolation: str = "bilinear"
    reading: Reading = AS_STORED

    def __post_init__(self) -> None:
        if self.mode not in EVAL_MODES or not 0 < self.crop <= self.resize:
            raise UserError(
                f"Invalid evaluation transform: mode={self.mode!r}, resize={self.resize}, "
                f"crop={self.crop}; expected one of the modes {', '.join(EVAL_MODES)} and a crop "
                "no larger than resize."
            )
        _interpolation(self.interpolation)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the output, `(C, crop, crop)` or, for "ten_crop", `(10, C, crop, crop)`."""
        shape = (self.reading.channels or 3, self.crop, self.crop)
        return (10, *shape) if self.mode == "ten_crop" else shape

    def __call__(self, data: bytes, rng: random.Random | None = None) -> Tensor:
        """Decode, resize and crop an image.

        Returns:
            The crop, uint8 `(C, crop, crop)`, or ten crops `(10, C, crop, crop)` for the mode
            "ten_crop".

        Raises:
            BrokenImageError: If the image cannot be decoded.
        """
        if self.reading.channels:
            return self.view_of_channels(decode_channels(data, self.reading))
        return self.view(decode_exact(data, self.reading))

    def view_of_channels(self, pixels: np.ndarray) -> Tensor:
        """Resize and crop decoded pixels `(H, W, C)`; see :meth:`__call__`."""
        bands = (Image.fromarray(band) for band in np.moveaxis(pixels, 2, 0).copy())
        return torch.cat([self.view(band) for band in bands], dim=-3)

    def view(self, image: Image.Image) -> Tensor:
        """Resize and crop a decoded RGB or grayscale image; see :meth:`__call__`."""
        image = self.resized(image)
        square = [self.crop, self.crop]
        if self.mode == "ten_crop":
            return torch.stack([F.pil_to_tensor(view) for view in F.ten_crop(image, square)])
        return F.pil_to_tensor(F.center_crop(image, square))

    def resized(self, image: Image.Image) -> Image.Image:
        """Return the resized image before cropping."""
        size = [self.resize] * (2 if self.mode == "squash" else 1)
        return F.resize(image, size, interpolation=_interpolation(self.interpolation))


def put(image: Tensor, place: Tensor) -> None:
    """Copy an image into `place`, its slice of the batch tensor."""
    alike = (image.shape, image.dtype) == (place.shape, place.dtype)
    if alike and image.ndim == 3 and image.stride(0) == 1:
        # OpenCV splits interleaved channels eight times as fast as PyTorch. It writes to the given
        # arrays only if their shape and dtype match.
        cv2.split(image.permute(1, 2, 0).numpy(), list(place.numpy()))
    else:
        place.copy_(image)


def _interpolation(name: str) -> InterpolationMode:
    try:
        return {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}[name]
    except KeyError:
        raise UserError(f"Unknown interpolation {name!r}; expected bilinear or bicubic.") from None
