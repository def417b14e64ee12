"""Tests that the safe pickle reader reads valid data correctly and never executes code."""

import argparse
import collections
import copyreg
import functools
import io
import os
import pathlib
import pickle
import resource
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from senet_transfer.errors import UserError
from senet_transfer.utils.safe_pickle import load_plain
from senet_transfer.weights.formats.reader import read_tensors
from tests.weights.file_writers import (
    NEXT_TO_A_MODEL,
    VALUES_NEXT_TO_A_MODEL,
    python2_pickle,
    python2_torch_file,
    tar_torch_file,
)


def _load(data: bytes):
    return load_plain(io.BytesIO(data), "test.pkl")


def _arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "conv1_w": rng.normal(0, 1, (4, 3, 7, 7)).astype(np.float32),
        "res_conv1_bn_gamma": rng.normal(0, 1, 4),
        "fortran": np.asfortranarray(rng.normal(0, 1, (3, 5)).astype(np.float16)),
        "big_endian": np.arange(6, dtype=">f4").reshape(2, 3),
        "strided": np.arange(12, dtype=np.int64)[::2],
        "steps": np.array(7),
        "empty": np.zeros((0, 3), np.float32),
        "mask": np.array([True, False]),
    }


def _assert_equal(tensors: dict[str, torch.Tensor], arrays: dict[str, np.ndarray]) -> None:
    assert list(tensors) == list(arrays)
    for name, array in arrays.items():
        assert tuple(tensors[name].shape) == array.shape
        assert tensors[name].numpy().dtype == array.dtype.newbyteorder("=")
        np.testing.assert_array_equal(tensors[name].numpy(), array)


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_every_protocol_are_read(protocol, tmp_path):
    content = {"model": _arrays(), "__author__": "x", "matching_heuristics": True}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol))
    file = read_tensors(tmp_path / "a.pkl")
    assert file.format == "pkl"
    assert file.metadata == {"__author__": "x", "matching_heuristics": True}
    _assert_equal(file.tensors, _arrays())


@pytest.mark.parametrize("protocol", range(3))
def test_python_2_pickles_are_read_as_by_the_standard_library(protocol, tmp_path):
    data = python2_pickle({"blobs": _arrays(), "cfg": "TR\xc4IN:\n  X: 'y'"}, protocol)
    expected = pickle.loads(data, encoding="latin1")
    (tmp_path / "a.pkl").write_bytes(data)
    file = read_tensors(tmp_path / "a.pkl")
    assert file.metadata == {"cfg": expected["cfg"]}
    _assert_equal(file.tensors, expected["blobs"])


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_are_read_as_by_the_standard_library(protocol):
    shared = [1, "two"]
    value = {
        "numbers": [0, 1, -1, 255, 256, 65536, 2**31, -(2**70), 1.5, float("inf")],
        "texts": ["", "a" * 300, "\u00e4\u4e2d\U0001f600", "line\nbreak 'quoted\\'"],
        "bytes": [b"", b"\x00\xff" * 200],
        "constants": (None, True, False),
        "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        "ordered": collections.OrderedDict([("b", 1), ("a", 2)]),
        "counter": collections.Counter("aab"),
        "default": collections.defaultdict(list, a=[1]),
        "sets": {1, 2},
        "shared": [shared, shared],
        ("a", 1): {1: 2},
    }
    read = _load(pickle.dumps(value, protocol))
    assert read == value
    assert read["shared"][0] is read["shared"][1]
    assert list(read["ordered"]) == ["b", "a"]


def test_numpy_scalars_are_read_as_numbers():
    value = [np.float64(2.5), np.float32(0.5), np.int64(-3), np.bool_(True), np.str_("text")]
    assert _load(pickle.dumps(value, 2)) == [2.5, 0.5, -3, True, "text"]
    assert _load(python2_pickle(value)) == [2.5, 0.5, -3, True, "text"]


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_a_large_array_is_not_copied_and_read_only(protocol):
    array = _load(pickle.dumps(np.arange(1000.0), protocol))
    assert type(array) is np.ndarray
    assert not array.flags.owndata
    assert not array.flags.writeable


@pytest.mark.parametrize("protocol", range(6))
def test_a_transposed_array_is_read(protocol):
    array = np.arange(24.0).reshape(2, 3, 4).transpose(1, 2, 0)
    np.testing.assert_array_equal(_load(pickle.dumps(array, protocol)), array)


def test_pickles_follow_one_another_in_a_stream():
    stream = io.BytesIO(
        b"".join(pickle.dumps([i], protocol) for i, protocol in enumerate(range(6)))
    )
    assert [load_plain(stream, "test.pkl") for _ in range(6)] == [[i] for i in range(6)]


def test_the_standard_unpickler_has_the_overridden_methods():
    # pickle._Unpickler is private. If a new Python version changes it, this test should fail first.
    from senet_transfer.utils.safe_pickle import _PlainUnpickler

    assert _PlainUnpickler.__mro__[1] is pickle._Unpickler
    for name in ("find_class", "load_frame", "load_frozenset", "load_reduce", "load_build"):
        assert callable(getattr(pickle._Unpickler, name))
    known = {
        code[0]
        for name, code in vars(pickle).items()
        if name.isupper() and len(name) > 1 and isinstance(code, bytes) and len(code) == 1
    }
    assert set(pickle._Unpickler.dispatch) <= known
    assert set(_PlainUnpickler.dispatch) < set(pickle._Unpickler.dispatch)


# Payloads that must be rejected. Each would create a file if it were executed.


class _Runs:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def _payloads(sentinel: Path) -> dict[str, object]:
    command = f"touch {sentinel}"
    return {
        "os.system": _Runs(os.system, command),
        "eval": _Runs(eval, f"__import__('os').system({command!r})"),
        "open": _Runs(open, str(sentinel), "w"),
        "getattr": _Runs(getattr, os, "system"),
        "torch.serialization.load": _Runs(torch.load, str(sentinel)),
    }


def _names(name: str) -> str:
    return {"os.system": r"(posix|os)\.system", "getattr": r"os\.system", "open": "open"}.get(
        name, name.replace(".", r"\.")
    )


@pytest.mark.parametrize("name", sorted(_payloads(Path("x"))))
@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
def test_a_pickle_that_runs_code_is_rejected_by_name(name, protocol, tmp_path):
    sentinel = tmp_path / "ran"
    if name == "getattr":  # modules can't be pickled, so this pickle is written by hand
        data = b"cbuiltins\ngetattr\n(cos\nsystem\nS'x'\ntR."
    else:
        content = {"model": _arrays(), "hook": _payloads(sentinel)[name]}
        data = pickle.dumps(content, protocol)
    path = tmp_path / "a.pkl"
    path.write_bytes(data)
    with pytest.raises(UserError, match=_names(name)) as error:
        read_tensors(path)
    assert str(path) in str(error.value)
    assert not sentinel.exists()


@pytest.mark.parametrize("writer", ["zip", "legacy", "python2", "tar"])
@pytest.mark.parametrize("name", ["os.system", "eval"])
def test_a_torch_file_that_runs_code_is_rejected_by_name(writer, name, tmp_path):
    sentinel, path = tmp_path / "ran", tmp_path / "a.pth"
    tensors, payload = {"conv.weight": torch.ones(2)}, _payloads(sentinel)[name]
    content = {"state_dict": tensors, "hook": payload}
    if writer == "tar":
        tar_torch_file(tensors, path, hook=payload)
    elif writer == "python2":
        python2_torch_file(content, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "zip")
    with pytest.raises(UserError, match=_names(name)) as error:
        read_tensors(path)
    assert "No code was run" in str(error.value)
    assert not sentinel.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"(S'touch x'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'touch x'\no.",  # OBJ
        b"cos\nsystem\nS'touch x'\n\x85\x81.",  # NEWOBJ
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01x\x85R.",  # STACK_GLOBAL
        b"\x80\x02cposix\nsystem\nU\x01x\x85R.",
        b"\x80\x04\x8c\x00\x8c\x06system\x93.",
        b"\x80\x04K\x01K\x02\x93.",
        b"\x80\x04\x8c\x07os.path\x8c\x11__builtins__.eval\x93.",
        b"\x80\x04\x8c\x0bcollections\x8c\x16OrderedDict.fromkeys.x\x93.",
        b"\x82\x01.",  # EXT1
        b"Pos.system\n.",  # PERSID
        b"\x80\x02ccollections\nOrderedDict\n)R}U\x05itemsK\x01sb.",
        b"\x80\x02cnumpy\ndtype\nU\x02O8\x85R.",
    ],
)
def test_unusual_references_run_no_code(data, tmp_path):
    (tmp_path / "a.pkl").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.pkl"):
        read_tensors(tmp_path / "a.pkl")


def test_attributes_that_an_attacker_sets_do_not_persist():
    # BUILD with a slot state sets attributes. On a real class, they would persist after loading.
    slot_state = b"N}U\x05buildNs\x86b."
    for name in (b"cnumpy\ndtype\n", b"ccollections\nOrderedDict\n"):
        with pytest.raises((ValueError, TypeError)):
            _load(b"\x80\x02" + name + slot_state)
    np.testing.assert_array_equal(_load(pickle.dumps(np.ones(2))), np.ones(2))


def test_a_registered_extension_is_not_looked_up():
    copyreg.add_extension("os", "system", 200)
    try:
        for data in (b"\x82\xc8", b"\x83\xc8\x00", b"\x84\xc8\x00\x00\x00"):
            with pytest.raises(ValueError, match="not a supported pickle opcode"):
                _load(b"\x80\x02" + data + b"U\x04true\x85R.")
    finally:
        copyreg.remove_extension("os", "system", 200)


_ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
_U1 = b"cnumpy\ndtype\n(S'u1'\nI0\nI1\ntR"


@pytest.mark.parametrize(
    "data",
    [
        _ARRAY + b"p0\n0g0\n(I1\n(I1\nt" + _U1 + b"I00\ng0\ntb.",  # an array as its own buffer
        _ARRAY + b"(I1\n(I1\nt" + _U1 + b"I00\n]tb.",
        b"cnumpy.core.numeric\n_frombuffer\n(" + _ARRAY + _U1 + b"(I0\ntS'C'\ntR.",
        _ARRAY + b"(I1\n(I1\nt" + _U1 + b"I00\nS'a'\ntbI0\nI7\ns.",  # sets an item
        _ARRAY + b"}b.",
        _ARRAY + b"N}S'shape'\nI1\ns\x86b.",
        _U1 + b"}S'value'\nN}sb.",
        b"cnumpy\ndtype\nN}S'build'\nNs\x86b.",
        b"ccollections\nOrderedDict\nI1\nI2\ns.",
        b"cnumpy\nndarray\n(tR.",
        b"cbuiltins\nint\n(S'1'\ntR.",
        b"ccollections\nOrderedDict\n]R.",
        b"ccollections\nOrderedDict\n)}\x92.",  # NEWOBJ_EX
        b"ccollections\nOrderedDict\nK\x01\x85K\x01\x86\x85R.",  # not pairs
    ],
)
def test_invalid_arguments_are_not_passed_to_numpy_or_python(data):
    with pytest.raises((ValueError, TypeError, AttributeError, UserError)):
        _load(data)


def test_model_objects_and_unknown_classes_are_rejected_with_a_remedy(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"torch\.nn\.modules\.linear\.Linear.*state_dict"):
        read_tensors(tmp_path / "model.pth")
    torch.save({"state_dict": {}, "args": argparse.Namespace(lr=1)}, tmp_path / "args.pth")
    with pytest.raises(UserError, match=r"argparse\.Namespace.*torch\.save"):
        read_tensors(tmp_path / "args.pth")


_ONES = {"w": np.ones(2, np.float32)}
_NAMESPACE = argparse.Namespace(lr=1)


@pytest.mark.parametrize(
    "content",
    [
        _NAMESPACE,
        {"model": _NAMESPACE, "statistics": _ONES},
        {"model": _ONES | {"args": _NAMESPACE}},
        {"model": _ONES | {"nested": {"args": _NAMESPACE}}},
        {"model": _ONES | {pathlib.PurePosixPath("v"): np.ones(2)}},
        {"state_dict": _ONES | {"optimizer": _NAMESPACE}},
    ],
)
@pytest.mark.parametrize("protocol", range(6))
def test_an_object_in_the_model_is_rejected_by_name(content, protocol, tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(UserError, match=r"argparse\.Namespace|pathlib\.PurePosixPath") as error:
        read_tensors(tmp_path / "a.pkl")
    assert "run code on this machine" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        _ONES | {"args": _NAMESPACE, "classes": np.array(["a", 1], object), "cache": [_NAMESPACE]},
        {"model": _NAMESPACE, "net": _ONES},
        {"backbone": _ONES, "optimizer": _NAMESPACE},
    ],
)
@pytest.mark.parametrize("protocol", range(6))
def test_an_object_next_to_the_tensors_is_left_out_without_a_wrapper_too(
    content, protocol, tmp_path
):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol))
    _assert_equal(read_tensors(tmp_path / "a.pkl").tensors, _ONES)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", NEXT_TO_A_MODEL)
@pytest.mark.long
def test_only_plain_values_of_objects_next_to_the_model_are_kept(name, protocol, tmp_path):
    value = NEXT_TO_A_MODEL[name]()
    content = {
        "epoch": 3,
        "first": value,
        "model": _arrays(),
        "more": [value, (value, {"x": value})],
        "meta": {"classes": ["a"], "when": value},
    }
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol))
    file = read_tensors(tmp_path / "a.pkl")
    _assert_equal(file.tensors, _arrays())
    expected = {"epoch": 3, "meta": {"classes": ["a"]}}
    if plain := VALUES_NEXT_TO_A_MODEL.get(name):
        expected["meta"]["when"] = plain
        expected |= {"first": plain, "more": [plain, [plain, {"x": plain}]]}
    assert file.metadata == expected


# A pickle with a model, to which tests append an object of an unknown class and instructions that
# try to make it execute something.
_MODEL = b"\x80\x02}(U\x05model" + pickle.dumps(_ONES, 2)[2:-1] + b"U\x01x"
_UNKNOWN = b"cunknown_module\nRuns\n"


@pytest.mark.parametrize(
    "instructions",
    [
        _UNKNOWN,
        _UNKNOWN + b")R" * 1000,
        _UNKNOWN + b")\x81" * 1000,
        _UNKNOWN + b"U\x07touch x\x85R",
        _UNKNOWN + b"}U\x09__class__" + _UNKNOWN + b"sb",
        _UNKNOWN + b"N}U\x08__call__" + _UNKNOWN + b"s\x86b",
        _UNKNOWN + b"N}U\x04nameU\x09os.systems\x86b)R",
        _UNKNOWN + b")R(U\x01aK\x01U\x01bK\x02u",
        _UNKNOWN + b")R(U\x01aK\x01e",
        _UNKNOWN + b")R(U\x01aK\x01\x90",
        _UNKNOWN + b")RU\x01aK\x01s",
        _UNKNOWN + b")RU\x01aa",
        # The key must not be hashed.
        pytest.param(_UNKNOWN + b")RK\x01" + b"\x85" * 100_000 + b"K\x01s", marks=pytest.mark.long),
        _UNKNOWN + b"q\x050h\x05h\x05h\x05\x85R\x85R",
        b"}" + _UNKNOWN + b")RK\x01s",  # as a key of a dictionary
        b"}(" + _UNKNOWN + _UNKNOWN + b"\x86K\x01u",
        b"c__builtin__\nset\n](" + _UNKNOWN + _UNKNOWN + b"e\x85R",
        b"ccopy_reg\n_reconstructor\n(" + _UNKNOWN + b"c__builtin__\nobject\nNtR}b",
        b"ccopy_reg\n_reconstructor\n(cnumpy\ndtype\nc__builtin__\nobject\nNtR",
    ],
)
def test_an_object_of_an_unknown_class_is_inert(instructions, tmp_path, monkeypatch):
    (tmp_path / "unknown_module.py").write_text("open('ran', 'w')\nRuns = print\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pkl").write_bytes(_MODEL + instructions + b"u.")
    file = read_tensors("a.pkl")
    _assert_equal(file.tensors, _ONES)
    assert file.metadata in ({}, {"x": {}})
    assert "unknown_module" not in sys.modules
    assert {entry.name for entry in tmp_path.iterdir()} == {"a.pkl", "unknown_module.py"}


@pytest.mark.parametrize(
    "name",
    [
        *("os system", "posix system", "nt system", "os.path join"),
        *("subprocess Popen", "builtins eval", "builtins exec", "__builtin__ eval"),
        *("builtins getattr", "builtins __import__", "builtins open", "_io open"),
        *("runpy run_path", "ctypes CDLL", "_ctypes dlopen", "socket socket"),
        *("_socket socket", "shutil rmtree", "importlib import_module"),
        *("operator attrgetter", "operator methodcaller", "_operator call"),
        *("functools reduce", "_functools reduce", "types CodeType"),
        *("builtins reduce", "__builtin__ reduce", "torch os.system", "torch.os system"),
        *("torch.serialization.os system", "math sqrt.__self__.eval", "logging.sys.modules x"),
        *("types FunctionType", "pathlib Path.unlink", "pathlib os", "pickle loads"),
        *("_pickle loads", "cPickle loads", "io open", "builtins str.format"),
        *("torch load", "torch.hub load", "commands getoutput", "code interact"),
        *("builtins type.__subclasses__", "operator __call__", "sys exit", "signal signal"),
    ],
)
@pytest.mark.parametrize("inside", [b"%s", _UNKNOWN + b"%s\x85R", _UNKNOWN + b"}U\x01a%ssb"])
def test_a_dangerous_name_anywhere_rejects_the_file(name, inside, tmp_path):
    module, name = name.split()
    call = f"c{module}\n{name}\n".encode() + b"U\x07touch x\x85R"
    (tmp_path / "a.pkl").write_bytes(_MODEL + inside % call + b"u.")
    with pytest.raises(UserError, match=f"{module}[.]{name}`, which can run code on this machine"):
        read_tensors(tmp_path / "a.pkl")
    assert not Path("x").exists()


@pytest.mark.parametrize(
    ("owner", "attribute"),
    [
        (b"cos\npath\n", b"join"),
        (b"cbuiltins\nstr\n", b"format"),
        (b"ctorch\nserialization\n", b"load"),
        (b"ctorch\nos\n", b"system"),
        (b"clogging\nos\n", b"popen"),
        (b"ctorch.serialization\nos\n", b"system"),
        (b"cmath\nsqrt\n", b"__self__"),
        (_UNKNOWN, b"__class__"),
        (_UNKNOWN, b"__dict__"),
        (_UNKNOWN, b"__getattribute__"),
        (_UNKNOWN, b"__globals__"),
        (_UNKNOWN, b"__loader__"),
        (_UNKNOWN, b"__spec__"),
        (_UNKNOWN, b"not an identifier"),
        (_UNKNOWN, b"x" * 300),
    ],
)
def test_a_dangerous_attribute_rejects_the_file(owner, attribute, tmp_path):
    text = b"X" + struct.pack("<I", len(attribute)) + attribute
    call = b"cbuiltins\ngetattr\n" + owner + text + b"\x86R"
    (tmp_path / "a.pkl").write_bytes(_MODEL + call + b"u.")
    with pytest.raises(UserError, match="was rejected, because loading it would call"):
        read_tensors(tmp_path / "a.pkl")


@pytest.mark.parametrize(
    "name", ["my.project.sys_info x", "my.project os", "my.oslo.cfg Socket", "my my_os.Builtins"]
)
def test_a_name_like_that_of_a_system_module_is_harmless(name, tmp_path):
    call = "c{}\n{}\n".format(*name.split()).encode()
    (tmp_path / "a.pkl").write_bytes(_MODEL + call + b"u.")
    _assert_equal(read_tensors(tmp_path / "a.pkl").tensors, _ONES)


@pytest.mark.parametrize("protocol", range(6))
def test_a_union_of_types_is_harmless_but_another_reduction_is_rejected(protocol, tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": _ONES, "x": int | None}, protocol))
    _assert_equal(read_tensors(tmp_path / "a.pkl").tensors, _ONES)
    content = {"model": _ONES, "x": _Runs(functools.reduce, getattr, [])}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(UserError, match="reduce`, which can run code on this machine"):
        read_tensors(tmp_path / "a.pkl")


@pytest.mark.parametrize("protocol", range(6))
def test_an_integer_of_up_to_a_kilobyte_is_read(protocol):
    assert _load(pickle.dumps([2**8191, -(2**8191)], protocol)) == [2**8191, -(2**8191)]
    with pytest.raises(ValueError, match="an integer has more than 1024 bytes"):
        _load(pickle.dumps(2**8192, protocol))


@pytest.mark.parametrize("code", [b"I0x%s\n.", b"L0x%sL\n.", b"L-0x%s\n."])
def test_a_long_hexadecimal_integer_is_rejected(code):
    with pytest.raises(ValueError, match="an integer has more than 1024 bytes"):
        _load(code % (b"f" * 3000))


def test_object_and_structured_arrays_are_rejected(tmp_path):
    for array in (np.array([{}, 1], dtype=object), np.zeros(2, [("a", "f4")])):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": {"w": array}}))
        with pytest.raises(UserError, match="object|structured|dtype"):
            read_tensors(tmp_path / "a.pkl")


def _array_pickle(shape: str, dtype: str = "f4", raw: bytes = b"\0\0\0\0") -> bytes:
    state = f"(I1\n{shape}cnumpy\ndtype\n(S'{dtype}'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb"
    return (
        b"(S'w'\ncnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
        + state.encode()
        + b"I00\nT"
        + struct.pack("<i", len(raw))
        + raw
        + b"tbd."
    )


def _many(times: int, push: bytes) -> bytes:
    return push * times


BOMBS = {
    "an array of a terabyte": _array_pickle("(I1000000000000\nt"),
    "an array larger than its data": _array_pickle("(I2\nI3\nt"),
    "negative sizes": _array_pickle("(I-1\nI-1\nt"),
    "items of a gigabyte": _array_pickle("(I1\nt", "S1000000000"),
    "many dimensions": _array_pickle("(" + "I1\n" * 40 + "t"),
    "a memo of four billion": b"\x80\x02}r\xff\xff\xff\xff.",
    "a string of four gigabytes": b"\x80\x02X\xff\xff\xff\xffab.",
    "bytes of an exabyte": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x0fab.",
    "a bytearray of an exabyte": b"\x80\x05\x96" + b"\xff" * 7 + b"\x0fab.",
    "a frame of an exabyte": b"\x80\x04\x95" + b"\xff" * 7 + b"\x0f.",
    "a long of two gigabytes": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "digits": b"L" + b"9" * 1_000_000 + b"L\n.",
    "a huge integer as a key again and again": b"\x80\x02}\x8b"
    + struct.pack("<i", 2_000_000)
    + b"\x01" * 2_000_000
    + b"q\x00"
    + _many(20_000, b"h\x00Ns")
    + b".",
    "text encoded again and again": b"\x80\x02X\x40\x42\x0f\x00"
    + b"a" * 1_000_000
    + b"q\x000(c_codecs\nencode\nq\x01"
    + _many(20_000, b"h\x00U\x06latin1\x86Rh\x01")
    + b"l.",
    "another codec": b"\x80\x02c_codecs\nencode\nU\x03abcU\x06base64\x86R.",
    "a list handed on again and again": b"\x80\x02("
    + b"K\x01K\x01\x86" * 50_000
    + b"lq\x000ccollections\nOrderedDict\nq\x01("
    + _many(20_000, b"h\x01h\x00\x85R")
    + b"l.",
    "a deeply nested key": b"\x80\x02}" + b"K\x01" + b"\x85" * 100_000 + b"K\x01s.",
    "a key of doubled tuples": b"\x80\x02}K\x01" + b"q\x00h\x00\x86" * 60 + b"K\x01s.",
    "a set of doubled tuples": b"\x80\x04\x8f(K\x01" + b"q\x00h\x00\x86" * 60 + b"\x90.",
    "nested frozensets": b"\x80\x04" + b"(" * 60 + b"K\x01" + b"\x91" * 60 + b".",
    "keys of a deeply nested tuple, in a call": b"\x80\x02ccollections\nOrderedDict\n](K\x01"
    + b"\x85" * 100_000
    + b"K\x01\x86e\x85R.",
    "a dtype's code of doubled tuples": b"\x80\x02cnumpy\ndtype\nK\x01"
    + b"q\x00h\x00\x86" * 60
    + b"\x85R.",
    "a set handed on again and again": b"\x80\x02("
    + b"J\x01\x02\x03\x04" * 50_000
    + b"lq\x00c__builtin__\nset\nq\x01("
    + _many(20_000, b"h\x01h\x00\x85R")
    + b"l.",
    "a wide key": b"\x80\x02}(" + b"K\x01" * 100_000 + b"tq\x00" + _many(100_000, b"h\x00s") + b".",
    "deeply nested lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "doubled dictionaries": b"\x80\x02}U\x01wK\x01sq\x00"
    + b"".join(
        b"}(U\x01ah" + bytes([i]) + b"U\x01bh" + bytes([i]) + b"uq" + bytes([i + 1])
        for i in range(60)
    )
    + b".",
    "a wide dictionary next to a model again and again": b"\x80\x02}(U\x05model"
    + pickle.dumps({"w": np.ones(2)}, 2)[2:-1]
    + b"U\x01x}("
    + b"".join(b"U\x06%06dN" % i for i in range(50_000))
    + b"uq\x64"
    + b"".join(b"U\x06%06dh\x64" % i for i in range(1_000))
    + b"u.",
    "a list in itself": b"\x80\x02]q\x00h\x00a.",
    "a dictionary in itself": b"\x80\x02}q\x00U\x05modelh\x00s.",
    "four million steps": b"\x80\x02" + b"N0" * 2_000_000 + b"}.",
    "pops": b"\x80\x02000.",
    "marks": b"\x80\x02" + b"(" * 100_000 + b".",
    "a list handed to a placeholder again and again": b"\x80\x02("
    + b"K\x01" * 50_000
    + b"lq\x000cx\nY\nq\x01("
    + _many(20_000, b"h\x01h\x00\x85R")
    + b"l.",
    "a list as a placeholder's state again and again": b"\x80\x02("
    + b"K\x01" * 50_000
    + b"lq\x000cx\nY\n"
    + _many(200_000, b"h\x00b")
    + b".",
    "a placeholder called again and again": b"\x80\x02cx\nY\nq\x00("
    + _many(400_000, b"h\x00)R")
    + b"l.",
    "long names of placeholders": b"\x80\x04X\x60\0\0\0"
    + b"a" * 96
    + b"q\x000("
    + _many(300_000, b"h\x00h\x00\x93")
    + b"l.",
    "nothing": b"\x80\x02.",
    "no end": b"\x80\x02}",
    "protocol 5 buffers": b"\x80\x05\x97\x98.",
}


def _seconds_until_refused(path: Path) -> float:
    start = time.process_time()
    with pytest.raises(UserError, match=r"bomb\.pkl"):
        read_tensors(path)
    return time.process_time() - start


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.long
def test_a_pickle_bomb_is_rejected_immediately(name, tmp_path):
    path = tmp_path / "bomb.pkl"
    path.write_bytes(BOMBS[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Allow three attempts, because the machine may be busy.
    assert any(_seconds_until_refused(path) < 2 for _ in range(3))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB
