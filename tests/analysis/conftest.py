"""Fixtures with small folders of images."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CLASSES = ("bark", "moss/dry", "sand")
PER_CLASS = 5


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Run every test in this folder with one thread."""


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> Path:
    """Write three class folders with 5, 5 and 6 noisy images of 40x36 pixels."""
    root = tmp_path_factory.mktemp("kinds")
    random = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for index in range(PER_CLASS + (label == 2)):
            pixels = random.integers(0, 120, (36, 40, 3)).astype(np.uint8)
            pixels[..., label] += 100
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root
