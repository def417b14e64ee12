"""Fixtures that every test can use."""

import os
from pathlib import Path

import pytest
import torch

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu` without a GPU, or fail them where `$REQUIRE_GPU` is set."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        reason = "this test needs a CUDA GPU, and torch.cuda.is_available() is False"
        if os.environ.get("REQUIRE_GPU"):
            pytest.fail(f"{reason}, although REQUIRE_GPU is set")
        pytest.skip(reason)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images that lies beside the checkout, such as `coco128/`.

    Tests that ask for it skip where it is absent, but never in CI, which has it.
    """
    if not SHARED_DATA.is_dir():
        reason = f"the real images at ../shared/data are absent ({SHARED_DATA})"
        if os.environ.get("CI"):
            pytest.fail(f"{reason}, and the environment says that this is CI")
        pytest.skip(reason)
    return SHARED_DATA


@pytest.fixture
def one_thread():
    """Limits torch to a thread, with which it gives the same sums everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
