"""Reading and writing of tar shards with webdataset.

This is the only module that imports webdataset. It uses the tar writer, the member iterator and the
grouping of members into samples. The other parts are not used: address handling runs shell commands
(`pipe:`), decoders execute pickles, splitters read environment variables in worker processes, and
shuffles cannot be resumed. `storage`, `decode` and `sampling` replace them.
"""

import hashlib
import re
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from webdataset.tariterators import group_by_keys, tar_file_iterator
from webdataset.writer import TarWriter

from senet_transfer.data.base import RawSample
from senet_transfer.errors import UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png")
OTHER_EXTENSIONS = ("cls", "json")


def image_extension(data: bytes) -> str:
    """Return the file extension for encoded image data, regardless of its original file name."""
    return "png" if data.startswith(b"\x89PNG\r\n\x1a\n") else "jpg"


class ShardWriter:
    """Writer of tar shards whose bytes depend only on the samples."""

    def __init__(self, stream: BinaryIO):
        self._stream = _Hashing(stream)
        self._tar = TarWriter(
            self._stream, encoder=False, mtime=0, mode=0o644, user="", group="", compress=False
        )
        self.index: list[tuple[int, int, int]] = []

    def write(self, sample: RawSample) -> None:
        """Append a sample: `<key>.cls` with the label, then the unchanged image data."""
        extension = image_extension(sample.data)
        label = str(sample.label).encode()
        # Members are sorted by extension, so the image follows the label: three blocks with the
        # label's header, the padded label and the image's header.
        offset = self._tar.tarstream.offset + 3 * tarfile.BLOCKSIZE
        self._tar.write({"__key__": sample.key, "cls": label, extension: sample.data})
        self.index.append((offset, len(sample.data), sample.label))

    def close(self) -> None:
        """Write the end of the tar archive."""
        self._tar.close()

    @property
    def bytes(self) -> int:
        """Number of bytes written; the size of the file after `close`."""
        return self._stream.count

    @property
    def sha256(self) -> str:
        """SHA-256 checksum of the bytes written, in hexadecimal."""
        return self._stream.hash.hexdigest()


class _Hashing:
    """Stream wrapper that counts and hashes the bytes written."""

    def __init__(self, stream: BinaryIO):
        self.stream = stream
        self.hash = hashlib.sha256()
        self.count = 0

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        self.count += len(data)
        return self.stream.write(data)


def read_shard(
    stream: BinaryIO, url: str, *, samples: int, num_classes: int
) -> Iterator[RawSample]:
    """Yield the samples of a shard in order, and check them.

    Args:
        stream: The tar archive, which is read sequentially.
        url: Path or address of the shard, for messages.
        samples: Expected number of samples, from the manifest.
        num_classes: Number of classes.

    Raises:
        UserError: If the archive is damaged, contains another number of samples, or has a member
            that is not the image, label or JSON of a sample.
    """
    count = 0
    try:
        for group in group_by_keys(_members(stream, url)):
            sample = _sample(group, url, num_classes)
            count += 1
            if count > samples:
                raise _damaged(url, f"more than the {samples} samples its manifest has")
            yield sample
    except UserError:
        raise
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise _damaged(url, f"{type(error).__name__} after {count} samples: {error}") from error
    if count != samples:
        # tarfile reports no error for an archive truncated between members, or a damaged header.
        raise _damaged(url, f"{count} samples, but its manifest has {samples}")


def _damaged(url: str, found: str) -> UserError:
    return UserError(
        f"the shard {url} is damaged: found {found}. Compare its sha256 with manifest.json and "
        "copy it again, or delete the shard and its .json and run the preparation again."
    )


def _members(stream: BinaryIO, url: str) -> Iterator[dict[str, Any]]:
    for member in tar_file_iterator(stream):
        check_member(member["fname"], url)
        yield member | {"__url__": url}


def check_member(name: str, url: str) -> None:
    """Raise a UserError for a member with an unsafe path or an unsupported extension.

    This project never uses keys as paths and never unpickles members. Still, a shard with such a
    member is malicious or meant for another program.
    """
    folder, _, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    if name.startswith("/") or ".." in folder.split("/") or not key:
        raise UserError(
            f"the shard {url} has a member named {name!r}; expected <key>.<extension> with no "
            "'..' and no leading '/'. Do not trust this file. Prepare the data again."
        )
    if extension.lower() not in IMAGE_EXTENSIONS + OTHER_EXTENSIONS:
        raise UserError(
            f"the shard {url} has a member named {name!r}; expected one dot in the name and an "
            f"extension of {', '.join(IMAGE_EXTENSIONS + OTHER_EXTENSIONS)}. Pickles and other "
            "formats are rejected, and a dot in a key would merge samples. Write the shards again."
        )


def _sample(group: dict[str, Any], url: str, num_classes: int) -> RawSample:
    key = group["__key__"]
    images = [group[extension] for extension in IMAGE_EXTENSIONS if extension in group]
    label = group.get("cls", b"").strip()
    if len(images) != 1 or not re.fullmatch(rb"[0-9]{1,9}", label):
        raise UserError(
            f"the sample {key} of the shard {url} has {len(images)} images and the label "
            f"{label[:20]!r}; expected one image and a number in {key}.cls. The shard is damaged "
            "or was not written by this project. Prepare the data again."
        )
    if int(label) >= num_classes:
        raise UserError(
            f"the sample {key} of the shard {url} has label {int(label)}; expected 0 to "
            f"{num_classes - 1}. The shard does not match the manifest. Prepare the data again."
        )
    return RawSample(key, int(label), images[0], url)
