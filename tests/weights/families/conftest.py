"""Fixtures for the tests of weight files."""

import pytest


@pytest.fixture(autouse=True)
def _zero_initial_weights(zero_initial_weights):
    """Save time in all tests in this folder, because they load files into new networks."""
