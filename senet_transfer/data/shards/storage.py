"""Where data may be read from, and how: local files, http(s) and object stores.

Every path or address of shard data passes through `check_scheme`, so that none of the schemes that
run commands (`pipe:` in webdataset) is ever opened.
"""

import contextlib
import io
import logging
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from senet_transfer.errors import UserError

REMOTE_SCHEMES = ("http", "https", "s3", "gs", "gcs", "az", "abfs")

# One letter before the colon is a drive, not a scheme.
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemoteOptions:
    """Options for reading remote files.

    Attributes:
        options: arguments of fsspec's file system, such as `{"anon": True}` for a public bucket.
        retries: number of times that a failed read is retried before it is an error.
        backoff: seconds before the first retry; doubled for each further one, up to a minute.
        timeout: seconds without an answer over http(s) after which a read has failed.
    """

    options: dict[str, Any] = field(default_factory=dict)
    retries: int = 6
    backoff: float = 0.5
    timeout: float = 60.0


def check_scheme(url: str) -> str | None:
    """Returns the scheme of an address that may be read, None for a local path.

    Raises:
        UserError: the scheme is none that data is read from, such as `pipe:`.
    """
    match = _SCHEME.match(url)
    if match is None or match[1].lower() == "file":
        return None
    scheme = match[1].lower()
    if scheme not in REMOTE_SCHEMES:
        raise UserError(
            f"cannot read {url!r}: found the scheme {scheme}:, expected a local path or one of "
            f"{', '.join(REMOTE_SCHEMES)}. Addresses that run a command are never opened; copy "
            "the data to one of these."
        )
    return scheme


def is_remote(url: str) -> bool:
    """Says whether an address that may be read is on another machine."""
    return check_scheme(url) is not None


def local_path(url: str) -> Path:
    """The path of a local address, with or without `file:` before it."""
    return Path(re.sub(r"^file:(//(localhost)?)?", "", url, flags=re.IGNORECASE)).expanduser()


def join(base: str, name: str) -> str:
    """The address of a file in a folder; `name` comes from a manifest and is only ever a name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(
            f"{base} names a file {name!r}, expected a plain name of letters, digits and .-_ . "
            "The manifest was not written by this project, or was tampered with."
        )
    return f"{base.rstrip('/')}/{name}" if is_remote(base) else str(local_path(base) / name)


def open_stream(url: str, storage: RemoteOptions, size: int | None = None) -> BinaryIO:
    """Opens a file for reading from its start to its end.

    A remote file whose connection breaks is taken up again at the byte where it broke, so nothing
    is read twice and nothing is missed.

    Args:
        url: a local path or an address.
        storage: how remote files are read.
        size: in bytes where it is known; an end that comes earlier is a broken connection.

    Raises:
        UserError: there is no such file, or its scheme is not allowed.
    """
    if not is_remote(url):
        try:
            return open(local_path(url), "rb")
        except OSError as error:
            raise UserError(f"cannot open {url}: {error}. Check the path.") from error
    return io.BufferedReader(ResumingReader(url, storage, size), buffer_size=1 << 20)


def read_bytes(url: str, storage: RemoteOptions) -> bytes:
    """Reads a small file whole."""
    with open_stream(url, storage) as stream:
        return stream.read()


def read_range(url: str, storage: RemoteOptions, offset: int, size: int) -> bytes:
    """Reads `size` bytes at `offset`.

    Raises:
        UserError: the file cannot be read, or ends before.
    """
    if not is_remote(url):
        with open_stream(url, storage) as stream:
            stream.seek(offset)
            data = stream.read(size)
    else:
        reader = ResumingReader(url, storage, offset + size, start=offset)
        with io.BufferedReader(reader) as stream:
            data = stream.read(size)
    if len(data) != size:
        raise UserError(
            f"{url} ends at byte {offset + len(data)}, expected at least {offset + size}. It is "
            "not the file that was indexed; copy it again."
        )
    return data


def file_system(url: str, storage: RemoteOptions) -> fsspec.AbstractFileSystem:
    """The fsspec file system that serves an address.

    Raises:
        UserError: the package that serves its scheme is not installed.
    """
    scheme = check_scheme(url) or "file"
    try:
        options = dict(storage.options)
        if scheme.startswith("http"):
            import aiohttp

            # By default a whole file has five minutes, and a server that hangs has them too.
            limit = aiohttp.ClientTimeout(sock_connect=storage.timeout, sock_read=storage.timeout)
            options["client_kwargs"] = {"timeout": limit} | options.get("client_kwargs", {})
        return fsspec.filesystem(scheme, **options)
    except ImportError as error:
        package = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
        raise UserError(
            f"cannot read {url}: {error}. Reading {scheme}: addresses needs another package: "
            f"pip install {package.get(scheme, 'aiohttp')}"
        ) from error


class ResumingReader(io.RawIOBase):
    """A remote file read forwards, reopened at the same byte whenever the connection breaks."""

    def __init__(self, url: str, storage: RemoteOptions, size: int | None = None, start: int = 0):
        """
        Args:
            url: the address.
            storage: how often to retry, and how long to wait before.
            size: of the whole file, in bytes; None where it is not known.
            start: the byte to begin at.
        """
        self.url = url
        self.storage = storage
        self.size = size
        self.position = start
        self._file: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.size is not None and self.position >= self.size:
            return 0
        wanted = len(buffer)
        if self.size is not None:
            wanted = min(wanted, self.size - self.position)
        data = self._retried(wanted)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)

    def close(self) -> None:
        self._drop()
        super().close()

    def _retried(self, wanted: int) -> bytes:
        for attempt in range(self.storage.retries + 1):
            try:
                return self._read(wanted)
            except UserError:
                raise
            except Exception as error:  # each file system fails with exceptions of its own
                if _is_absent(error):
                    raise UserError(f"there is no {self.url}. Check the address.") from error
                if _is_denied(error):
                    raise UserError(
                        f"may not read {self.url}: {type(error).__name__}: {error}. Give this "
                        "process credentials that may, or anonymous access to what is public."
                    ) from error
                self._drop()
                failure = error
            if attempt < self.storage.retries:
                delay = min(self.storage.backoff * 2**attempt, 60.0)
                logger.warning(
                    "reading %s broke at byte %d (%s: %s); trying again in %.1f s",
                    *(self.url, self.position, type(failure).__name__, failure, delay),
                )
                time.sleep(delay)
        raise UserError(
            f"cannot read {self.url} beyond byte {self.position}: "
            f"{type(failure).__name__}: {failure}, after {self.storage.retries} retries. Check "
            "that the server is up and reachable; training resumes from its last checkpoint."
        ) from failure

    def _read(self, wanted: int) -> bytes:
        if self._file is None:
            self._file = self._open()
        data = self._file.read(wanted)
        if not data and self.size is not None:
            raise ConnectionError(f"the stream ended, expected {self.size} bytes")
        return data

    def _open(self) -> Any:
        system = file_system(self.url, self.storage)
        if not self.url.lower().startswith("http"):
            file = system.open(self.url, "rb")
            file.seek(self.position)
            return file
        if self.position:
            # Not every server can begin in the middle; one that cannot says so at the first read.
            with contextlib.suppress(ValueError):
                file = system.open(self.url, "rb", block_size=1 << 22, size=self.size)
                file.seek(self.position)
                file.read(1)
                file.seek(self.position)
                return file
        file = system.open(self.url, "rb", block_size=0)
        remaining = self.position
        while remaining:
            data = file.read(min(remaining, 1 << 20))
            if not data:
                raise ConnectionError("the stream ended while going back to where it broke")
            remaining -= len(data)
        return file

    def _drop(self) -> None:
        if self._file is not None:
            with contextlib.suppress(Exception):
                self._file.close()
        self._file = None


def _is_absent(error: BaseException) -> bool:
    """Says whether a server answered that there is no such file.

    Fsspec reports a server that does not answer as a missing file too; only the cause tells.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    return isinstance(error, FileNotFoundError) or getattr(error, "status", None) in (404, 410)


def _is_denied(error: BaseException) -> bool:
    """Says whether an error is about who asks, which no retry changes."""
    unknown = "Credentials" in type(error).__name__  # botocore's, which need not be installed
    return (
        unknown or isinstance(error, PermissionError) or getattr(error, "status", 0) in (401, 403)
    )
