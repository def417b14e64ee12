"""Tests for atomic file writing."""

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from senet_transfer.utils.atomic_io import atomic_file, atomic_path, write_json


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_gets_its_name_when_it_is_complete(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with atomic_file(path) as stream:
        stream.write(b"half")
        stream.flush()
        assert path.read_bytes() == b"before"
        stream.write(b" and half")
    assert path.read_bytes() == b"half and half"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_a_failure_keeps_the_old_file_and_leaves_nothing_else(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def fail():
        with atomic_file(path) as stream:
            stream.write(b"half")
            raise error

    with pytest.raises(type(error)) as raised:
        fail()
    assert raised.value is error
    assert path.read_bytes() == b"before"
    assert names(tmp_path) == ["file"]


def test_the_first_error_is_raised_if_the_cleanup_fails_too(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("the disk is gone")

    monkeypatch.setattr(os, "unlink", fail)
    with pytest.raises(ValueError, match="first"), atomic_path(tmp_path / "file"):
        raise ValueError("first")


def test_concurrent_writers_do_not_mix_their_content(tmp_path):
    path = tmp_path / "file"
    with atomic_file(path) as one, atomic_file(path) as other:
        one.write(b"one")
        other.write(b"other")
    assert path.read_bytes() in (b"one", b"other")
    assert names(tmp_path) == ["file"]


def test_content_and_name_are_synced_to_disk_in_this_order(tmp_path, monkeypatch):
    calls = []

    def recorded(name):
        function = getattr(os, name)

        def call(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, recorded(name))
    with atomic_file(tmp_path / "file") as stream:
        stream.write(b"content")
    assert calls == ["fsync", "replace", "fsync"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_file_permissions_follow_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_json(tmp_path / "a.json", {"b": 1})
        with atomic_path(tmp_path / "a.safetensors") as partial:
            save_file({"x": torch.ones(2)}, partial)
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == mode
    assert load_file(tmp_path / "a.safetensors")["x"].tolist() == [1, 1]


def test_json_has_lists_of_numbers_on_one_line_and_unescaped_strings(tmp_path):
    strings = ["scan [ 12 ].jpg", "[ 1.0, 2 ]", "[\n 3\n]"]
    value = {"strings": strings, "box": [1.5, None, -2]}
    write_json(tmp_path / "a", value)
    text = (tmp_path / "a").read_text()
    assert json.loads(text) == value
    assert '"box": [1.5, null, -2]\n' in text


def test_json_has_the_same_bytes_for_any_order_of_keys(tmp_path):
    for name, value in {"a": {"x": 1, "y": 2}, "b": {"y": 2, "x": 1}}.items():
        write_json(tmp_path / name, value, indent=1, sort_keys=True)
        assert (tmp_path / name).read_text() == '{\n "x": 1,\n "y": 2\n}\n'
