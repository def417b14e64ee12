"""Tests for downloads from a local server that simulates the failures of real servers."""

import hashlib
import multiprocessing
import os
import socket

import pytest

from senet_transfer import UserError
from senet_transfer.weights.hub import download
from senet_transfer.weights.hub.download import fetch
from tests.weights.web import serving

BODY = os.urandom(3 * 2**20)
HASH = hashlib.sha256(BODY).hexdigest()[:8]


@pytest.fixture
def site():
    with serving() as site:
        yield site


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0.01)
    monkeypatch.setattr(download, "TIMEOUT", 5.0)


def _left(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_a_file_is_downloaded_completely_and_once(site, tmp_path):
    url = site.add("a.pth", BODY)
    path = fetch(url, tmp_path / "cache" / "a.pth", HASH)
    assert path.read_bytes() == BODY
    assert _left(path.parent) == ["a.pth"]
    fetch(url, path, HASH)
    assert len(site.asked) == 1


@pytest.mark.long
def test_concurrent_processes_download_a_file_once(site, tmp_path, capfd):
    url = site.add("a.pth", BODY)
    # Fork the processes, so that they do not have to import all modules again.
    context = multiprocessing.get_context("fork")
    arguments = (url, tmp_path / "a.pth", HASH)
    processes = [context.Process(target=fetch, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(site.asked) == 1
    assert (tmp_path / "a.pth").read_bytes() == BODY
    assert "%|" not in capfd.readouterr().err  # no progress bar outside a terminal


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_transfer_is_resumed_or_restarted(site, tmp_path, ranges):
    site.breaks, site.ranges = 1, ranges
    path = fetch(site.add("a.pth", BODY), tmp_path / "a.pth", HASH)
    assert path.read_bytes() == BODY
    assert site.asked == [("/a.pth", None), ("/a.pth", f"bytes={len(BODY) // 2}-")]


def test_a_file_without_a_strong_etag_is_never_resumed(site, tmp_path):
    site.breaks, site.ranges = 1, True
    fetch(site.add("a.pth", BODY, ETag='W/"1"'), tmp_path / "a.pth", None)
    assert site.asked == [("/a.pth", None)] * 2


def test_a_transfer_that_keeps_breaking_leaves_nothing(site, tmp_path):
    site.breaks = 99
    with pytest.raises(UserError, match="transfer ended after 1,572,864 of 3,145,728 bytes"):
        fetch(site.add("a.pth", BODY), tmp_path / "a.pth", HASH)
    assert len(site.asked) == download.ATTEMPTS
    assert _left(tmp_path) == []


def test_a_wrong_hash_leaves_nothing(site, tmp_path):
    with pytest.raises(
        UserError,
        match="has the SHA-256 .*but its publisher specifies a hash that begins with 12345678",
    ):
        fetch(site.add("a.pth", BODY), tmp_path / "a.pth", "12345678")
    assert _left(tmp_path) == []


@pytest.mark.parametrize(
    ("page", "words", "attempts"),
    [
        ({"body": b"gone", "status": 404}, "returned 404", 1),
        ({"body": b"busy", "status": 503}, "returned 503", 3),
        ({"body": b"<p>log in", "Content_Type": "text/html; charset=utf-8"}, "a web page", 1),
        ({"body": b"\n<!DOCTYPE html><html>"}, "a web page", 1),
        ({"body": b""}, "is empty", 3),
        ({"body": b"", "status": 302, "Location": "http://example.com/a.pth"}, "https://", 1),
        ({"body": b"", "status": 302, "Location": "file:///etc/passwd"}, "Redirection", 1),
    ],
    ids=["missing", "busy", "declared page", "page", "empty", "unencrypted", "file"],
)
def test_invalid_responses_are_rejected_with_url_and_path(site, tmp_path, page, words, attempts):
    url = site.add("a.pth", **page)
    with pytest.raises(UserError, match=words) as error:
        fetch(url, tmp_path / "a.pth", None, hint=" Note: this.")
    assert url in str(error.value)
    assert str(tmp_path / "a.pth") in str(error.value)
    assert str(error.value).endswith("Note: this.")
    assert _left(tmp_path) == []
    assert len(site.asked) == attempts


def test_being_offline_is_an_error_with_a_remedy(tmp_path):
    with serving() as site:
        url = site.address("a.pth")
    with pytest.raises(UserError, match="the server can't be reached") as error:
        fetch(url, tmp_path / "a.pth", HASH)
    assert f"save it as {tmp_path / 'a.pth'}" in str(error.value)


@pytest.mark.parametrize("url", ["http://example.com/a.pth", "ftp://x/a", "file:///etc/passwd"])
def test_unencrypted_urls_are_rejected(url, tmp_path):
    with pytest.raises(UserError, match="https://"):
        fetch(url, tmp_path / "a", None)


def test_a_server_that_stops_responding_times_out(site, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    half = site.add("a.pth", BODY, Content_Length=str(2 * len(BODY)), Connection="keep-alive")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for url in (half, f"http://127.0.0.1:{silent.getsockname()[1]}/a.pth"):
            with pytest.raises(UserError, match="Cannot download .*timed out"):
                fetch(url, tmp_path / "a.pth", HASH)


def test_a_file_without_a_hash_is_reported_as_unverified(site, tmp_path, caplog):
    fetch(site.add("a.pth", BODY), tmp_path / "a.pth", None)
    assert "not verified, because its publisher provides no hash" in caplog.text
    assert HASH in caplog.text


def test_a_folder_that_cannot_be_written_is_named(site, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write.*TORCH_HOME"):
        fetch(site.add("a.pth", BODY), tmp_path / "file" / "a.pth", HASH)
