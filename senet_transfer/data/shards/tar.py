"""Reading and writing tar shards. The only module that touches webdataset.

What is used of it are its tar writer, its member iterator and its grouping of members to samples.
Its address handling runs shell commands (`pipe:`), its decoders execute pickles, its splitters
read the environment of a worker process and its shuffles cannot be resumed; those jobs are done
in `storage`, `decode` and `stream`.
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
    """The extension that an image's bytes ask for, whatever its file is called."""
    return "png" if data.startswith(b"\x89PNG\r\n\x1a\n") else "jpg"


class ShardWriter:
    """Writes samples to a tar whose bytes depend on the samples alone."""

    def __init__(self, stream: BinaryIO):
        self._stream = _Hashing(stream)
        self._tar = TarWriter(
            self._stream, encoder=False, mtime=0, mode=0o644, user="", group="", compress=False
        )
        self.index: list[tuple[int, int, int]] = []

    def write(self, sample: RawSample) -> None:
        """Appends a sample: `<key>.cls` with the label, then the image, bytes untouched."""
        extension = image_extension(sample.data)
        label = str(sample.label).encode()
        # The members are sorted by extension, so the image follows a header and a padded label.
        offset = self._tar.tarstream.offset + 3 * tarfile.BLOCKSIZE
        self._tar.write({"__key__": sample.key, "cls": label, extension: sample.data})
        self.index.append((offset, len(sample.data), sample.label))

    def close(self) -> None:
        """Writes the end of the tar."""
        self._tar.close()

    @property
    def bytes(self) -> int:
        """Bytes written; the file's size after `close`."""
        return self._stream.count

    @property
    def sha256(self) -> str:
        """Of what was written."""
        return self._stream.hash.hexdigest()


class _Hashing:
    """Passes what is written on to a stream, and hashes it."""

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
    """Yields a shard's samples in order, and checks it as it goes.

    Args:
        stream: the tar, read forwards.
        url: where it is, for messages.
        samples: the count that the manifest has.
        num_classes: labels are below it.

    Raises:
        UserError: the tar is damaged, holds another number of samples, or a member that is not
            the image, label or JSON of a sample.
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
        # A tar cut between two members, or with a damaged header, just ends.
        raise _damaged(url, f"{count} samples where its manifest has {samples}")


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
    """Raises a UserError for a member that no shard should have.

    Keys never become paths and members are never unpickled here, but a shard with such a member
    was made for another reader, or to harm one.
    """
    folder, _, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    if name.startswith("/") or ".." in folder.split("/") or not key:
        raise UserError(
            f"the shard {url} has a member named {name!r}, expected <key>.<extension> with no "
            "'..' and no leading '/'. Do not trust this file; prepare the data again."
        )
    if extension.lower() not in IMAGE_EXTENSIONS + OTHER_EXTENSIONS:
        raise UserError(
            f"the shard {url} has a member named {name!r}: expected one dot in the name and the "
            f"extension {', '.join(IMAGE_EXTENSIONS + OTHER_EXTENSIONS)}. Pickles and other "
            "formats are refused, and a dot in a key would merge samples; write the shards anew."
        )


def _sample(group: dict[str, Any], url: str, num_classes: int) -> RawSample:
    key = group["__key__"]
    images = [group[extension] for extension in IMAGE_EXTENSIONS if extension in group]
    label = group.get("cls", b"").strip()
    if len(images) != 1 or not re.fullmatch(rb"[0-9]{1,9}", label):
        raise UserError(
            f"the sample {key} of the shard {url} has {len(images)} images and the label "
            f"{label[:20]!r}, expected one image and a number in {key}.cls. The shard is damaged "
            "or not of this project; prepare the data again."
        )
    if int(label) >= num_classes:
        raise UserError(
            f"the sample {key} of the shard {url} has label {int(label)}, expected 0 to "
            f"{num_classes - 1}. Shards and manifest do not belong together."
        )
    return RawSample(key, int(label), images[0], url)
