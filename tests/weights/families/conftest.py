"""Fixtures for the tests of weight files."""

import pytest


@pytest.fixture(autouse=True)
def _zero_initial_weights(zero_initial_weights):
    """Initialise networks with zeros, to save time. All tests in this folder load weights."""
