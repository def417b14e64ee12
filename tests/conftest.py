"""Fixtures for all tests."""

import os
from pathlib import Path

import pytest
import torch

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu` without a GPU, or fail them if `$REQUIRE_GPU` is set."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        reason = "this test needs a CUDA GPU, and torch.cuda.is_available() is False"
        if os.environ.get("REQUIRE_GPU"):
            pytest.fail(f"{reason}, although REQUIRE_GPU is set")
        pytest.skip(reason)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real data next to the checkout, which contains `coco128/` and others.

    Tests that use it are skipped if the folder is missing. In CI they fail instead.
    """
    if not SHARED_DATA.is_dir():
        reason = f"the real images in ../shared/data are missing ({SHARED_DATA})"
        if os.environ.get("CI"):
            pytest.fail(f"{reason}, although CI is set")
        pytest.skip(reason)
    return SHARED_DATA


@pytest.fixture
def one_thread():
    """Limit torch to one thread, which makes its sums independent of the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
