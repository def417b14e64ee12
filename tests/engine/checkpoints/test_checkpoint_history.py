"""Tests for the checkpoint history: retention, fallback, deletion and verification."""

import logging

import pytest
import torch
from torch import nn

from senet_transfer import UserError
from senet_transfer.engine.checkpoints import checkpoint_history as history
from senet_transfer.engine.checkpoints.checkpointer import Checkpointer, UntaggedCheckpointer


@pytest.fixture
def saver(tmp_path, monkeypatch):
    """Return a function that saves a checkpoint of a tiny model for a given iteration."""
    monkeypatch.setattr(
        "senet_transfer.engine.checkpoints.checkpointer.model_metadata", lambda _, **__: {}
    )
    checkpointer = Checkpointer(nn.Linear(1, 1), str(tmp_path), keep=2)
    return lambda number: checkpointer.save(f"model_{number:07d}", iteration=number)


def names(folder):
    return sorted(path.name for path in folder.glob("model_*.pth"))


def test_only_the_newest_checkpoints_and_checksums_are_kept(saver, tmp_path):
    (tmp_path / "model_best.pth").write_bytes(b"best")
    for number in (1, 3, 5, 7):
        saver(number)
    assert names(tmp_path) == ["model_0000005.pth", "model_0000007.pth", "model_best.pth"]
    assert len(list(tmp_path.glob("*.sha256"))) == 2
    assert history.checkpoints(tmp_path) == ["model_0000007.pth", "model_0000005.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000007.pth"


def test_every_checksum_file_has_the_format_of_sha256sum(saver, tmp_path):
    saver(1)
    path = tmp_path / "model_0000001.pth"
    assert (tmp_path / "model_0000001.pth.sha256").read_text() == (
        f"{history.file_sha256(path)}  {path.name}\n"
    )
    assert torch.load(path, weights_only=True)["iteration"] == 1


def test_a_tag_that_was_reset_is_followed(saver, tmp_path):
    saver(1)
    saver(3)
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth\n")
    assert history.checkpoints(tmp_path) == ["model_0000001.pth"]
    saver(2)
    assert history.checkpoints(tmp_path) == ["model_0000002.pth", "model_0000001.pth"]
    assert names(tmp_path) == [f"model_000000{number}.pth" for number in (1, 2, 3)]


def test_a_file_that_is_written_again_is_the_newest(saver, tmp_path):
    saver(1)
    saver(3)
    saver(1)
    assert history.checkpoints(tmp_path) == ["model_0000001.pth", "model_0000003.pth"]


def test_paths_outside_the_folder_are_neither_read_nor_deleted(saver, tmp_path):
    outside = tmp_path.parent / "model_outside.pth"
    outside.write_bytes(b"precious")
    (tmp_path / "recent_checkpoints").write_text(f"../{outside.name}\n{outside}\nconfig.yaml\n")
    (tmp_path / "config.yaml").write_text("precious")
    for number in (1, 3, 5):
        saver(number)
    assert outside.read_bytes() == b"precious"
    assert (tmp_path / "config.yaml").is_file()
    assert len(names(tmp_path)) == 2


def test_a_new_run_has_nothing_to_resume_and_keeps_the_files(saver, tmp_path):
    saver(1)
    history.forget(tmp_path)
    assert history.checkpoints(tmp_path) == []
    assert names(tmp_path) == ["model_0000001.pth"]


def test_only_leftover_files_of_killed_processes_are_removed(saver, tmp_path):
    saver(1)
    left = [
        ".model_0000003.pth.abc.tmp",
        ".model_0000001.pth.sha256.x.tmp",
        ".last_checkpoint.x.tmp",
    ]
    for name in (*left, ".mine.tmp", "notes.tmp"):
        (tmp_path / name).write_text("x")
    history.sweep(tmp_path)
    assert {path.name for path in tmp_path.glob("*.tmp")} | {
        path.name for path in tmp_path.glob(".*.tmp")
    } == {".mine.tmp", "notes.tmp"}
    assert names(tmp_path) == ["model_0000001.pth"]


def test_the_checkpoint_before_a_damaged_one_is_used_with_a_warning(saver, tmp_path, caplog):
    saver(1)
    saver(3)
    path = tmp_path / "model_0000003.pth"
    path.write_bytes(path.read_bytes()[:-1])
    logging.getLogger("senet_transfer").propagate = True
    assert history.newest_whole(tmp_path).name == "model_0000001.pth"
    assert "model_0000003.pth has the SHA-256" in caplog.text
    (tmp_path / "model_0000001.pth").unlink()
    with pytest.raises(UserError, match="(?s)none of these checkpoints is intact.*SHA-256"):
        history.newest_whole(tmp_path)


def test_a_damaged_checkpoint_is_not_one_of_those_to_keep(saver, tmp_path):
    saver(1)
    saver(3)
    damaged = tmp_path / "model_0000003.pth"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    found = Checkpointer(nn.Linear(1, 1), str(tmp_path)).get_checkpoint_file()
    assert found == str(tmp_path / "model_0000001.pth")
    saver(2)
    assert history.checkpoints(tmp_path) == ["model_0000002.pth", "model_0000001.pth"]
    assert names(tmp_path) == [f"model_000000{number}.pth" for number in (1, 2, 3)]


def test_a_checkpoint_without_a_checksum_file_is_verified_by_its_own(saver, tmp_path):
    saver(1)
    path = tmp_path / "model_0000001.pth"
    (tmp_path / "model_0000001.pth.sha256").unlink()
    assert history.verify_checkpoint(path) == ""
    data = bytearray(path.read_bytes())
    data[data.index(b"iteration") + 12] ^= 1
    path.write_bytes(data)
    assert "is damaged" in history.verify_checkpoint(path)


def test_a_model_that_cannot_be_resumed_is_verified_too(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "senet_transfer.engine.checkpoints.checkpointer.model_metadata", lambda _, **__: {}
    )
    UntaggedCheckpointer(nn.Linear(1, 1), str(tmp_path)).save("model_best")
    assert history.checkpoints(tmp_path) == []
    assert history.verify_checkpoint(tmp_path / "model_best.pth") == ""
    assert (tmp_path / "model_best.pth.sha256").is_file()


def test_a_partial_last_line_is_removed(tmp_path):
    path = tmp_path / "metrics.json"
    history.drop_torn_line(path)
    for content, left in (("{}\n{}\n", "{}\n{}\n"), ('{}\n{"a', "{}\n"), ('{"a', ""), ("", "")):
        path.write_text(content)
        history.drop_torn_line(path)
        assert path.read_text() == left
