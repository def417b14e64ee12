"""Tests for Cutout: the size and position of the area that is set to zero."""

import pytest
import torch

from senet_transfer.layers.cutout import cut_out


@pytest.mark.parametrize(
    ("row", "column", "height", "width"),
    [
        (16, 16, 16, 16),
        (8, 24, 16, 16),
        (0, 0, 8, 8),
        (31, 31, 9, 9),
        (0, 31, 8, 9),
        (7, 25, 15, 15),
    ],
)
def test_cutouts_area_is_clipped_at_the_border(row, column, height, width):
    images = torch.ones(1, 3, 32, 32)
    cut = cut_out(images, torch.tensor([[row, column]]), 16)
    rows, columns = (cut[0, 0] == 0).nonzero(as_tuple=True)
    assert len(rows) == height * width
    assert (rows.min(), rows.max()) == (max(row - 8, 0), min(row + 7, 31))
    assert (columns.min(), columns.max()) == (max(column - 8, 0), min(column + 7, 31))
    assert torch.equal(cut[0, 0], cut[0, 2])


@pytest.mark.parametrize("size", [8, 16])
def test_cutouts_mean_area_equals_the_papers(size):
    centres = torch.cartesian_prod(torch.arange(32), torch.arange(32))
    cut = cut_out(torch.ones(1024, 1, 32, 32), centres, size)
    lengths = [min(c + size // 2, 32) - max(c - size // 2, 0) for c in range(32)]
    assert int((cut == 0).sum()) == sum(lengths) ** 2
