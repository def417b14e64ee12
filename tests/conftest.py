"""Fixtures and pytest hooks for all tests."""

import os
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from tests.documents.warm import WarmPython
from tests.processes import ROOT

# Most tests load configs. PyYAML's C parser gives the same results in a tenth of the time.
if yaml.__with_libyaml__:
    yaml.SafeLoader, yaml.SafeDumper = yaml.CSafeLoader, yaml.CSafeDumper

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


# Fixtures that train a network or start processes.
LONG_FIXTURES = {"bucket", "interface", "resumed", "run_python", "train", "trained"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that use slow fixtures as `long`, so that `make test-fast` skips them."""
    for item in items:
        if LONG_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.long)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu` if there is no GPU, or fail them if `$REQUIRE_GPU` is set."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        reason = "this test needs a CUDA GPU, but torch.cuda.is_available() is False"
        if os.environ.get("REQUIRE_GPU"):
            pytest.fail(f"{reason}, although REQUIRE_GPU is set")
        pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape bytes in captured output that are not valid UTF-8, such as bytes in file names.

    pytest-xdist can't send such bytes to the main process; the worker would crash.
    """
    report = yield
    report.sections = [
        (name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections
    ]
    return report


@pytest.fixture(scope="module", autouse=True)
def _restore_catalogs() -> Iterator[None]:
    """Unregister the datasets that a test file registers, so that test files are independent."""
    # A test file that does not import Detectron2 registers nothing.
    catalogs = sys.modules.get("detectron2.data.catalog")
    if catalogs is None:
        yield
        return
    datasets, metadata = catalogs.DatasetCatalog.data, catalogs.MetadataCatalog.data
    loaders = dict(datasets)
    values = {name: (entry, dict(vars(entry))) for name, entry in metadata.items()}
    yield
    datasets.clear()
    datasets.update(loaders)
    metadata.clear()
    for name, (entry, kept) in values.items():
        vars(entry).clear()
        vars(entry).update(kept)
        metadata[name] = entry


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder `../shared/data`, which contains real datasets such as COCO128.

    If the folder is missing, tests that use this fixture are skipped, or fail in CI.
    """
    if not SHARED_DATA.is_dir():
        reason = f"the real images in ../shared/data are missing ({SHARED_DATA})"
        if os.environ.get("CI"):
            pytest.fail(f"{reason}, although CI is set")
        pytest.skip(reason)
    return SHARED_DATA


@pytest.fixture(scope="session")
def shared_cases(shared_data: Path) -> Path:
    """Return the folder with detection datasets from public bug reports."""
    cases = shared_data.parent / "cases" / "detection"
    if not cases.is_dir():
        pytest.skip(f"the detection data in ../shared/cases is missing ({cases})")
    return cases


@pytest.fixture(scope="session")
def run_python(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., subprocess.CompletedProcess]]:
    """Return a function that runs Python with the given arguments in the repository root.

    Importing torch and Detectron2 takes several seconds. Therefore, the function forks a process
    that has already imported them.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    printed = tmp_path_factory.mktemp("processes") / "printed"
    with WarmPython(ROOT, environment, printed) as python:
        yield lambda *words: python.call([str(word) for word in words])


@pytest.fixture
def one_thread():
    """Limit torch to one thread, so that results do not depend on the number of CPU cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def zero_initial_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Initialise weights with zeros, which is faster than drawing random numbers.

    Use this fixture only in tests that set or load all weights that they depend on.
    """

    def fill(tensor: Tensor, *_: object, **__: object) -> Tensor:
        return nn.init.zeros_(tensor)

    for name in ("kaiming_normal_", "kaiming_uniform_", "normal_", "uniform_", "trunc_normal_"):
        monkeypatch.setattr(nn.init, name, fill)
