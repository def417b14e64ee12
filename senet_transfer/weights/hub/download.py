"""Atomic, verified file download over HTTPS, with resumption after interruptions.

Files in the catalogue are not downloaded with torch.hub or huggingface_hub. torch.hub does not
retry, and accepts a truncated file if there is no hash. huggingface_hub resumes without If-Range,
so it can mix parts of two files. Both follow redirects to plain HTTP, and accept a web page instead
of the file.
"""

import http.client
import logging
import os
import platform
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO

import portalocker

from senet_transfer.errors import UserError
from senet_transfer.utils.hashing import file_sha256
from senet_transfer.utils.progress import progress
from senet_transfer.utils.text import shown

logger = logging.getLogger(__name__)

ATTEMPTS = 3
TIMEOUT = 30.0  # seconds without receiving any data
PAUSE = 2.0  # seconds before the second attempt; later pauses are longer
# Time in seconds that other processes wait for a download. It is sufficient for a large file on a
# slow connection.
LOCK_TIMEOUT = 2 * 3600
_CHUNK = 2**20
_LOCAL = ("127.0.0.1", "localhost", "::1")
_TEMPORARY = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses
_PAGE_TYPES = ("text/html", "application/xhtml+xml")
_PAGE_STARTS = (b"<!doctype", b"<html")


class _DownloadError(Exception):
    """Error for a failed download.

    Attributes:
        temporary: Whether another attempt may succeed.
    """

    def __init__(self, message: str, *, temporary: bool = False):
        super().__init__(message)
        self.temporary = temporary


def fetch(url: str, path: Path, sha256: str | None, *, hint: str = "") -> Path:
    """Download a file unless it already exists.

    If several processes request the same file at once, it is downloaded only once. The file appears
    under its final name only when it is complete and, if ``sha256`` is given, verified. A failed
    download leaves only an empty lock file, ``.<name>.lock``.

    Args:
        url: URL of the file. It must use HTTPS, or HTTP if the server runs on this machine.
        path: Path of the file to create.
        sha256: Expected SHA-256 in hexadecimal, or its first digits; None if it is unknown.
        hint: Text to append to error messages.

    Returns:
        ``path``.

    Raises:
        UserError: If the download fails. The message contains the reason and explains how to
            download the file by hand.
    """
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f".{path.name}.lock")
        with portalocker.Lock(lock, timeout=LOCK_TIMEOUT, check_interval=0.2):
            if not path.is_file():  # another process may have downloaded it
                _download(url, path, sha256)
    except portalocker.LockException as error:
        raise UserError(
            f"{path} is being downloaded by another process, which has not finished after "
            f"{LOCK_TIMEOUT} s. Wait for that process, or terminate it."
        ) from error
    except _DownloadError as error:
        raise UserError(
            f"Cannot download {url}: {error}. Alternatively, download it by hand on any machine "
            f"and save it as {path} (the file name must match).{hint}"
        ) from error
    except OSError as error:
        raise UserError(
            f"Cannot write {path}: {error}. Free some disk space, set TORCH_HOME to a different "
            f"folder, or download {url} by hand and pass the path of the file.{hint}"
        ) from error
    return path


def check_sha256(path: Path, sha256: str | None, remedy: str = "") -> None:
    """Raise a UserError if a file's SHA-256 does not begin with ``sha256``."""
    if sha256 and not (found := file_sha256(path)).startswith(sha256):
        raise UserError(
            f"{path} is damaged or is not the expected file: its SHA-256 is {found}; expected a "
            f"hash that begins with {sha256}. {remedy or 'Delete the file to download it again.'}"
        )


def _download(url: str, path: Path, sha256: str | None) -> None:
    """Download to a temporary file, and rename the file if it is complete and verified."""
    _check_scheme(url)
    # File locks may not work between machines that share a disk.
    partial = path.with_name(f".{path.name}.{platform.node()}.partial")
    try:
        with open(partial, "wb") as file:
            _transfer(url, file)
            file.flush()
            os.fsync(file.fileno())
        found = file_sha256(partial)
        if sha256 and not found.startswith(sha256):
            raise _DownloadError(
                f"the received file ({partial.stat().st_size:,} bytes) has the SHA-256 {found}, "
                f"but its publisher specifies a hash that begins with {sha256}"
            )
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    if sha256 is None:
        logger.warning(
            "%s was not verified, because its publisher provides no hash. Its SHA-256 is %s.",
            path,
            found,
        )


def _check_scheme(url: str) -> None:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in _LOCAL):
        raise _DownloadError(f"the URL is {shown(url)}; expected a URL that starts with https://")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Redirect handler that follows https:// URLs, and http:// URLs only on this machine."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        _check_scheme(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _transfer(url: str, file: BinaryIO) -> None:
    """Download the content of ``url`` to a file, retrying if needed."""
    logger.info("Downloading %s", url)
    tag = ""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with _open(url, file.tell(), tag) as answer:
                tag = answer.getheader("ETag") or ""
                _receive(url, answer, file)
            return
        except _DownloadError as error:
            if attempt == ATTEMPTS or not error.temporary:
                raise
            logger.warning(
                "%s: %s. Retrying (attempt %d of %d).", url, error, attempt + 1, ATTEMPTS
            )
        time.sleep(PAUSE * attempt)


def _open(url: str, done: int, tag: str) -> http.client.HTTPResponse:
    """Request a file from byte ``done``, or from byte 0 if its ETag differs from ``tag``."""
    request = urllib.request.Request(url, headers={"User-Agent": "senet_transfer"})
    if done and tag and not tag.startswith("W/"):  # weak ETags do not guarantee equal bytes
        request.add_header("Range", f"bytes={done}-")
        request.add_header("If-Range", tag)
    try:
        return urllib.request.build_opener(_Redirects).open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        raise _DownloadError(
            f"the server returned {error.code} ({shown(error.reason)})",
            temporary=error.code in _TEMPORARY,
        ) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLError):
            raise _DownloadError(
                f"the server could not be authenticated: {error.reason}"
            ) from error
        raise _DownloadError(
            f"the server can't be reached ({shown(error.reason)})", temporary=True
        ) from error
    except (http.client.HTTPException, OSError) as error:
        raise _broken(error) from error


def _receive(url: str, answer: http.client.HTTPResponse, file: BinaryIO) -> None:
    """Append a response to a file, or start over if the server sends the whole file."""
    done = file.tell()
    if answer.status != 206 or not (answer.getheader("Content-Range") or "").startswith(
        f"bytes {done}-"
    ):
        done = file.seek(0)
        file.truncate()
    if answer.headers.get_content_type() in _PAGE_TYPES:
        raise _DownloadError("the server sent a web page instead of the file")
    length = answer.getheader("Content-Length") or ""
    total = done + int(length) if length.isdigit() else None
    with progress(desc=Path(url).name, initial=done, total=total, unit="B", unit_scale=True) as bar:
        for chunk in _chunks(answer):
            if not done and chunk.lstrip()[:9].lower().startswith(_PAGE_STARTS):
                raise _DownloadError("the server sent a web page instead of the file")
            done += file.write(chunk)
            bar.update(len(chunk))
    if total is not None and done < total:
        raise _DownloadError(
            f"the transfer ended after {done:,} of {total:,} bytes", temporary=True
        )
    if not done:
        raise _DownloadError("the received file is empty", temporary=True)


def _chunks(answer: http.client.HTTPResponse) -> Iterator[bytes]:
    """Yield the chunks of a response, and convert connection errors to _DownloadError."""
    try:
        while chunk := answer.read(_CHUNK):
            yield chunk
    except (http.client.HTTPException, OSError) as error:
        raise _broken(error) from error


def _broken(error: Exception) -> _DownloadError:
    words = shown(error) or type(error).__name__
    return _DownloadError(f"the connection was lost ({words})", temporary=True)
