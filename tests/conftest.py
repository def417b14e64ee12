"""Fixtures that every test can use."""

import os
from pathlib import Path

import pytest

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
