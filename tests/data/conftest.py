"""Fixtures for the data tests."""

from pathlib import Path

import numpy as np
import pytest

from senet_transfer.data.images.places365 import open_places365
from senet_transfer.data.shards.write import convert
from tests.data.drawn_places import write_val


@pytest.fixture
def make_shards(tmp_path_factory):
    """Return a function that writes a given number of images to a given number of shards."""

    def make(count: int, shards: int, seed: int = 0) -> Path:
        source = write_val(tmp_path_factory.mktemp("source"), count, seed)
        output = tmp_path_factory.mktemp("shards")
        images = open_places365(source, "val")
        blocks = int(np.sum(-(-images.sizes // 512) + 3))
        convert(images, output, split="val", shard_mb=blocks * 512 / 1e6 / (shards - 0.5))
        assert len(list(output.glob("*.tar"))) == shards
        return output

    return make


@pytest.fixture
def val(tmp_path):
    """Write a generated validation split of 24 images."""
    return write_val(tmp_path / "places", 24)


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Run every test in this folder with one torch thread."""
