"""Tests that remote shards give the same results as local ones, even if connections break."""

import contextlib
import http.server
import logging
import os
import re
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path

import pytest

from senet_transfer.data.classification.loader import (
    build_classification_eval_loader,
    build_classification_train_loader,
)
from senet_transfer.data.classification.open import open_dataset
from senet_transfer.data.images.transforms import EvalTransform, TrainTransform
from senet_transfer.data.shards import storage as storage_module
from senet_transfer.data.shards.cache import ShardCache
from senet_transfer.data.shards.storage import RemoteOptions
from senet_transfer.errors import UserError

HASTY = RemoteOptions(retries=3, backoff=0.01, timeout=1)


class Server:
    """Local HTTP server that records requests and can break connections.

    Attributes:
        address: URL of the root folder.
        requests: Requested paths, in order.
        ranges: Whether range requests are supported.
        break_after: Number of bytes after which the transfer of a tar file is cut off. If None,
            transfers are not cut off.
        breaks: Number of transfers that are still to be cut off.
        heads: Whether HEAD requests are supported.
        failing: Whether requests for tar files fail with status 500.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.requests: list[str] = []
        self.ranges = True
        self.break_after: int | None = None
        self.breaks = 0
        self.heads = True
        self.failing = False
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):  # noqa: N802
                outer.answer(self, body=True)

            def do_HEAD(self):  # noqa: N802
                outer.answer(self, body=False)

            def log_message(self, *args):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(self, handler, body):
        path = self.folder / handler.path.lstrip("/")
        if body:
            self.requests.append(handler.path)
        status = 0 if path.is_file() else 404
        status = 500 if self.failing and path.suffix == ".tar" else status
        status = status if body or self.heads else 405
        if status:
            handler.send_error(status)
            return
        data = path.read_bytes()
        match = re.match(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", ""))
        if match and self.ranges:
            begin, end = int(match[1]), int(match[2] or len(data) - 1)
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {begin}-{end}/{len(data)}")
            data = data[begin : end + 1]
        else:
            handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        if self.ranges:
            handler.send_header("Accept-Ranges", "bytes")
        handler.end_headers()
        if not body:
            return
        if path.suffix == ".tar" and self.break_after is not None and self.breaks > 0:
            self.breaks -= 1
            data = data[: self.break_after]
            handler.close_connection = True
        with contextlib.suppress(OSError):
            handler.wfile.write(data)

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve():
    """Return a function that serves a folder over HTTP."""
    servers = []

    def start(folder):
        servers.append(Server(folder))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def evaluated(dataset, workers=0):
    loader = build_classification_eval_loader(
        dataset,
        batch_size=5,
        transform=EvalTransform(resize=24, crop=16),
        num_workers=workers,
    )
    return [
        (key, label, image.numpy().tobytes())
        for batch in loader
        for key, label, image in zip(
            batch["key"], batch["label"].tolist(), batch["image"], strict=True
        )
    ]


def trained(dataset, batches=9, **options):
    loader = build_classification_train_loader(
        dataset, batch_size=6, transform=TrainTransform(size=16), seed=0, **options
    )
    return [
        (batch["key"], batch["label"].tolist(), batch["image"].numpy().tobytes())
        for batch in islice(loader, batches)
    ]


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.long
def test_http_gives_the_same_tensors_as_the_disk(make_shards, serve, workers, ranges):
    folder = make_shards(24, 3)
    server = serve(folder)
    server.ranges = ranges
    local, remote = open_dataset(folder), open_dataset(server.address)
    assert evaluated(remote, workers) == evaluated(local, workers)
    assert trained(remote, num_workers=workers) == trained(local, num_workers=workers)
    assert trained(remote, start_iter=3) == trained(local, start_iter=3)


@pytest.mark.long
def test_class_aware_sampling_reads_single_images_over_http(make_shards, serve):
    folder = make_shards(24, 3)
    server = serve(folder)
    remote = trained(open_dataset(server.address), batches=3, class_aware=True)
    assert remote == trained(open_dataset(folder), batches=3, class_aware=True)


@pytest.mark.parametrize("form", ["{}/", "{}/manifest.json"])
def test_the_url_can_end_in_a_slash_or_name_the_manifest(make_shards, serve, form):
    folder = make_shards(6, 2)
    assert len(open_dataset(form.format(serve(folder).address))) == 6


def test_single_shards_can_be_named(make_shards, serve):
    folder = make_shards(24, 3)
    some = open_dataset(serve(folder).address + "/val-000001.tar")
    assert evaluated(some) == evaluated(open_dataset(folder / "val-000001.tar"))
    assert len(some) == 8
    assert len(open_dataset(folder / "val-00000[01].tar")) == 16
    assert len(open_dataset(serve(folder).address + "/val-00000{0..1}.tar")) == 16


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("break_after", [0, 700, 9000])
@pytest.mark.long
def test_a_broken_connection_is_resumed_without_duplicate_samples(
    make_shards, serve, tmp_path, caplog, break_after, cached, ranges
):
    folder = make_shards(24, 3)
    expected = evaluated(open_dataset(folder))
    server = serve(folder)
    server.break_after, server.breaks, server.ranges = break_after, 3, ranges
    cache_dir = tmp_path / "cache" if cached else None
    found = evaluated(open_dataset(server.address, storage=HASTY, cache_dir=cache_dir))
    assert found == expected
    assert server.breaks == 0
    assert "retrying" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.long
def test_a_server_that_fails_mid_epoch_is_retried_then_a_clear_error(
    make_shards, serve, caplog, workers
):
    folder = make_shards(24, 12)
    server = serve(folder)
    loader = build_classification_train_loader(
        open_dataset(server.address, storage=HASTY),
        batch_size=2,
        transform=TrainTransform(size=16),
        seed=0,
        num_workers=workers,
    )
    started = time.monotonic()
    delivered = []

    def run():
        for batch in islice(loader, 100):
            delivered.extend(batch["key"])
            server.close()

    with pytest.raises(UserError, match="Cannot read http.*after 3 retries") as caught:
        run()
    assert "Traceback" not in str(caught.value)
    assert time.monotonic() - started < 60
    assert len(set(delivered)) == len(delivered) < 24


def test_a_server_that_recovers_does_not_change_the_batches(make_shards, serve):
    folder = make_shards(24, 3)
    expected = trained(open_dataset(folder), batches=4)
    server = serve(folder)
    dataset = open_dataset(server.address, storage=RemoteOptions(retries=8, backoff=0.05))
    server.break_after, server.breaks = 0, 5
    assert trained(dataset, batches=4) == expected


def test_a_missing_url_is_reported_immediately(serve, tmp_path):
    server = serve(tmp_path)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"http.*manifest\.json does not exist.*data manifest"):
        open_dataset(server.address + "/nowhere")
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("heads", [True, False])
def test_missing_shards_are_named_at_start_unless_cached(make_shards, serve, tmp_path, heads):
    folder = make_shards(24, 3)
    server = serve(folder)
    server.heads = heads
    expected = evaluated(open_dataset(server.address, cache_dir=tmp_path / "cache"))
    for name in ("val-000000.tar", "val-000002.tar"):
        (folder / name).unlink()
    names = r"2 of 3 shards.*val-000000\.tar, http.*val-000002\.tar"
    with pytest.raises(UserError, match=names):
        open_dataset(server.address)
    assert len(open_dataset(server.address + "/val-000001.tar")) == 8
    cached = open_dataset(server.address, cache_dir=tmp_path / "cache")
    assert evaluated(cached) == expected


def test_server_errors_are_not_reported_as_missing_shards(make_shards, serve, caplog):
    server = serve(make_shards(24, 3))
    server.failing = True
    with caplog.at_level(logging.INFO):
        dataset = open_dataset(server.address, storage=HASTY)
    assert "Can't check whether remote shards" in caplog.text
    with pytest.raises(UserError, match="after 3 retries"):
        evaluated(dataset)


def test_the_second_pass_reads_from_the_cache(make_shards, serve, tmp_path):
    folder = make_shards(24, 3)
    server = serve(folder)
    first = evaluated(open_dataset(server.address, cache_dir=tmp_path / "cache"))
    server.requests.clear()
    assert evaluated(open_dataset(server.address, cache_dir=tmp_path / "cache")) == first
    assert [path for path in server.requests if path.endswith(".tar")] == []


def test_two_data_sets_with_equal_shard_names_do_not_collide(make_shards, serve, tmp_path):
    folders = [make_shards(12, 2, seed=seed) for seed in (0, 1)]
    for folder in (*folders, *folders):
        remote = open_dataset(serve(folder).address, cache_dir=tmp_path / "cache")
        assert evaluated(remote) == evaluated(open_dataset(folder))


def test_a_url_with_new_content_is_copied_again(make_shards, serve, tmp_path):
    old, new = (make_shards(12, 2, seed=seed) for seed in (0, 1))
    server = serve(old)
    assert len(evaluated(open_dataset(server.address, cache_dir=tmp_path / "cache"))) == 12
    server.folder = new
    remote = open_dataset(server.address, cache_dir=tmp_path / "cache")
    assert evaluated(remote) == evaluated(open_dataset(new))


@pytest.mark.long
def test_workers_copy_each_shard_once(make_shards, serve, tmp_path):
    folder = make_shards(24, 1)
    server = serve(folder)
    dataset = open_dataset(server.address, cache_dir=tmp_path / "cache")
    assert len(evaluated(dataset, workers=3)) == 24
    assert server.requests.count("/val-000000.tar") == 1


def test_a_copy_that_contradicts_the_manifest_is_rejected_and_removed(make_shards, serve, tmp_path):
    folder = make_shards(24, 1)
    tar = folder / "val-000000.tar"
    data = bytearray(tar.read_bytes())
    data[5000] ^= 1
    tar.write_bytes(data)
    dataset = open_dataset(serve(folder).address, cache_dir=tmp_path / "cache")
    with pytest.raises(UserError, match="has SHA-256 .* the hash in the manifest"):
        evaluated(dataset)
    assert [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"] == []


def test_a_partial_copy_is_never_read(make_shards, serve, tmp_path):
    folder = make_shards(24, 1)
    server = serve(folder)
    dataset = open_dataset(server.address, cache_dir=tmp_path / "cache")
    expected = evaluated(dataset)
    (copy,) = (tmp_path / "cache").glob("*.tar")
    copy.write_bytes(copy.read_bytes()[:4096])
    assert evaluated(dataset) == expected


def test_an_unwritable_cache_is_reported(make_shards, serve, tmp_path):
    (tmp_path / "file").write_text("in the way")
    dataset = open_dataset(serve(make_shards(6, 1)).address, cache_dir=tmp_path / "file" / "cache")
    with pytest.raises(UserError, match="Cannot cache"):
        evaluated(dataset)


def test_the_cache_path_depends_on_url_and_content(make_shards, tmp_path):
    shard = open_dataset(make_shards(6, 1)).manifest.shards[0]
    other = type(shard)(shard.name, shard.samples, shard.bytes, "0" * 64, shard.class_counts)
    cache = ShardCache(tmp_path)
    places = {cache.path(url, s) for url in ("http://a/x", "http://b/x") for s in (shard, other)}
    assert len(places) == 4


# Object storage.


MOTO = """
import threading
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print("http://%s:%d" % server.get_host_and_port(), flush=True)
threading.Event().wait()
"""


@pytest.fixture
def bucket(monkeypatch):
    """Run a local S3 server; yield an upload function, client options and a function to kill it."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    # Use a separate process, which can be killed. A thread would keep serving open connections.
    with subprocess.Popen([sys.executable, "-c", MOTO], stdout=subprocess.PIPE) as server:
        endpoint = server.stdout.readline().decode().strip()
        client = boto3.client("s3", endpoint_url=endpoint)
        client.create_bucket(Bucket="places")

        def upload(folder):
            for path in folder.iterdir():
                client.upload_file(str(path), "places", f"val/{path.name}")
            return "s3://places/val"

        options = {
            "client_kwargs": {"endpoint_url": endpoint},
            "config_kwargs": {"retries": {"max_attempts": 0}, "connect_timeout": 2},
        }
        yield upload, RemoteOptions(options, retries=2, backoff=0.01), server.kill
        server.kill()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.long
def test_s3_gives_the_same_tensors_as_the_disk(make_shards, bucket, tmp_path, workers):
    upload, storage, _ = bucket
    folder = make_shards(24, 3)
    address = upload(folder)
    local = open_dataset(folder)
    for cache_dir in (None, tmp_path / "cache"):
        remote = open_dataset(address, storage=storage, cache_dir=cache_dir)
        assert evaluated(remote, workers) == evaluated(local, workers)
        assert trained(remote, num_workers=workers) == trained(local, num_workers=workers)
    remote = trained(open_dataset(address, storage=storage), class_aware=True)
    assert remote == trained(local, class_aware=True)


@pytest.mark.long
def test_an_s3_server_that_fails_is_a_clear_error(make_shards, bucket):
    upload, storage, kill = bucket
    dataset = open_dataset(upload(make_shards(24, 12)), storage=storage)
    delivered = []
    loader = build_classification_train_loader(
        dataset, batch_size=2, transform=TrainTransform(size=16), seed=0
    )

    def run():
        for batch in islice(loader, 100):
            delivered.extend(batch["key"])
            kill()

    with pytest.raises(UserError, match="Cannot read s3://places/val/.*after 2 retries"):
        run()
    assert len(set(delivered)) == len(delivered) < 24


@pytest.mark.long
def test_missing_credentials_are_reported_immediately(bucket, make_shards, monkeypatch):
    upload, storage, _ = bucket
    address = upload(make_shards(4, 1))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", "/nonexistent")
    storage.options["skip_instance_cache"] = True
    with pytest.raises(UserError, match="Access to s3://places/val/manifest.json was denied"):
        open_dataset(address, storage=storage)


def test_a_missing_package_is_named(monkeypatch):
    def absent(scheme, **options):
        raise ImportError(f"Install what serves {scheme}")

    monkeypatch.setattr(storage_module.fsspec, "filesystem", absent)
    with pytest.raises(UserError, match="pip install s3fs"):
        open_dataset("s3://places/val")
    with pytest.raises(UserError, match="pip install aiohttp"):
        open_dataset("https://example.org/places")
