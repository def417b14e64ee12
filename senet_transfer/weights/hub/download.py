"""Fetching one file from the web: whole, verified and once, or not at all."""

import hashlib
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

import portalocker

from senet_transfer.errors import UserError
from senet_transfer.utils.hashing import file_sha256
from senet_transfer.utils.progress import progress
from senet_transfer.utils.text import shown

logger = logging.getLogger(__name__)

ATTEMPTS = 3
TIMEOUT = 30.0  # seconds without a byte
# Between attempts, in seconds, longer with each.
PAUSE = 2.0
# One process downloads at a time; the others wait, as long as a large file on a slow line takes.
LOCK_TIMEOUT = 2 * 3600
_CHUNK = 2**20
_LOCAL = ("127.0.0.1", "localhost", "::1")
_PASSING = (408, 425, 429, 500, 502, 503, 504)


class _FinalError(Exception):
    """What trying again will not change."""


class _PassingError(Exception):
    """What may be over at the next attempt."""


def fetch(url: str, path: Path, sha256: str | None, *, hint: str = "") -> Path:
    """Downloads a file, unless it is there.

    Several processes that ask for the same file download it once. It appears under its name when
    it is whole and, where ``sha256`` is given, verified; a download that fails leaves nothing.

    Args:
        url: its address, https; http on this machine alone.
        path: where it goes.
        sha256: its SHA-256 in hexadecimal, or the beginning of it; None where none is known.
        hint: said at the end of an error.

    Returns:
        ``path``.

    Raises:
        UserError: it can't be had. The message says why, and how to get it by hand.
    """
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f".{path.name}.lock")
        with portalocker.Lock(lock, timeout=LOCK_TIMEOUT, check_interval=0.2):
            if not path.is_file():  # or another process was first
                _download_whole(url, path, sha256)
    except portalocker.LockException as error:
        raise UserError(
            f"{path} is being downloaded by another process, and was not there after "
            f"{LOCK_TIMEOUT} s. Wait for that one, or end it."
        ) from error
    except (_FinalError, _PassingError) as error:
        raise UserError(
            f"{url} can't be downloaded: {error}. To get it by hand, download that address "
            f"elsewhere and put the file at {path} (its name matters).{hint}"
        ) from error
    except OSError as error:
        raise UserError(
            f"{path} can't be written: {error}. Make room or set TORCH_HOME to another folder, or "
            f"download {url} by hand and give the file's path.{hint}"
        ) from error
    return path


def _download_whole(url: str, path: Path, sha256: str | None) -> None:
    """Downloads beside the file's place, and moves it there when all went well."""
    partial = path.with_name(f".{path.name}.{platform.node()}.partial")
    try:
        found = _download(url, partial, sha256)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    if sha256 is None:
        logger.warning(
            "%s is not verified: its publisher states no hash. Its SHA-256 is %s.", path, found
        )


def check_sha256(path: Path, sha256: str | None) -> None:
    """Raises UserError where a file's SHA-256 does not begin with ``sha256``."""
    if sha256 and not (found := file_sha256(path)).startswith(sha256):
        raise UserError(
            f"{path} is damaged or another file: its SHA-256 is {found}, expected {sha256}... "
            "Remove it, and it is downloaded again."
        )


def _download(url: str, partial: Path, sha256: str | None) -> str:
    """Downloads to ``partial``, with several attempts, and returns the SHA-256 of what came."""
    _check_scheme(url)
    logger.info("Downloading %s", url)
    transfer = _Transfer(url, partial)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            transfer.run()
            break
        except _PassingError as error:
            if attempt == ATTEMPTS:
                raise
            logger.warning("%s: %s. Trying again (%d of %d).", url, error, attempt + 1, ATTEMPTS)
            time.sleep(PAUSE * attempt)
    found = transfer.digest.hexdigest()
    if sha256 and not found.startswith(sha256):
        raise _FinalError(
            f"what came ({transfer.done:,} bytes) has the SHA-256 {found}, and {sha256}... is what "
            "the publisher states"
        )
    return found


def _check_scheme(url: str) -> None:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in _LOCAL):
        raise _FinalError(f"its address has to begin with https://, and is {shown(url)}")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirections, but not to an address that is not encrypted."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        _check_scheme(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Transfer:
    """One file on its way; what came before a break is kept and the rest asked for."""

    def __init__(self, url: str, partial: Path):
        self.url, self.partial = url, partial
        self.opener = urllib.request.build_opener(_Redirects)
        self._restart()

    def _restart(self) -> None:
        self.done, self.tag, self.digest = 0, "", hashlib.sha256()

    def run(self) -> None:
        """One attempt, at the end of which the file is whole."""
        request = urllib.request.Request(self.url, headers={"User-Agent": "senet_transfer"})
        if self.done and self.tag:
            # The rest of the very same file, or else the server sends all of it again.
            request.add_header("Range", f"bytes={self.done}-")
            request.add_header("If-Range", self.tag)
        try:
            with self.opener.open(request, timeout=TIMEOUT) as answer:
                self._receive(answer)
        except urllib.error.HTTPError as error:
            kind = _PassingError if error.code in _PASSING else _FinalError
            raise kind(f"the server answers {error.code} ({shown(error.reason)})") from error
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLError):
                raise _FinalError(f"the server can't be trusted: {error.reason}") from error
            raise _PassingError(
                f"there is no connection to the server ({shown(error.reason)})"
            ) from error
        except (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
            raise _PassingError(f"the connection broke ({_words(error)})") from error

    def _receive(self, answer: http.client.HTTPResponse) -> None:
        if answer.status != 206 or not (answer.getheader("Content-Range") or "").startswith(
            f"bytes {self.done}-"
        ):
            self._restart()
        kind = answer.headers.get_content_type()
        if kind in ("text/html", "application/xhtml+xml"):
            raise _FinalError("a web page came instead of the file")
        tag = answer.getheader("ETag") or ""
        self.tag = "" if tag.startswith("W/") else tag
        length = answer.getheader("Content-Length")
        total = self.done + int(length) if length and length.isdigit() else None
        with (
            open(self.partial, "ab" if self.done else "wb") as file,
            progress(
                desc=Path(self.url).name, initial=self.done, total=total, unit="B", unit_scale=True
            ) as bar,
        ):  # fmt: skip
            for chunk in _chunks(answer):
                if not self.done and chunk.lstrip()[:9].lower().startswith(
                    (b"<!doctype", b"<html")
                ):
                    raise _FinalError("a web page came instead of the file")
                file.write(chunk)
                self.digest.update(chunk)
                self.done += len(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
        if total is not None and self.done < total:
            raise _PassingError(f"the transfer ended after {self.done:,} of {total:,} bytes")
        if not self.done:
            raise _PassingError("the file that came is empty")


def _chunks(answer: http.client.HTTPResponse) -> Iterator[bytes]:
    """What comes from the server. Its errors are told from those of the disk, also OSErrors."""
    while True:
        try:
            chunk = answer.read(_CHUNK)
        except (http.client.HTTPException, OSError) as error:
            raise _PassingError(f"the connection broke ({_words(error)})") from error
        if not chunk:
            return
        yield chunk


def _words(error: Exception) -> str:
    return shown(error) or type(error).__name__
