"""Local cache for remote shards.

The file name of a copy depends on the shard's URL and SHA-256 checksum, so outdated copies are
not used after a shard has been prepared again. Copies are verified and written atomically.
"""

import fcntl
import hashlib
import logging
from pathlib import Path

from senet_transfer.data.shards.manifest import Shard
from senet_transfer.data.shards.storage import RemoteOptions, open_stream
from senet_transfer.errors import UserError
from senet_transfer.utils.atomic_io import atomic_file

logger = logging.getLogger(__name__)


class ShardCache:
    """Local folder to which shards are copied on first use."""

    def __init__(self, folder: str | Path):
        """
        Args:
            folder: Folder for the copies, created if it does not exist. The folder grows to the
                size of the data that is read. It is never cleaned up automatically, but can be
                deleted between runs.
        """
        self.folder = Path(folder)

    def path(self, url: str, shard: Shard) -> Path:
        """Return the path of a shard's local copy, which may not exist yet."""
        digest = hashlib.sha256(f"{url}\n{shard.sha256}".encode()).hexdigest()[:24]
        return self.folder / f"{digest}-{shard.name}"

    def fetch(self, url: str, shard: Shard, storage: RemoteOptions) -> Path:
        """Return the path of a shard's local copy, and create the copy if necessary.

        Raises:
            UserError: If the shard cannot be read or does not match the manifest, or if its copy
                cannot be written.
        """
        path = self.path(url, shard)
        if self.is_present(url, shard):
            return path
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(path.with_suffix(".lock"), "w") as lock:
                # Only one worker on this machine copies the shard, while the others wait.
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not self.is_present(url, shard):
                    self._copy(url, shard, storage, path)
        except OSError as error:
            raise UserError(
                f"Cannot cache {url} in {self.folder}: {error}. Expected a writable folder with "
                f"{shard.bytes / 1e6:.0f} MB of free space. Free up space, choose a different "
                "folder, or read without a cache."
            ) from error
        return path

    def is_present(self, url: str, shard: Shard) -> bool:
        """Return True if there is a local copy of a shard."""
        # The content was verified when the shard was copied. Comparing the size detects later
        # truncation.
        path = self.path(url, shard)
        return path.is_file() and path.stat().st_size == shard.bytes

    def _copy(self, url: str, shard: Shard, storage: RemoteOptions, path: Path) -> None:
        logger.info("Copying %s (%.0f MB) to %s", url, shard.bytes / 1e6, path)
        digest = hashlib.sha256()
        with atomic_file(path) as target, open_stream(url, storage, shard.bytes) as source:
            while data := source.read(1 << 20):
                digest.update(data)
                target.write(data)
            if digest.hexdigest() != shard.sha256:
                raise UserError(
                    f"{url} has SHA-256 {digest.hexdigest()}; expected {shard.sha256}, the hash in "
                    "the manifest. The shard is damaged or was replaced. Upload it again."
                )
