"""Tests that compare the reader for torch.save files with torch.load(weights_only=True)."""

import collections
import io
import pickle
import struct
import tarfile
import warnings
import zipfile

import numpy as np
import pytest
import torch

from senet_transfer.errors import UserError
from senet_transfer.utils.safe_pickle import Placeholder, load_plain
from senet_transfer.weights.formats.reader import read_tensors
from senet_transfer.weights.formats.torch_file import ALLOWED
from tests.weights.file_writers import (
    NEXT_TO_A_TORCH_MODEL,
    VALUES_NEXT_TO_A_MODEL,
    python2_torch_file,
    tar_torch_file,
)


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4, 6, generator=generator)
    tensors = {
        "conv.weight": torch.randn(4, 3, 3, 3, generator=generator),
        "bn.running_var": torch.rand(4, generator=generator) + 0.5,
        "bn.num_batches_tracked": torch.tensor(7),
        "view": base[1:3, 2:5],
        "transposed": base.t(),
        "expanded": base[:1, :1].expand(3, 2),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "tied": base,
        "parameter": torch.nn.Parameter(torch.randn(2, generator=generator)),
        "empty": torch.empty(0, 3),
        "half": base.half(),
        "bfloat16": base.bfloat16(),
        "double": base.double(),
        "bool": base > 0,
    }
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        tensors[str(dtype).removeprefix("torch.")] = torch.arange(5, dtype=dtype)
    return tensors


def _assert_same(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(tensors) == list(expected)
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor.detach()), name
        assert tensors[name].is_contiguous()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_torch_files_are_read_as_by_torch_load(zipped, protocol, tmp_path):
    path = tmp_path / "a.pth"
    torch.save(
        collections.OrderedDict(_tensors()),
        path,
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=zipped,
    )
    file = read_tensors(path)
    assert file.format == "pth"
    _assert_same(file.tensors, torch.load(path, weights_only=protocol == 2))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_model_is_extracted_from_a_trainers_checkpoint(zipped, tmp_path):
    # DataParallel uses the same tensor names, but would move the model to a GPU if there is one.
    network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    model = torch.nn.Sequential(collections.OrderedDict(module=network))
    optimizer = torch.optim.Adam(model.parameters())
    model.module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5])
    content = {
        "epoch": 3,
        "arch": "resnet50",
        "state_dict": model.state_dict(),
        "best_prec1": torch.tensor(75.5),
        "best_prec5": np.float64(92.5),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "meta": {"classes": ["a", "b"], "seed": None},
    }
    path = tmp_path / "checkpoint.pth.tar"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    file = read_tensors(path)
    _assert_same(file.tensors, model.module.state_dict())
    assert file.metadata == {
        "epoch": 3,
        "arch": "resnet50",
        "best_prec1": 75.5,
        "best_prec5": 92.5,
        "meta": {"classes": ["a", "b"], "seed": None},
    }


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("name", NEXT_TO_A_TORCH_MODEL)
@pytest.mark.long
def test_only_plain_values_of_objects_next_to_the_model_are_kept(name, protocol, zipped, tmp_path):
    path = tmp_path / "a.pth"
    torch.save(
        {"epoch": 3, "args": NEXT_TO_A_TORCH_MODEL[name](), "model": _tensors()},
        path,
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=zipped,
    )
    file = read_tensors(path)
    _assert_same(file.tensors, torch.load(path, weights_only=False)["model"])
    plain = VALUES_NEXT_TO_A_MODEL.get(name)
    assert file.metadata == {"epoch": 3} | ({"args": plain} if plain else {})


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "content",
    [
        torch.nn.Linear(2, 2),
        {"model": torch.nn.Linear(2, 2), "statistics": {"mean": torch.ones(2)}},
        {"ema": None, "model": torch.nn.DataParallel(torch.nn.Linear(2, 2))},
        {"state_dict": {"w": torch.ones(2), "layer": torch.nn.Linear(2, 2)}},
    ],
)
def test_a_model_object_is_rejected_by_name(content, zipped, tmp_path):
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"torch\.nn\..*whole model object.*state_dict"):
        read_tensors(tmp_path / "a.pth")


def _weights_only() -> dict[str, object]:
    """Return examples of the objects that ``torch.load(weights_only=True)`` accepts.

    The objects are keyed by a short description.
    """
    warnings.simplefilter("ignore")  # for quantized and nested tensors and typed storages
    attributed = torch.ones(2)
    attributed.note = "text"
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.is_shared = True
    matrix = torch.eye(3)
    return {
        "complex": 1 + 2j,
        "bytes": b"ab",
        "bytearray": bytearray(b"ab"),
        "set": {1, "a", (2, 3)},
        "Counter": collections.Counter("aab"),
        "OrderedDict": collections.OrderedDict(a=1),
        "keys": {None: 1, 2.5: 2, (1, "a"): 3, torch.float32: 4, torch.ones(2): 5},
        "dtypes": [torch.float32, torch.complex64, torch.uint16, torch.float8_e5m2, torch.qint8],
        "device": torch.device("cuda:1"),
        "Size": torch.Size([1, 2]),
        "layout": torch.sparse_coo,
        "scheme": torch.per_tensor_affine,
        "complex tensor": torch.ones(2, dtype=torch.complex64),
        "complex tensors": [torch.ones(2, dtype=torch.complex128)] * 2,
        "uint16": torch.ones(3, dtype=torch.uint16),
        "float8": torch.ones(3, dtype=torch.float8_e4m3fn),
        "sparse": matrix.to_sparse(),
        "sparse csr": matrix.to_sparse_csr(),
        "quantized": torch.quantize_per_tensor(matrix, 1.0, 0, torch.quint8),
        "quantized int32": torch.quantize_per_tensor(matrix, 1.0, 0, torch.qint32),
        "quantized 4 bits": torch.quantize_per_channel(
            matrix, torch.ones(3), torch.zeros(3), 0, torch.quint4x2
        ),
        "meta": torch.ones(2, device="meta"),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "attributed": attributed,
        "parameter": parameter,
        "untyped storage": torch.ones(2).untyped_storage(),
        "storage": torch.FloatStorage([1.0, 2.0]),
        "buffer": torch.nn.Buffer(torch.ones(2)),
    }


with warnings.catch_warnings():
    _WEIGHTS_ONLY = _weights_only()
# PyTorch can't load these values from its legacy format, because they use untyped storages.
_ONLY_ZIPPED = {"uint16", "float8", "nested", "untyped storage"}


@pytest.mark.parametrize(
    ("name", "zipped"),
    [(n, z) for n in _WEIGHTS_ONLY for z in (True, False) if z or n not in _ONLY_ZIPPED],
)
# Ignore warnings about sparse, quantized and nested tensors and typed storages.
@pytest.mark.filterwarnings("ignore")
def test_objects_that_weights_only_allows_are_accepted_next_to_the_model(name, zipped, tmp_path):
    path = tmp_path / "a.pth"
    content = {"model": _tensors(), "extra": [_WEIGHTS_ONLY[name]]}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    expected = torch.load(path, weights_only=True)["model"]
    _assert_same(read_tensors(path).tensors, expected)


class _OnDevice:
    """Stand-in for a TPU tensor, which torch_xla saves as a call that rebuilds the tensor."""

    def __init__(self, function: str, data):
        self.call = getattr(torch._utils, function), (data, torch.float32, "cpu", False)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("numpy", [False, True])
def test_tensors_of_other_devices_and_with_attributes_are_read_as_by_torch(numpy, tmp_path):
    path, weight = tmp_path / "a.pth", torch.randn(2, 3)
    attributed = torch.randn(3)
    attributed.partition = 1
    function = f"_rebuild_device_tensor_from_{'numpy' if numpy else 'cpu_tensor'}"
    moved = _OnDevice(function, weight.numpy() if numpy else weight)
    torch.save({"fc.weight": moved, "fc.bias": attributed}, path)
    expected = torch.load(path, weights_only=not numpy)
    assert torch.equal(expected["fc.weight"], weight)
    _assert_same(read_tensors(path).tensors, expected)


def test_python_2_files_are_read(tmp_path):
    tensors = {f"module.{name}": tensor for name, tensor in _tensors().items()}
    tensors.pop("module.bfloat16")
    python2_torch_file(
        {"state_dict": tensors, "arch": "resnet50", "best_prec1": np.float64(54.7), "name": "\xe9"},
        tmp_path / "a.pth.tar",
    )
    file = read_tensors(tmp_path / "a.pth.tar")
    _assert_same(file.tensors, {k.removeprefix("module."): v for k, v in tensors.items()})
    assert file.metadata == {"arch": "resnet50", "best_prec1": 54.7, "name": "\xe9"}


def test_the_tar_format_is_read_as_by_torch_load(tmp_path):
    tensors = {"a.weight": torch.randn(3, 4), "a.bias": torch.arange(5), "b": torch.randn(()) + 1}
    path = tmp_path / "a.pth.tar"
    tar_torch_file(tensors, path, arch="alexnet")
    expected = torch.load(path, weights_only=False)
    file = read_tensors(path)
    assert file.format == "pth"
    assert file.metadata == {"arch": "alexnet"}
    _assert_same(file.tensors, expected["state_dict"])
    _assert_same(file.tensors, tensors)


def test_tied_tensors_stay_tied_and_others_own_their_memory(tmp_path):
    weight = torch.randn(3, 3)
    torch.save({"a": weight, "b": weight, "c": weight[0]}, tmp_path / "a.pth")
    tensors = read_tensors(tmp_path / "a.pth").tensors
    assert tensors["a"].data_ptr() == tensors["b"].data_ptr()
    assert tensors["c"].untyped_storage().nbytes() == 12
    tensors["a"].add_(1)


def test_loaded_tensors_outlive_the_file(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"a": torch.ones(1000)}, path)
    tensors = read_tensors(path).tensors
    path.write_bytes(b"")  # accessing mapped pages of a truncated file would kill the process
    assert tensors["a"].sum() == 1000


def test_only_the_model_s_tensors_are_read_into_memory(tmp_path, monkeypatch):
    content = {"state_dict": {"w": torch.ones(7)}, "optimizer": {"momentum": torch.ones(9)}}
    lengths = []
    read = torch.frombuffer
    for zipped in (True, False):
        torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
        with monkeypatch.context() as patched:
            patched.setattr(
                torch, "frombuffer", lambda raw, **kw: lengths.append(len(raw)) or read(raw, **kw)
            )
            read_tensors(tmp_path / "a.pth")
    assert lengths == [28, 28]


@pytest.mark.parametrize("view", [("1", 2, 3), ("1", 4, 3), ("1", -1, 3), ("1", 0, 2**62)])
def test_a_view_of_a_storage_is_read_in_the_legacy_format(view, tmp_path):
    # PyTorch before 0.4 wrote views of a storage in this form. torch.load still reads it.
    path = tmp_path / "a.pth"
    storage = _Storage("FloatStorage", "0", 6)
    storage.identity = (*storage.identity, view)
    body = _pickled({"w": _Rebuilt(storage, 0, (3,), (1,)), "x": _Rebuilt(storage, 1, (2,), (1,))})
    head = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    with path.open("wb") as file:
        for part in (*(pickle.dumps(value, 2) for value in head), body, pickle.dumps(["0"], 2)):
            file.write(part)
        file.write(struct.pack("<q6f", 6, *range(6)))
    if view[1] != 2:
        with pytest.raises(UserError, match="damaged"):
            read_tensors(path)
        return
    tensors = read_tensors(path).tensors
    _assert_same(tensors, torch.load(path, weights_only=False))
    assert tensors["w"].tolist() == [2, 3, 4]
    assert tensors["x"].untyped_storage().nbytes() == 8


# Damage.


def _byte_range(path, name: str) -> range:
    """Return the range of a record's bytes in a zip file."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        info = next(i for i in archive.infolist() if i.filename.endswith(name))
        file.seek(info.header_offset + 26)
        name_length, extra_length = struct.unpack("<HH", file.read(4))
        start = info.header_offset + 30 + name_length + extra_length
        return range(start, start + info.file_size)


def _flip(path, place: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def test_a_flipped_weight_byte_that_torch_ignores_is_detected(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"state_dict": {"w": torch.ones(1000)}}, path)
    _flip(path, _byte_range(path, "data/0")[500], bit=3)
    loaded = torch.load(path, weights_only=True)["state_dict"]["w"]
    assert not torch.equal(loaded, torch.ones(1000))
    with pytest.raises(UserError, match="damaged.*CRC"):
        read_tensors(path)


@pytest.mark.parametrize("record", ["data/0", "data/1", "data.pkl", "version"])
def test_a_flipped_byte_of_any_record_is_detected(record, tmp_path):
    path = tmp_path / "a.pth"
    content = {"state_dict": {"w": torch.ones(9)}, "optimizer": {"momentum": torch.ones(9)}}
    torch.save(content, path)
    for place in _byte_range(path, record):
        _flip(path, place)
        with pytest.raises(UserError):
            read_tensors(path)
        _flip(path, place)
    read_tensors(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_truncated_anywhere_is_rejected(zipped, tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"w": torch.ones(50)}, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    for end in {*range(0, len(data), 7), *range(64), *range(len(data) - 64, len(data))}:
        path.write_bytes(data[:end])
        with pytest.raises(UserError, match=r"a\.pth"):
            read_tensors(path)


def test_other_archives_are_rejected_with_a_remedy(tmp_path):
    inner = tmp_path / "weights.pth"
    torch.save({"w": torch.ones(2)}, inner)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(inner, "weights.pth")
    with pytest.raises(UserError, match="weights.pth.*unpack"):
        read_tensors(tmp_path / "a.zip")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(inner, "weights.pth")
    with pytest.raises(UserError, match="weights.pth.*unpack"):
        read_tensors(tmp_path / "a.tar")
    with zipfile.ZipFile(inner) as old, zipfile.ZipFile(tmp_path / "c.pth", "w", 8) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(UserError, match="compression"):
        read_tensors(tmp_path / "c.pth")
    np.savez(tmp_path / "a.npz", w=np.ones(2))
    with pytest.raises(UserError, match=r"not written by torch.save.*from_numpy.*a\.npz"):
        read_tensors(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "a.pt2", "w") as archive:
        archive.writestr("a/archive_format", "pt2")
    with pytest.raises(UserError, match=r"torch\.export\.load\(\"a\.pt2\"\)\.state_dict"):
        read_tensors(tmp_path / "a.pt2")


def test_a_torchscript_program_is_rejected(tmp_path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "a.pt")
    with pytest.raises(UserError, match="TorchScript"):
        read_tensors(tmp_path / "a.pt")


# Inconsistent files. If a tensor is larger than its data, torch.load returns arbitrary values.


class _Storage:
    def __init__(self, kind: str, key: str, numel: int):
        self.identity = ("storage", getattr(torch, kind), key, "cpu", numel)


class _Rebuilt:
    def __init__(self, *arguments):
        self.arguments = (*arguments, False, collections.OrderedDict())

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments


def _pickled(content) -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return obj.identity if isinstance(obj, _Storage) else None

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump(content)
    return buffer.getvalue()


def _zip(path, content, records: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", _pickled(content))
        archive.writestr("a/version", "3\n")
        for name, raw in records.items():
            archive.writestr(f"a/{name}", raw)


@pytest.mark.parametrize(
    ("offset", "shape", "strides", "stated", "stored"),
    [
        (0, (1000,), (1,), 4, 4),  # the tensor is larger than its data
        (1, (4,), (1,), 4, 4),
        (0, (2, 2), (3, 1), 4, 4),
        (0, (4,), (1,), 1000, 4),  # data is missing
        (0, (4,), (1,), 2**40, 4),
        (0, (4,), (1,), 4, 8),
        (0, (-4,), (1,), 4, 4),
        (0, (4,), (-1,), 4, 4),
        (-1, (2,), (1,), 4, 4),
        (0, (4,), (), 4, 4),
        (0, (2**31, 2**31), (0, 0), 4, 4),  # strides of 0 repeat one number over exabytes
        (0, (1,) * 40, (1,) * 40, 4, 4),
        (0, (4.0,), (1,), 4, 4),
    ],
)
def test_a_tensor_that_does_not_fit_its_data_is_rejected(
    offset, shape, strides, stated, stored, tmp_path
):
    path = tmp_path / "a.pth"
    tensor = _Rebuilt(_Storage("FloatStorage", "0", stated), offset, shape, strides)
    _zip(path, {"state_dict": {"w": tensor}}, {"data/0": bytes(4 * stored)})
    with pytest.raises(UserError, match="damaged"):
        read_tensors(path)


class _Called:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class _Built(_Rebuilt):
    def __init__(self, state, *arguments):
        super().__init__(*arguments)
        self.state = state

    def __reduce__(self):
        return (*super().__reduce__(), self.state)


def _doubled(levels: int) -> tuple:
    nested = ("x",)
    for _ in range(levels):
        nested = (nested, nested)
    return nested


_ONE = _Storage("FloatStorage", "0", 1)


@pytest.mark.parametrize(
    "content",
    [
        {"w": _Rebuilt(_Storage("FloatStorage", _doubled(60), 1), 0, (1,), (1,))},
        {"w": _Rebuilt(_Storage("FloatStorage", b"0", 1), 0, (1,), (1,))},
        {"w": _Rebuilt("0", 0, (1,), (1,))},
        {"w": _Rebuilt(_ONE, 0, {"a": 1}, (1,))},
        {"w": _Rebuilt(_ONE, 0, (2**70,), (0,))},
        {"w": _Rebuilt(_ONE, 0, (True,), (1,))},
        {"w": _Built((_ONE, 0, (9,), (1,)), _ONE, 0, (1,), (1,))},
        {"w": _Built({"size": 9}, _ONE, 0, (1,), (1,))},
        {"w": _Built((None, {"build": None}), _ONE, 0, (1,), (1,))},
        {"w": _Rebuilt(_ONE, 0, (1,), (1,)), "d": _Called(torch.device, [_doubled(60)])},
        {"w": _Rebuilt(_ONE, 0, (1,), (1,)), "d": _Called(torch.Size, [_doubled(60)])},
        {"a": _ONE, "w": _Rebuilt(_Storage("FloatStorage", "0", 2), 0, (1,), (1,))},
        {"a": _ONE, "w": _Rebuilt(_Storage("IntStorage", "0", 1), 0, (1,), (1,))},
    ],
)
def test_invalid_references_and_arguments_are_rejected(content, tmp_path):
    path = tmp_path / "a.pth"
    _zip(path, {"state_dict": content}, {"data/0": bytes(4)})
    with pytest.raises(UserError, match="damaged"):
        read_tensors(path)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("quantized", r"torch\._utils\._rebuild_qtensor.*before its quantization"),
        ("sparse", r"torch\._utils\._rebuild_sparse_tensor.*to_dense\(\)"),
        ("meta", r"torch\._utils\._rebuild_meta_tensor.*no values"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*quantiz")
def test_sparse_and_quantised_tensors_are_rejected_by_name(kind, expected, tmp_path):
    tensor = torch.ones(2, 2)
    if kind == "sparse":
        tensor = tensor.to_sparse()
    elif kind == "meta":
        tensor = tensor.to("meta")
    else:
        tensor = torch.quantize_per_tensor(tensor, 1.0, 0, torch.qint8)
    torch.save({"w": tensor}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=expected):
        read_tensors(tmp_path / "a.pth")


def _rezipped(path, change) -> None:
    """Write a torch file whose zip directory has been made inconsistent by ``change``."""
    tensor = _Rebuilt(_Storage("FloatStorage", "0", 250), 0, (250,), (1,))
    _zip(path, {"w": tensor}, {"data/0": bytes(1000)})
    assert list(read_tensors(path).tensors) == ["w"]
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a/other", b"")
        change(archive, archive.getinfo("a/data/0"))


def _overlap(archive, info):
    for i in range(50):
        copy = zipfile.ZipInfo(f"a/data/x{i}")
        for name in ("header_offset", "CRC", "compress_size", "file_size"):
            setattr(copy, name, getattr(info, name))
        archive.filelist.append(copy)


def _duplicate(archive, info):
    with pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("a/data/0", bytes(1000))


def _encrypt(archive, info):
    info.flag_bits |= 1


def _two_sizes(archive, info):
    info.file_size = 2**40


def _huge(archive, info):
    info.file_size = info.compress_size = 2**40


def _another_folder(archive, info):
    info.filename = "b/data/0"


@pytest.mark.parametrize(
    "change", [_overlap, _duplicate, _encrypt, _two_sizes, _huge, _another_folder]
)
def test_a_zip_with_inconsistent_records_is_rejected(change, tmp_path):
    path = tmp_path / "a.pth"
    _rezipped(path, change)
    with pytest.raises(UserError, match="damaged"):
        read_tensors(path)


def test_a_big_endian_file_is_rejected(tmp_path):
    tensor = _Rebuilt(_Storage("FloatStorage", "0", 1), 0, (1,), (1,))
    _zip(tmp_path / "a.pth", {"w": tensor}, {"data/0": bytes(4), "byteorder": b"big"})
    with pytest.raises(UserError, match="big-endian"):
        read_tensors(tmp_path / "a.pth")


def test_only_functions_that_create_tensors_are_called_for_a_tensor_with_attributes():
    # Encoding the same text again and again would exceed the memory that the file's size justifies.
    text = b"X" + struct.pack("<I", 200_000) + b"a" * 200_000 + b"X\x06\0\0\0latin1\x86q\x000"
    call = b"ctorch._tensor\n_rebuild_from_type_v2\n(c_codecs\nencode\nctorch\nTensor\nh\x00NtR"
    read = load_plain(io.BytesIO(b"\x80\x02" + text + b"(" + call * 300 + b"l."), "a", ALLOWED)
    assert len(read) == 300
    assert {type(value) for value in read} == {Placeholder}


def test_many_views_of_few_bytes_are_rejected(tmp_path):
    storage = _Storage("FloatStorage", "0", 250_000)
    views = {f"w{i}": _Rebuilt(storage, 0, (249_999,), (1,)) for i in range(1000)}
    _zip(tmp_path / "a.pth", {"state_dict": views}, {"data/0": bytes(1_000_000)})
    with pytest.raises(UserError, match="memory"):
        read_tensors(tmp_path / "a.pth")
