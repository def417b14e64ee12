"""Fixtures that every test can use."""

import os
from pathlib import Path

import pytest
import torch

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


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
