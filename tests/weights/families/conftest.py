"""Fixtures for tests of weight files."""

import pytest


@pytest.fixture(autouse=True)
def _zero_initial_weights(zero_initial_weights):
    """Save time in all tests of this folder, which load files into new networks."""
