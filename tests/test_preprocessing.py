"""Tests for input normalisation and grayscale conversion."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from senet_transfer.preprocessing import CIFAR10, Preprocessing, normalise

IMAGES = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)


def test_images_are_normalised_as_in_torchvision():
    expected = functional.normalize(IMAGES.float(), CIFAR10.mean, CIFAR10.std)
    assert torch.equal(normalise(IMAGES, *CIFAR10.channel_values()), expected)


def test_mean_and_std_of_a_bgr_model_are_in_bgr_order():
    expected = functional.normalize(IMAGES.float().flip(1), CIFAR10.mean, CIFAR10.std)
    assert torch.equal(normalise(IMAGES, *CIFAR10.channel_values(), "BGR"), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_uint8_images_are_bitwise_equal_to_those_of_the_means_dtype(dtype):
    mean, std = (value.to(dtype) for value in CIFAR10.channel_values())
    found = normalise(IMAGES, mean, std)
    assert found.dtype == dtype
    assert torch.equal(found, normalise(IMAGES.to(dtype), mean, std))


@pytest.mark.parametrize("channels", [1, 3])
def test_images_become_grey_as_in_pillow(channels):
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    images[:, :, 0, :2] = torch.tensor([0, 255], dtype=torch.uint8)
    pixels = Preprocessing("L", (100.0, 110.0, 120.0)[:channels], (50.0, 51.0, 52.0)[:channels])
    found = normalise(images, *pixels.channel_values(), "L")
    assert found.shape == (2, channels, 64, 64)
    for image, result in zip(images, found, strict=True):
        grey = Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L")
        expected = functional.normalize(
            torch.from_numpy(np.array(grey)).float().expand(channels, -1, -1),
            pixels.mean,
            pixels.std,
        )
        assert torch.equal(result, expected)


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_the_grey_mean_is_computed_from_the_colours(order):
    mean, std = (100.0, 110.0, 120.0), (50.0, 51.0, 52.0)
    colours = Preprocessing(order, mean if order == "RGB" else mean[::-1], std)
    assert colours.grey().mean == (
        pytest.approx(0.299 * 100 + 0.587 * 110 + 0.114 * 120, abs=1e-2),
    )
    assert (colours.grey().format, len(colours.grey().std)) == ("L", 1)
