"""Reading and writing of tar shards with webdataset.

This is the only module that imports webdataset. It uses webdataset's tar writer, member iterator
and grouping of members into samples. Other parts of webdataset are replaced by `storage`, `decode`
and `sampling` for four reasons: the URL handling runs shell commands (`pipe:`), the decoders
execute pickles, the splitters read environment variables in worker processes, and the shuffles
cannot be resumed.
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
    """Return the file extension for an encoded image, based on its content."""
    return "png" if data.startswith(b"\x89PNG\r\n\x1a\n") else "jpg"


class ShardWriter:
    """Tar shard writer whose output depends only on the samples."""

    def __init__(self, stream: BinaryIO):
        self._stream = _Hashing(stream)
        self._tar = TarWriter(
            self._stream, encoder=False, mtime=0, mode=0o644, user="", group="", compress=False
        )
        self.index: list[tuple[int, int, int]] = []

    def write(self, sample: RawSample) -> None:
        """Append a sample: `<key>.cls` with the label, then the image file, byte for byte."""
        extension = image_extension(sample.data)
        label = str(sample.label).encode()
        # Members are sorted by extension, so the label precedes the image. The image data follows
        # three blocks: the label's header, the padded label and the image's header.
        offset = self._tar.tarstream.offset + 3 * tarfile.BLOCKSIZE
        self._tar.write({"__key__": sample.key, "cls": label, extension: sample.data})
        self.index.append((offset, len(sample.data), sample.label))

    def close(self) -> None:
        """Write the end-of-archive marker."""
        self._tar.close()

    @property
    def bytes(self) -> int:
        """Number of bytes written; after `close`, this is the file size."""
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
    """Yield a shard's samples in order, and validate them.

    Args:
        stream: Tar archive, which is read sequentially.
        url: Path or URL of the shard; used in error messages.
        samples: Expected number of samples, from the manifest.
        num_classes: Number of classes.

    Raises:
        UserError: If the archive is damaged, contains the wrong number of samples, or contains a
            member other than an image, a label or a JSON file.
    """
    count = 0
    try:
        for group in group_by_keys(_members(stream, url)):
            sample = _sample(group, url, num_classes)
            count += 1
            if count > samples:
                raise _damaged(url, f"more than the {samples} samples in its manifest")
            yield sample
    except UserError:
        raise
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise _damaged(url, f"{type(error).__name__} after {count} samples: {error}") from error
    if count != samples:
        # tarfile raises no error for an archive that is truncated between members or has a damaged
        # header.
        raise _damaged(url, f"{count} samples, but its manifest lists {samples}")


def _damaged(url: str, found: str) -> UserError:
    return UserError(
        f"Shard {url} is damaged: found {found}. Compare its SHA-256 checksum with the one in "
        "manifest.json and copy the shard again. Alternatively, delete the shard and its .json "
        "file, and run the preparation again."
    )


def _members(stream: BinaryIO, url: str) -> Iterator[dict[str, Any]]:
    for member in tar_file_iterator(stream):
        check_member(member["fname"], url)
        yield member | {"__url__": url}


def check_member(name: str, url: str) -> None:
    """Raise a UserError for a member with an unsafe path or an unsupported extension.

    Such a member would do no harm here, because sample keys are never used as file paths and
    members are never unpickled. It is rejected because the shard is probably malicious or was
    written for a different purpose.
    """
    folder, _, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    if name.startswith("/") or ".." in folder.split("/") or not key:
        raise UserError(
            f"Shard {url} contains a member named {name!r}; expected <key>.<extension> without "
            "'..' and without a leading '/'. Do not trust this file. Prepare the data again."
        )
    if extension.lower() not in IMAGE_EXTENSIONS + OTHER_EXTENSIONS:
        raise UserError(
            f"Shard {url} contains a member named {name!r}; expected <key>.<extension> with a key "
            "without dots and one of the extensions "
            f"{', '.join(IMAGE_EXTENSIONS + OTHER_EXTENSIONS)}. Pickles and other file types are "
            "rejected. Files whose names are the same up to the first dot are read as one sample. "
            "Write the shards again."
        )


def _sample(group: dict[str, Any], url: str, num_classes: int) -> RawSample:
    key = group["__key__"]
    images = [group[extension] for extension in IMAGE_EXTENSIONS if extension in group]
    label = group.get("cls", b"").strip()
    if len(images) != 1 or not re.fullmatch(rb"[0-9]{1,9}", label):
        raise UserError(
            f"Sample {key} in shard {url} has {len(images)} images and the label {label[:20]!r}; "
            f"expected one image and a number in {key}.cls. The shard is damaged or was not "
            "written by this project. Prepare the data again."
        )
    if int(label) >= num_classes:
        raise UserError(
            f"Sample {key} in shard {url} has the label {int(label)}; expected 0 to "
            f"{num_classes - 1}. The shard does not match the manifest. Prepare the data again."
        )
    return RawSample(key, int(label), images[0], url)
