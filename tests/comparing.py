"""Bit-for-bit comparison of checkpoints."""

import torch


def assert_same(found, expected, where=""):
    """Assert that two checkpoints have the same contents, bit for bit."""
    assert type(found) is type(expected), where
    if isinstance(found, dict):
        assert found.keys() == expected.keys(), where
        for key in found:
            assert_same(found[key], expected[key], f"{where}/{key}")
    elif isinstance(found, list | tuple):
        for index, pair in enumerate(zip(found, expected, strict=True)):
            assert_same(*pair, f"{where}/{index}")
    elif isinstance(found, torch.Tensor):
        assert torch.equal(found, expected), where
    else:
        assert found == expected, where
