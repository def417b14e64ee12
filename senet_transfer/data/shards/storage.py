"""Functions for reading from local files, HTTP(S) servers and object stores.

Every path or URL of shard data is checked with `check_scheme`, which rejects schemes that run
commands, such as webdataset's `pipe:`.
"""

import contextlib
import io
import logging
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from senet_transfer.errors import UserError

REMOTE_SCHEMES = ("http", "https", "s3", "gs", "gcs", "az", "abfs")

# Pattern for file names in a shard folder. The names must be valid in paths and URLs.
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

# A single letter before the colon is a drive letter, not a scheme.
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):")

# Number of simultaneous requests in a search for missing files.
_REQUESTS = 8

logger = logging.getLogger(__name__)


class AbsentFileError(UserError):
    """Error raised if a remote file does not exist."""


@dataclass(frozen=True)
class RemoteOptions:
    """Options for reading remote files.

    Attributes:
        options: Arguments for the fsspec file system, such as `{"anon": True}` for a public bucket.
        retries: Number of retries after a failed read.
        backoff: Delay before the first retry in seconds. The delay doubles with each further retry,
            up to one minute.
        timeout: Time in seconds to wait for an HTTP(S) response before a read fails.
    """

    options: dict[str, Any] = field(default_factory=dict)
    retries: int = 6
    backoff: float = 0.5
    timeout: float = 60.0


def check_scheme(url: str) -> str | None:
    """Return the scheme of a URL, or None for a local path.

    Raises:
        UserError: If the scheme is not allowed, such as `pipe:`.
    """
    match = _SCHEME.match(url)
    if match is None or match[1].lower() == "file":
        return None
    scheme = match[1].lower()
    if scheme not in REMOTE_SCHEMES:
        raise UserError(
            f"Cannot read {url!r}: the scheme '{scheme}:' is not supported; expected a local path "
            f"or one of {', '.join(REMOTE_SCHEMES)}. For security, URLs that run a "
            "command, such as pipe:, are rejected. Copy the data to a supported location."
        )
    return scheme


def is_remote(url: str) -> bool:
    """Return True for a remote URL and False for a local path.

    Raises:
        UserError: If the scheme is not allowed.
    """
    return check_scheme(url) is not None


def local_path(url: str) -> Path:
    """Convert a local path or a `file:` URL to a path."""
    return Path(re.sub(r"^file:(//(localhost)?)?", "", url, flags=re.IGNORECASE)).expanduser()


def join(base: str, name: str) -> str:
    """Return the path or URL of a file in a folder.

    Raises:
        UserError: If `name`, which comes from a manifest, is not a plain file name.
    """
    if not PLAIN_NAME.fullmatch(name):
        raise UserError(
            f"The manifest of {base} lists the file {name!r}; expected a plain name that consists "
            "of letters, digits, '.', '-' and '_'. The manifest was not written by this project, "
            "or was tampered with. Prepare the data again."
        )
    return f"{base.rstrip('/')}/{name}" if is_remote(base) else str(local_path(base) / name)


def open_stream(url: str, storage: RemoteOptions, size: int | None = None) -> BinaryIO:
    """Open a file for sequential reading.

    If the connection to a server breaks, reading resumes at the same byte.

    Args:
        url: Local path or remote URL.
        storage: Options for reading remote files.
        size: File size in bytes, if known. A stream that ends earlier is treated as a broken
            connection.

    Raises:
        UserError: If the file does not exist, or its scheme is not allowed.
    """
    if not is_remote(url):
        try:
            return open(local_path(url), "rb")
        except OSError as error:
            raise UserError(f"Cannot open {url}: {error}. Check the path.") from error
    return io.BufferedReader(ResumingReader(url, storage, size), buffer_size=1 << 20)


def read_bytes(url: str, storage: RemoteOptions) -> bytes:
    """Read a complete file into memory."""
    with open_stream(url, storage) as stream:
        return stream.read()


def read_range(url: str, storage: RemoteOptions, offset: int, size: int) -> bytes:
    """Read `size` bytes of a file, starting at `offset`.

    Raises:
        UserError: If the file cannot be read or is too short.
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
            f"{url} ends at byte {offset + len(data)}; expected at least {offset + size}. The "
            "file does not match its index. Copy it again."
        )
    return data


def file_system(url: str, storage: RemoteOptions) -> fsspec.AbstractFileSystem:
    """Return the fsspec file system for a URL.

    Raises:
        UserError: If the package that supports the URL's scheme is not installed.
    """
    scheme = check_scheme(url) or "file"
    try:
        options = dict(storage.options)
        if scheme.startswith("http"):
            import aiohttp

            # The default timeout of five minutes applies to the whole file. This is too short for a
            # large file, and too long for a server that does not respond.
            limit = aiohttp.ClientTimeout(sock_connect=storage.timeout, sock_read=storage.timeout)
            options["client_kwargs"] = {"timeout": limit} | options.get("client_kwargs", {})
        return fsspec.filesystem(scheme, **options)
    except ImportError as error:
        package = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
        raise UserError(
            f"Cannot read {url}: {error}. URLs with the scheme {scheme} require an "
            f"additional package. Install it with pip install {package.get(scheme, 'aiohttp')}"
        ) from error


def missing_files(urls: Sequence[str], storage: RemoteOptions) -> list[str]:
    """Return the URLs at which no file exists. All URLs must be on the same server.

    The result is empty if the server does not respond. In this case, reading fails later, after
    retries.
    """

    def is_missing(url: str) -> bool:
        try:
            system.info(url)
        except Exception as error:  # file systems raise exceptions of many types
            if _is_absent(error):
                return True
            raise
        return False

    if not urls:
        return []
    system = file_system(urls[0], storage)
    with ThreadPoolExecutor(_REQUESTS) as pool:
        try:
            found = list(pool.map(is_missing, urls))
        except Exception as error:
            logger.info("Can't check whether remote shards such as %s exist: %s", urls[0], error)
            return []
    return [url for url, missing in zip(urls, found, strict=True) if missing]


class ResumingReader(io.RawIOBase):
    """Sequential remote file reader that resumes at the same byte after a broken connection."""

    def __init__(self, url: str, storage: RemoteOptions, size: int | None = None, start: int = 0):
        """
        Args:
            url: URL of the file.
            storage: Options for reading remote files.
            size: Size of the complete file in bytes; None if unknown.
            start: Offset of the first byte to read.
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
            except Exception as error:  # file systems raise exceptions of many types
                if _is_absent(error):
                    raise AbsentFileError(f"{self.url} does not exist. Check the URL.") from error
                if _is_denied(error):
                    raise UserError(
                        f"Access to {self.url} was denied: {type(error).__name__}: {error}. "
                        "Provide credentials, or use anonymous access for public data."
                    ) from error
                self._drop()
                failure = error
            if attempt < self.storage.retries:
                delay = min(self.storage.backoff * 2**attempt, 60.0)
                logger.warning(
                    "Reading %s failed at byte %d (%s: %s); retrying in %.1f s",
                    *(self.url, self.position, type(failure).__name__, failure, delay),
                )
                time.sleep(delay)
        raise UserError(
            f"Cannot read {self.url} beyond byte {self.position} after {self.storage.retries} "
            f"retries: {type(failure).__name__}: {failure}. Check that the server is reachable. "
            "Training can be resumed from its last checkpoint."
        ) from failure

    def _read(self, wanted: int) -> bytes:
        if self._file is None:
            self._file = self._open()
        data = self._file.read(wanted)
        if not data and self.size is not None:
            raise ConnectionError(f"the stream ended early; expected {self.size} bytes")
        return data

    def _open(self) -> Any:
        system = file_system(self.url, self.storage)
        if not self.url.lower().startswith("http"):
            file = system.open(self.url, "rb")
            file.seek(self.position)
            return file
        if self.position:
            # Some servers do not support range requests. In this case, fsspec raises ValueError on
            # the first read.
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
                raise ConnectionError("the stream ended before the position to resume from")
            remaining -= len(data)
        return file

    def _drop(self) -> None:
        if self._file is not None:
            with contextlib.suppress(Exception):
                self._file.close()
        self._file = None


def _is_absent(error: BaseException) -> bool:
    """Return True if a server reported that the file does not exist.

    fsspec also raises FileNotFoundError if a server does not respond, so the cause is checked.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    return isinstance(error, FileNotFoundError) or getattr(error, "status", None) in (404, 410)


def _is_denied(error: BaseException) -> bool:
    """Return True for an authentication or authorization error. These errors are not retried."""
    # Checked by name because botocore may not be installed.
    unknown = "Credentials" in type(error).__name__
    return (
        unknown or isinstance(error, PermissionError) or getattr(error, "status", 0) in (401, 403)
    )
