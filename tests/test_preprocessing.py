"""Tests of image normalisation."""

import pytest
import torch
from torchvision.transforms.v2 import functional

from senet_transfer.preprocessing import CIFAR10, normalise

IMAGES = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)


def test_images_are_normalised_as_torchvision_does_it():
    expected = functional.normalize(IMAGES.float(), CIFAR10.mean, CIFAR10.std)
    assert torch.equal(normalise(IMAGES, *CIFAR10.channel_values()), expected)


def test_mean_and_std_of_a_bgr_model_are_in_its_order_of_channels():
    expected = functional.normalize(IMAGES.float().flip(1), CIFAR10.mean, CIFAR10.std)
    assert torch.equal(normalise(IMAGES, *CIFAR10.channel_values(), "BGR"), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_bytes_give_the_bits_of_images_of_the_means_type(dtype):
    mean, std = (value.to(dtype) for value in CIFAR10.channel_values())
    found = normalise(IMAGES, mean, std)
    assert found.dtype == dtype
    assert torch.equal(found, normalise(IMAGES.to(dtype), mean, std))
