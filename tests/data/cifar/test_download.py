"""Tests for downloading CIFAR with torchvision, using a local server."""

import functools
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from senet_transfer import UserError
from senet_transfer.cli.data import prepare
from senet_transfer.data.build import find_dataset
from senet_transfer.data.cifar import archives
from senet_transfer.data.cifar.in_memory import load_images, split_file
from senet_transfer.data.cifar.prepare import read_source
from tests.data.cifar.cifar_files import CLASSES, expected, make_official, python2_files, write_tar

FORMS = {"cifar10": "cifar-10-python", "cifar100": "cifar-100-python"}


@pytest.fixture(params=FORMS)
def served(request, tmp_path, monkeypatch) -> Iterator[tuple[str, Path, list[str]]]:
    """Serve a dataset's archive on a local HTTP server.

    Yields:
        The dataset's name, the archive's path, and a list of the requests' HTTP methods.
    """
    name, requests = request.param, []
    dataset, form = archives.DOWNLOADS[name], FORMS[name]
    (tmp_path / "site").mkdir()
    path = tmp_path / "site" / dataset.filename
    files = python2_files(form)
    write_tar(path, files, folder=dataset.base_folder)
    make_official(form, path, monkeypatch, files)
    monkeypatch.setattr(archives, "IMAGE_COUNTS", {"train": 20, "test": 5})

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            requests.append(self.command)

    handler = functools.partial(Handler, directory=str(path.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{dataset.filename}"
        monkeypatch.setattr(dataset, "url", url)
        yield name, path, requests
        server.shutdown()


def test_the_official_archive_is_downloaded_once_and_prepared(served, tmp_path, monkeypatch):
    name, _, requests = served
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "data"))
    with pytest.raises(UserError, match=f"senet data cifar --download {name}`, or correct"):
        find_dataset(f"{name}_train")
    prepare("cifar", ["--download", name])
    assert "GET" in requests
    assert find_dataset(f"{name}_train") == str(split_file(tmp_path / "data" / name, "train"))
    data = load_images(split_file(tmp_path / "data" / name, "train"))
    images, labels = expected(FORMS[name])
    assert list(data.classes) == CLASSES
    assert torch.equal(data.images, torch.from_numpy(images))
    assert data.labels.tolist() == labels.tolist()
    requests.clear()
    prepare("cifar", ["--download", name])
    assert requests == []


def test_torchvisions_arrays_equal_the_readers(served, tmp_path):
    name, path, _ = served
    archives.download_cifar(name, tmp_path / "root")
    for source in (path, tmp_path / "root"):
        splits = read_source(source)
        for split, data in splits.items():
            known = archives.DOWNLOADS[name](tmp_path / "root", train=split == "train")
            assert torch.equal(data.images.permute(0, 2, 3, 1), torch.from_numpy(known.data))
            assert data.labels.tolist() == known.targets
            assert list(data.classes) == known.classes


@pytest.mark.parametrize("change", ["cut", "replaced", "gone"])
def test_a_download_that_fails_or_has_another_checksum_is_an_error(change, served, tmp_path):
    name, path, _ = served
    content = path.read_bytes()
    if change == "gone":
        path.unlink()
    elif change == "cut":
        path.write_bytes(content[:-100])
    else:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"Cannot download .*--source"):
        archives.download_cifar(name, tmp_path / "root")
    assert not (tmp_path / "root" / archives.DOWNLOADS[name].base_folder).exists()
    path.write_bytes(content)
    assert archives.download_cifar(name, tmp_path / "root").is_dir()


def test_unpacked_files_with_another_checksum_are_reported(served, tmp_path, caplog):
    name, _, _ = served
    folder = archives.download_cifar(name, tmp_path / "root")
    read_source(folder)
    assert caplog.messages == []
    split = archives.DOWNLOADS[name].test_list[0][0]
    data = (folder / split).read_bytes()
    (folder / split).write_bytes(data.replace(b"x.png", b"y.png"))
    assert len(read_source(folder)["test"]) == 5
    assert caplog.messages == [
        f"{folder}: the MD5 checksum of {split} differs from that of the official file"
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [([], "--source requires --output"), (["--download", "cifar10"], "not allowed with")],
)
def test_a_source_requires_an_output_folder_and_no_download(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        prepare("cifar", ["--source", str(tmp_path), *words])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
