"""Tests that file formats are detected by content, and that errors explain how to fix problems."""

import dataclasses
import gzip
import hashlib
import json
import os
import pickle

import numpy as np
import pytest
import safetensors.torch
import torch

from senet_transfer.errors import UserError
from senet_transfer.utils.hashing import file_sha256, tensors_sha256
from senet_transfer.weights.formats.reader import check_values, read_tensors
from tests.weights.caffe_writer import CaffeNet


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "conv.weight": torch.randn(4, 3, 3, 3, generator=generator),
        "bn.running_var": torch.rand(4, generator=generator) + 0.5,
        "bn.num_batches_tracked": torch.tensor(7),
    }


def _write(path, kind: str) -> None:
    tensors = _tensors()
    if kind == "safetensors":
        safetensors.torch.save_file(tensors, path)
    elif kind == "pkl":
        path.write_bytes(pickle.dumps({"model": {k: v.numpy() for k, v in tensors.items()}}))
    elif kind == "caffemodel":
        net = CaffeNet("n")
        net.conv("conv", "data", tensors["conv.weight"].numpy())
        path.write_bytes(net.caffemodel())
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "pth")


KINDS = ("pth", "legacy", "safetensors", "pkl", "caffemodel")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pkl", ".caffemodel", ".txt", ""])
def test_the_format_is_detected_from_the_content_and_not_the_suffix(kind, suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    _write(path, kind)
    file = read_tensors(str(path))
    assert file.format == ("pth" if kind == "legacy" else kind)
    assert file.path == path
    name = "conv/weight" if kind == "caffemodel" else "conv.weight"
    assert torch.equal(file.tensors[name], _tensors()["conv.weight"])
    assert bool(file.layers) == (kind == "caffemodel")


def test_a_weight_file_is_immutable(tmp_path):
    _write(tmp_path / "a.pth", "pth")
    with pytest.raises(dataclasses.FrozenInstanceError):
        read_tensors(tmp_path / "a.pth").format = "pkl"


# Common wrappers around a state dict.


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: {"state_dict": t},
        lambda t: {"model": t, "optimizer": {"state": {0: {"momentum_buffer": torch.ones(9)}}}},
        lambda t: {"model_state": t, "epoch": 3},
        lambda t: {"model_state_dict": t},
        lambda t: {"net": t, "acc": 93.5},
        lambda t: {"blobs": t},
        lambda t: {"model": {"state_dict": t}},
        lambda t: {"my_network": t, "optimizer": {"a": torch.ones(2)}},
        lambda t: {"state_dict_ema": t},
        lambda t: {"state_dict": t, "state_dict_ema": {"x": torch.zeros(2)}},
        lambda t: {"state_dict": {f"module.{k}": v for k, v in t.items()}},
        lambda t: {f"_orig_mod.module.{k}": v for k, v in t.items()},
        lambda t: {"conv": {"weight": t["conv.weight"]}, "bn": {k[3:]: t[k] for k in list(t)[1:]}},
    ],
)
def test_wrappers_are_removed(wrap, tmp_path):
    torch.save(wrap(_tensors()), tmp_path / "a.pth")
    tensors = read_tensors(tmp_path / "a.pth").tensors
    assert list(tensors) == list(_tensors())
    assert all(torch.equal(tensors[name], value) for name, value in _tensors().items())


def test_a_prefix_that_not_every_name_has_is_kept(tmp_path):
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "a.pth")
    assert list(read_tensors(tmp_path / "a.pth").tensors) == ["module.a", "b"]


def test_plain_values_next_to_the_tensors_are_kept(tmp_path):
    own = {"family": "cadene", "geometry": {"stride_in_1x1": True}, "mean": [1.0, 2.0]}
    meta = {"classes": ["a", "b"], "time": "today", "seed": None}
    content = {"model": _tensors(), "senet_transfer": own, "meta": meta, "epoch": 4}
    torch.save(content, tmp_path / "a.pth")
    assert read_tensors(tmp_path / "a.pth").metadata == {
        "senet_transfer": own,
        "meta": meta,
        "epoch": 4,
    }
    safetensors.torch.save_file(
        _tensors(), tmp_path / "a", {"senet_transfer": json.dumps(own), "format": "pt"}
    )
    assert read_tensors(tmp_path / "a").metadata == {"senet_transfer": own, "format": "pt"}


# Broken files. The error names the file and explains how to fix the problem.

PAGE = "<!DOCTYPE html><html><head><title>Google Drive &amp; quota\n exceeded</title></head></html>"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22\n"
BROKEN = {
    "empty": (b"", "empty.*Download it again"),
    "web page": (PAGE.encode(), r'web page \("Google Drive & quota exceeded"\).*browser'),
    "web page without a title": (b"\n <html><body><h1>Not found</h1>", '"Not found"'),
    "git-lfs": (LFS.encode(), "git lfs pull"),
    "json": (b'{"error": "forbidden"}', 'text file that begins with ".*forbidden'),
    "text": ("Zugriff verweigert: ä".encode(), "Zugriff verweigert"),
    "zeros": (bytes(5000), "known format"),
    "noise": (bytes(np.random.default_rng(0).bytes(5000)), "known format"),
    "gzip": (gzip.compress(b"x" * 100), "gunzip"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
    "image": (b"\x89PNG\r\n\x1a\n" + bytes(100), "PNG image"),
    "array": (b"\x93NUMPY\x01\x00" + bytes(100), "numpy array"),
    "onnx": (b"\x08\x07\x12\x07pytorch\x1a\x051.9.0\x3a\x02\x0a\x00", "known format"),
    "empty zip": (b"PK\x05\x06" + bytes(18), "known format"),
    "header only": (b"\x10\0\0\0\0\0\0\0{", "damaged"),
    "lying header": (b"\xff\xff\xff\x05\0\0\0\0{}", "damaged"),
    "list": (pickle.dumps([1, 2]), "a list.*Expected a dictionary"),
    "one array": (pickle.dumps(np.ones(3)), "a single tensor"),
    "no tensors": (pickle.dumps({"epoch": 3}), r"contains no model tensors \(found: 'epoch'\)"),
    "no layers": (b"\x0a\x03net", "its layers contain no blobs"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_reported_with_its_content(name, tmp_path):
    content, expected = BROKEN[name]
    path = tmp_path / "se_resnet50.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"(?s)se_resnet50.pth:? .*{expected}"):
        read_tensors(path)


def test_a_missing_file_a_folder_and_a_device_are_reported(tmp_path):
    with pytest.raises(UserError, match=r"a\.pth does not exist"):
        read_tensors(tmp_path / "a.pth")
    with pytest.raises(UserError, match="a folder"):
        read_tensors(tmp_path)
    _write(tmp_path / "b.pth", "pth")
    with pytest.raises(UserError, match=r"a folder.*b\.pth"):
        read_tensors(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="not a regular file"):
        read_tensors(tmp_path / "pipe")
    with pytest.raises(UserError, match="Cannot read"):
        read_tensors(tmp_path / ("x" * 300))


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read all files")
def test_a_file_without_permission_is_reported(tmp_path):
    _write(tmp_path / "a.pth", "pth")
    (tmp_path / "a.pth").chmod(0)
    with pytest.raises(UserError, match="Cannot read"):
        read_tensors(tmp_path / "a.pth")


@pytest.mark.parametrize("kind", ["safetensors", "pkl"])
def test_a_file_truncated_anywhere_is_rejected(kind, tmp_path):
    path = tmp_path / "a"
    _write(path, kind)
    data = path.read_bytes()
    for end in {*range(0, len(data), 7), *range(64), *range(len(data) - 64, len(data))}:
        path.write_bytes(data[:end])
        with pytest.raises(UserError, match="/a[: ]"):
            read_tensors(path)


# Checksums.


@pytest.mark.parametrize("kind", KINDS)
def test_a_hash_file_next_to_the_file_is_verified(kind, tmp_path):
    path = tmp_path / "a.pth"
    _write(path, kind)
    (tmp_path / "a.pth.sha256").write_text(f"{file_sha256(path)}  a.pth\n")
    assert "sha256" in read_tensors(path).verified
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"SHA-256.*a\.pth\.sha256"):
        read_tensors(path)


def test_every_format_of_a_hash_file_is_supported(tmp_path):
    path = tmp_path / "a.pth"
    _write(path, "pth")
    digest, other = file_sha256(path), "0" * 64
    for text in (
        digest,
        digest.upper() + "\n",
        f"{digest} *a.pth",
        f"{other}  b.pth\n{digest}  ./a.pth\n",
        f"# comment\n\n{digest}  sub/a.pth",
    ):
        (tmp_path / "a.pth.sha256").write_text(text)
        assert read_tensors(path).verified == ("sha256", "zip CRC")
    for text in ("", f"{digest}  b.pth", "not a hash", digest[:60]):
        (tmp_path / "a.pth.sha256").write_text(text)
        with pytest.raises(UserError, match="sha256sum"):
            read_tensors(path)


def test_an_expected_hash_or_a_prefix_of_it_is_verified(tmp_path):
    path = tmp_path / "a.pth"
    _write(path, "pth")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for expected in (digest, digest[:8], digest[:10].upper()):
        assert "sha256" in read_tensors(path, sha256=expected).verified
    wrong = "0" if digest[0] != "0" else "1"
    with pytest.raises(UserError, match="was requested"):
        read_tensors(path, sha256=wrong + digest[1:8])
    for nonsense in ("", digest[:7], "xyz" * 4):
        with pytest.raises(UserError, match="8 to 64 hexadecimal digits"):
            read_tensors(path, sha256=nonsense)


@pytest.mark.parametrize("kind", ["safetensors", "pkl", "pth"])
def test_a_hash_in_own_metadata_is_verified(kind, tmp_path):
    tensors = _tensors() | {"half": torch.ones(3).bfloat16(), "none": torch.empty(0)}
    own = {"tensors_sha256": tensors_sha256(dict(reversed(tensors.items())))}
    path = tmp_path / "own"

    def write() -> None:
        if kind == "safetensors":
            metadata = {"senet_transfer": json.dumps(own)}
            safetensors.torch.save_file(tensors, path, metadata)
        elif kind == "pkl":
            arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
            path.write_bytes(pickle.dumps({"model": arrays, "senet_transfer": own}))
        else:
            torch.save({"model": tensors, "senet_transfer": own}, path)

    if kind == "pkl":  # numpy has no bfloat16
        tensors.pop("half")
        own["tensors_sha256"] = tensors_sha256(tensors)
    write()
    assert "sha256" in read_tensors(path).verified
    tensors["conv.weight"][0, 0, 0, 0] += 1
    write()
    with pytest.raises(UserError, match="does not match the one in"):
        read_tensors(path)


def test_the_kind_of_verification_is_reported(tmp_path):
    for kind, expected in (("pth", ("zip CRC",)), ("legacy", ("values",)), ("pkl", ("values",))):
        _write(tmp_path / kind, kind)
        assert read_tensors(tmp_path / kind).verified == expected


# Checks of values in files without a checksum.


@pytest.mark.parametrize(
    ("name", "value"),
    [("w", float("nan")), ("w", float("inf")), ("bn.running_var", -1.0), ("a_bn_riv", -1e-9)],
)
def test_impossible_values_are_named(name, value):
    tensors = {"fine": torch.ones(3), name: torch.tensor([1.0, value])}
    with pytest.raises(UserError, match=f"weights contains invalid values: {name} "):
        check_values(tensors)
    with pytest.raises(UserError, match="and 3 more"):
        check_values({f"{i}.{name}": tensors[name] for i in range(8)}, "file.pkl")


def test_valid_values_are_accepted():
    check_values(
        {
            "bn.running_mean": -torch.ones(3),
            "bn.running_var": torch.zeros(3),
            "big": torch.full((3,), 3e38),
            "half": torch.ones(2).half(),
            "empty": torch.empty(0),
            "count": torch.tensor(3),
        }
    )


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "pkl"])
def test_impossible_values_are_looked_for_in_every_format(kind, tmp_path):
    tensors = {"w": torch.tensor([1.0, float("nan")])}
    path = tmp_path / "a"
    if kind in ("zip", "legacy"):
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "zip")
    elif kind == "pkl":
        path.write_bytes(pickle.dumps({"w": tensors["w"].numpy()}))
    else:
        safetensors.torch.save_file(tensors, path)
    with pytest.raises(UserError, match=r"/a contains invalid values: w \(non-finite\)"):
        read_tensors(path)
