"""A local copy of remote shards.

A shard's place in the cache follows from its address and its sha256, so no two shards share one,
and a shard that was prepared again gets another. A copy appears under its name only when complete
and checked, so half a file is never read.
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
    """Copies shards to a local folder on first use."""

    def __init__(self, folder: str | Path):
        """
        Args:
            folder: made where it is missing. It grows to the size of the data that is read;
                nothing is ever deleted, so deleting it all between runs is safe.
        """
        self.folder = Path(folder)

    def path(self, url: str, shard: Shard) -> Path:
        """Where the copy of a shard is, or will be."""
        place = hashlib.sha256(f"{url}\n{shard.sha256}".encode()).hexdigest()[:24]
        return self.folder / f"{place}-{shard.name}"

    def fetch(self, url: str, shard: Shard, storage: RemoteOptions) -> Path:
        """Returns the local copy of a shard, after copying it where there is none.

        Raises:
            UserError: it cannot be read or written, or is not the file the manifest describes.
        """
        path = self.path(url, shard)
        if self._is_present(path, shard):
            return path
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(path.with_suffix(".lock"), "w") as lock:
                # The other workers of this machine wait for the one that copies.
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not self._is_present(path, shard):
                    self._copy(url, shard, storage, path)
        except OSError as error:
            raise UserError(
                f"cannot keep a copy of {url} in {self.folder}: {error}. Expected a folder that "
                f"can be written, with room for {shard.bytes / 1e6:.0f} MB more. Make room, name "
                "another folder, or read without a cache."
            ) from error
        return path

    def _is_present(self, path: Path, shard: Shard) -> bool:
        # The name says the content was checked; the size tells what a disk lost since.
        return path.is_file() and path.stat().st_size == shard.bytes

    def _copy(self, url: str, shard: Shard, storage: RemoteOptions, path: Path) -> None:
        logger.info("copying %s (%.0f MB) to %s", url, shard.bytes / 1e6, path)
        digest = hashlib.sha256()
        with atomic_file(path) as target, open_stream(url, storage, shard.bytes) as source:
            while data := source.read(1 << 20):
                digest.update(data)
                target.write(data)
            if digest.hexdigest() != shard.sha256:
                raise UserError(
                    f"{url} has sha256 {digest.hexdigest()}, its manifest says {shard.sha256}. "
                    "The shard was damaged or replaced; copy it there again."
                )
