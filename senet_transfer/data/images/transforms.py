"""From pixels to the square that a network sees, one sample at a time.

All here yields uint8: normalising is the model's, on its device.
"""

import hashlib
import math
import random
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from senet_transfer.data.images.decode import decode_exact, decode_fast, jpeg_size
from senet_transfer.errors import UserError

EVAL_MODES = ("short_side", "squash", "ten_crop")


def sample_rng(seed: int, epoch: int, key: str) -> random.Random:
    """The random numbers of one sample in one epoch, whoever draws them and whenever."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{key}".encode(), digest_size=16).digest()
    return random.Random(int.from_bytes(digest, "little"))


@dataclass(frozen=True)
class TrainTransform:
    """A random region of random size and aspect ratio, resized to a square, flipped at random.

    The scheme of Szegedy et al. 2015 as torchvision's RandomResizedCrop samples it.

    Attributes:
        size: side of the result, in pixels.
        scale: smallest and largest area of the region, as a share of the image's.
        ratio: smallest and largest width over height.
        flip: probability of a horizontal flip.
        interpolation: "bilinear" or "bicubic", antialiased.
        draft: let a JPEG be decoded at a half, quarter or eighth of its size where the region stays
            at least as large as the result. Faster for large images, and other pixels.
    """

    size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    interpolation: str = "bilinear"
    draft: bool = False

    def __post_init__(self) -> None:
        pairs = len(self.scale) == len(self.ratio) == 2
        if (
            self.size < 1
            or not pairs
            or not 0 < self.scale[0] <= self.scale[1] <= 1
            or not 0 < self.ratio[0] <= self.ratio[1]
        ):
            raise UserError(
                f"cannot crop to size={self.size}, scale={self.scale}, ratio={self.ratio}: "
                "expected a size of at least 1, 0 < scale <= 1 and 0 < ratio, each two numbers "
                "from small to large."
            )
        _interpolation(self.interpolation)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return (3, self.size, self.size)

    def __call__(self, data: bytes, rng: random.Random) -> Tensor:
        """Returns `(3, size, size)` uint8, RGB.

        Raises:
            BrokenImageError: the image cannot be decoded.
        """
        pixels, (top, left, height, width) = self._decoded(data, rng)
        # Torch resizes a whole image of interleaved colours in two thirds of the time.
        crop = torch.from_numpy(pixels[top : top + height, left : left + width].copy())
        square = F.resize(
            crop.permute(2, 0, 1)[None],
            [self.size, self.size],
            interpolation=_interpolation(self.interpolation),
            antialias=True,
        )
        return square[0].flip(-1) if rng.random() < self.flip else square[0]

    def _decoded(
        self, data: bytes, rng: random.Random
    ) -> tuple[np.ndarray, tuple[int, int, int, int]]:
        """The pixels of an image, and the region to take from them."""
        size = jpeg_size(data) if self.draft else None
        if size is None:
            pixels = decode_fast(data)
            full_height, full_width = pixels.shape[:2]
            return pixels, self.region(full_height, full_width, rng)
        top, left, height, width = self.region(*size, rng)
        pixels = decode_fast(data, math.ceil(min(size) * self.size / min(height, width)))
        down, right = (found / full for found, full in zip(pixels.shape, size, strict=False))
        return pixels, (
            math.floor(top * down),
            math.floor(left * right),
            math.ceil(height * down),
            math.ceil(width * right),
        )

    def region(self, height: int, width: int, rng: random.Random) -> tuple[int, int, int, int]:
        """Draws top, left, height and width of the region."""
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
        # An image so long that nothing fits: its largest central region of an allowed ratio.
        w = min(width, max(1, round(height * self.ratio[1])))
        h = min(height, max(1, round(width / self.ratio[0])))
        return (height - h) // 2, (width - w) // 2, h, w


@dataclass(frozen=True)
class EvalTransform:
    """The deterministic view of an image that evaluation scores.

    Decoding and resizing are Pillow's: resizing tensors differs by a grey level, which moves
    logits in the third digit.

    Attributes:
        mode: "short_side": the short side to `resize`, then the central crop; "squash": both
            sides to `resize`, then the central crop; "ten_crop": the short side to `resize`, then
            four corners and the centre, and the same mirrored.
        resize: in pixels.
        crop: side of the square, in pixels.
        interpolation: "bilinear" or "bicubic".
    """

    mode: str = "short_side"
    resize: int = 256
    crop: int = 224
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if self.mode not in EVAL_MODES or not 0 < self.crop <= self.resize:
            raise UserError(
                f"cannot evaluate with mode={self.mode!r}, resize={self.resize}, crop={self.crop}: "
                f"expected a mode of {', '.join(EVAL_MODES)} and a crop no larger than the resize."
            )
        _interpolation(self.interpolation)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Of one sample."""
        shape = (3, self.crop, self.crop)
        return (10, *shape) if self.mode == "ten_crop" else shape

    def __call__(self, data: bytes, rng: random.Random | None = None) -> Tensor:
        """Returns `(3, crop, crop)` uint8, RGB, or `(10, 3, crop, crop)` for ten crops.

        Raises:
            BrokenImageError: the image cannot be decoded.
        """
        size = [self.resize] * (2 if self.mode == "squash" else 1)
        image = F.resize(decode_exact(data), size, interpolation=_interpolation(self.interpolation))
        square = [self.crop, self.crop]
        if self.mode == "ten_crop":
            return torch.stack([F.pil_to_tensor(view) for view in F.ten_crop(image, square)])
        return F.pil_to_tensor(F.center_crop(image, square))


def put(image: Tensor, place: Tensor) -> None:
    """Copies an image of a transform to where it belongs in a batch."""
    alike = (image.shape, image.dtype) == (place.shape, place.dtype)
    if alike and image.ndim == 3 and image.stride(0) == 1:
        # Interleaved colours, which OpenCV takes apart eight times as fast as Torch does. Planes
        # of another shape or type it would not fill, but replace.
        cv2.split(image.permute(1, 2, 0).numpy(), list(place.numpy()))
    else:
        place.copy_(image)


def _interpolation(name: str) -> InterpolationMode:
    try:
        return {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}[name]
    except KeyError:
        raise UserError(
            f"there is no interpolation {name!r}; expected bilinear or bicubic."
        ) from None
