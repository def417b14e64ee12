"""Tests that damaged files either load correctly or quickly raise UserError."""

import io
import os
import pickle
import resource
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from senet_transfer.errors import UserError
from senet_transfer.weights.formats.reader import WeightFile, check_values, read_tensors
from tests.weights.caffe_writer import CaffeNet
from tests.weights.file_writers import python2_pickle, python2_torch_file, tar_torch_file
from tests.weights.mutations import mutate

_CPU_SECONDS = 2
_KILOBYTES = 400_000


def _tensors() -> dict[str, torch.Tensor]:
    """Return the tensors of a tiny SE block, whose saved files consist mostly of headers."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "layer1.0.conv1.weight": random(4, 2, 1, 1),
        "layer1.0.bn1.weight": random(4),
        "layer1.0.bn1.bias": random(4),
        "layer1.0.bn1.running_mean": random(4),
        "layer1.0.bn1.running_var": random(4).abs() + 0.1,
        "layer1.0.bn1.num_batches_tracked": torch.tensor(7),
        "layer1.0.se_module.fc1.weight": random(2, 4, 1, 1),
        "layer1.0.se_module.fc1.bias": random(2),
        "last_linear.weight": random(3, 4).half(),
    }


def _arrays(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def _checkpoint(tensors: dict[str, torch.Tensor]) -> dict:
    momentum = {"state": {0: {"momentum_buffer": torch.ones(3)}}}
    return {"state_dict": tensors, "optimizer": momentum, "epoch": 3, "arch": "se_resnet50"}


def _torch(zipped: bool) -> Callable[[dict[str, torch.Tensor]], bytes]:
    def write(tensors: dict[str, torch.Tensor]) -> bytes:
        buffer = io.BytesIO()
        torch.save(_checkpoint(tensors), buffer, _use_new_zipfile_serialization=zipped)
        return buffer.getvalue()

    return write


def _by_path(write: Callable[[dict, Path], None]) -> Callable[[dict[str, torch.Tensor]], bytes]:
    def to_bytes(tensors: dict[str, torch.Tensor]) -> bytes:
        path = Path(os.environ["FUZZ_FOLDER"]) / "whole"
        write(tensors, path)
        return path.read_bytes()

    return to_bytes


def _caffe(tensors: dict[str, torch.Tensor]) -> bytes:
    net = CaffeNet("fuzzed", (1, 2, 8, 8))
    named = _arrays({name.split(".", 2)[-1]: tensor for name, tensor in tensors.items()})
    if "bn1.running_var" in named:
        bn = {name[4:]: values for name, values in named.items() if name.startswith("bn1.")}
        net.conv_bn("conv", "data", named["conv1.weight"], bn, relu="relu", factor=10.0)
    for name in sorted(set(named) - {"conv1.weight"}):
        if named[name].ndim == 4:
            net.conv(name, "conv", named[name])
    return net.caffemodel()


# Functions that return a file's content, by format.
WRITERS: dict[str, Callable[[dict[str, torch.Tensor]], bytes]] = {
    "zip": _torch(zipped=True),
    "legacy": _torch(zipped=False),
    "python2": _by_path(python2_torch_file),
    "tar": _by_path(tar_torch_file),
    "safetensors": lambda tensors: safetensors.torch.save(tensors, {"format": "pt"}),
    "pkl": lambda tensors: pickle.dumps({"model": _arrays(tensors), "__author__": "x"}),
    "pkl python2": lambda tensors: python2_pickle({"blobs": _arrays(tensors), "cfg": "MODEL:"}),
    "pkl protocol 0": lambda tensors: pickle.dumps(_arrays(tensors), 0),
    "caffemodel": _caffe,
}


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FUZZ_FOLDER", str(tmp_path))
    monkeypatch.chdir(tmp_path)  # executed code would write its files here


def _read(path: Path, data: bytes, what: str) -> WeightFile | None:
    """Read a damaged file. If reading raises a UserError, check its message and return None."""
    path.write_bytes(data)
    start = time.process_time()
    try:
        return read_tensors(path)
    except UserError as error:
        message = str(error)
    finally:
        assert time.process_time() - start < _CPU_SECONDS, what
    assert str(path) in message, what
    assert len(message) < 1000, what
    assert message.isprintable(), what  # no control characters from the file
    return None


def _fuzz(
    name: str, count: int, path: Path, check: Callable[[WeightFile, bytes, str], None]
) -> None:
    """Read ``count`` damaged files in one format, and pass those that load to ``check``.

    Also check that reading increases the peak memory by less than 400 MB and leaves no
    temporary files behind.
    """
    data = WRITERS[name](_tensors())
    other = WRITERS["legacy" if name != "legacy" else "zip"](_tensors())
    assert _read(path, data, "not damaged") is not None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(count):
        done, damaged = mutate(data, other, seed)
        what = f"{name}, seed {seed}: {done}"
        file = _read(path, damaged, what)
        if file is not None and damaged != data:
            check(file, damaged, what)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < _KILOBYTES
    assert {entry.name for entry in path.parent.iterdir()} <= {path.name, "whole"}


def _is_sound(file: WeightFile, damaged: bytes, what: str) -> None:
    assert file.tensors, what
    assert sum(t.nbytes for t in file.tensors.values()) <= 4 * len(damaged) + 2**20, what
    check_values(file.tensors, what)


def _is_unchanged(file: WeightFile, _: bytes, what: str) -> None:
    """Check that a damaged file that was read without an error contains the original tensors.

    The format has checksums, so a file with different tensors must raise an error.
    """
    assert list(file.tensors) == list(_tensors()), what
    assert all(torch.equal(file.tensors[k], v) for k, v in _tensors().items()), what


class _Recorded:
    """Placeholder used instead of NumPy objects, because NumPy can crash on damaged pickles."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __setstate__(self, state):
        self.state = state

    def array(self) -> np.ndarray:
        _, shape, dtype, fortran, raw = self.state
        raw = raw.encode("latin-1") if isinstance(raw, str) else raw
        code = np.dtype(dtype.arguments[0]).newbyteorder(dtype.state[1])
        return np.frombuffer(raw, code).reshape(shape, order="F" if fortran else "C")


class _Recorder(pickle._Unpickler):
    """Unpickler that uses :class:`_Recorded` for all classes and functions except ``encode``.

    It is derived from the pure-Python unpickler, because the C implementation may allocate
    gigabytes for a damaged file.
    """

    def find_class(self, module, name):
        plain = (module, name) == ("_codecs", "encode")
        return super().find_class(module, name) if plain else _Recorded


def _is_what_python_reads(file: WeightFile, damaged: bytes, what: str) -> None:
    _is_sound(file, damaged, what)
    try:
        tree = _Recorder(io.BytesIO(damaged), encoding="latin1").load()
    except (pickle.UnpicklingError, ValueError):  # stricter about frames and leading zeros
        return
    arrays = next((value for value in tree.values() if isinstance(value, dict)), tree)
    for name, tensor in file.tensors.items():
        np.testing.assert_array_equal(tensor.numpy(), arrays[name].array(), err_msg=what)


_CHECKS = {
    "zip": _is_unchanged,
    "pkl": _is_what_python_reads,
    "pkl python2": _is_what_python_reads,
    "pkl protocol 0": _is_what_python_reads,
}

# Ignore a warning of Python's pickletools about names with backslashes.
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence")

_COUNTS = [100, pytest.param(1000, marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", _COUNTS)
@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.long
def test_a_damaged_file_loads_correctly_or_is_rejected(name, count, tmp_path):
    _fuzz(name, count, tmp_path / "fuzzed", _CHECKS.get(name, _is_sound))


@pytest.mark.parametrize("count", _COUNTS)
@pytest.mark.long
def test_a_zip_with_forged_checksums_loads_correctly_or_is_rejected(count, tmp_path):
    path = tmp_path / "fuzzed"
    with zipfile.ZipFile(io.BytesIO(WRITERS["zip"](_tensors()))) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    inner = next(name for name in records if name.endswith("data.pkl"))
    for seed in range(count):
        done, damaged = mutate(records[inner], records[inner], seed)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, raw in records.items():
                archive.writestr(name, damaged if name == inner else raw)
        file = _read(path, buffer.getvalue(), f"seed {seed}: {done}")
        if file is not None:
            assert sum(t.nbytes for t in file.tensors.values()) <= 4 * path.stat().st_size + 2**20


# Undamaged files with unusual content.


def _rename(tensors: dict, rng: np.random.Generator) -> dict:
    names = list(tensors)
    old = names[rng.integers(len(names))]
    new = [
        old + "x",
        "module." + old,
        old.upper(),
        "",
        " ",
        "a/b\\c",
        "\u00e9",
        "x" * 5000,
        old[1:],
    ]
    return {new[rng.integers(len(new))] if name == old else name: tensors[name] for name in names}


def _reshape(tensors: dict, rng: np.random.Generator) -> dict:
    name = list(tensors)[rng.integers(len(tensors))]
    shape = tuple(int(n) for n in rng.integers(0, 5, rng.integers(0, 6)))
    return tensors | {name: torch.zeros(shape) + 0.5}


def _drop(tensors: dict, rng: np.random.Generator) -> dict:
    name = list(tensors)[rng.integers(len(tensors))]
    return {key: tensor for key, tensor in tensors.items() if key != name}


def _retype(tensors: dict, rng: np.random.Generator) -> dict:
    name = list(tensors)[rng.integers(len(tensors))]
    dtypes = (torch.float64, torch.float16, torch.int32, torch.uint8, torch.bool)
    return tensors | {name: tensors[name].to(dtypes[rng.integers(len(dtypes))])}


@pytest.mark.parametrize("count", [20, pytest.param(250, marks=pytest.mark.slow)])
@pytest.mark.parametrize("change", [_rename, _reshape, _drop, _retype])
@pytest.mark.parametrize("name", [name for name in WRITERS if name != "caffemodel"])
@pytest.mark.long
def test_an_undamaged_file_loads_correctly(name, change, count, tmp_path):
    for seed in range(count):
        expected = change(_tensors(), np.random.default_rng(seed))
        what = f"{name}, seed {seed}"
        file = _read(tmp_path / "fuzzed", WRITERS[name](expected), what)
        assert file is not None, what
        # Compare sorted names, because safetensors sorts tensors by dtype and name.
        assert sorted(file.tensors) == sorted(expected), what
        for key, tensor in expected.items():
            assert file.tensors[key].dtype == tensor.dtype, what
            assert torch.equal(file.tensors[key], tensor), what


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", WRITERS)
def test_an_impossible_value_anywhere_is_found(name, value, tmp_path):
    for key, tensor in _tensors().items():
        if not tensor.is_floating_point() or (name == "caffemodel" and tensor.ndim != 4):
            continue
        planted = tensor.clone()
        planted.view(-1)[-1] = value
        (tmp_path / "fuzzed").write_bytes(WRITERS[name](_tensors() | {key: planted}))
        with pytest.raises(UserError, match="invalid values: .*non-finite"):
            read_tensors(tmp_path / "fuzzed")
