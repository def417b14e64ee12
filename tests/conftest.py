"""Fixtures that every test can use."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.documents.warm import WarmPython
from tests.processes import ROOT

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


# Fixtures that train a network or start processes.
LONG_FIXTURES = {"bucket", "interface", "resumed", "run_python", "train", "trained"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that `make test-fast` leaves out because of what they need."""
    for item in items:
        if LONG_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.long)


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


@pytest.fixture(scope="session")
def run_python(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., subprocess.CompletedProcess]]:
    """Return a function that runs ``python WORDS`` in the root of the source.

    It forks a process that has imported torch and Detectron2, which takes seconds in a new one.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    printed = tmp_path_factory.mktemp("processes") / "printed"
    with WarmPython(ROOT, environment, printed) as python:
        yield lambda *words: python.call([str(word) for word in words])


@pytest.fixture
def one_thread():
    """Limits torch to a thread, with which it gives the same sums everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
