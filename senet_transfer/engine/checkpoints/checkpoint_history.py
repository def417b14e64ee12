"""Verification of checkpoints, and the list of a run's checkpoints.

``last_checkpoint`` is a Detectron2 file that contains the name of the newest checkpoint.
``recent_checkpoints`` lists the checkpoints of the run, newest last. The list is used to fall back
to an earlier checkpoint if the newest is corrupted, and to delete old checkpoints. Both files are
replaced atomically after the new checkpoint has been written to disk.
"""

import logging
import os
import re
import zipfile
from pathlib import Path

from detectron2.utils import comm

from senet_transfer.errors import UserError
from senet_transfer.utils.atomic_io import atomic_file
from senet_transfer.utils.hashing import file_sha256, verify_sha256

TAG = "last_checkpoint"
HISTORY = "recent_checkpoints"

logger = logging.getLogger(__name__)


def sum_file(path: Path) -> Path:
    """Return the path of the SHA-256 checksum file for ``path``."""
    return path.with_name(f"{path.name}.sha256")


def write_sum(path: Path) -> None:
    """Write the SHA-256 checksum file for ``path``, in the format of ``sha256sum``."""
    write_text(sum_file(path), f"{file_sha256(path)}  {path.name}\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; on failure, an existing file is left unchanged.

    Paths in the text that are not valid UTF-8 are written as their original bytes.
    """
    with atomic_file(path) as stream:
        stream.write(text.encode(errors="surrogateescape"))


def checkpoints(folder: str | Path) -> list[str]:
    """Return the names of a run's checkpoints, starting with the one to resume from.

    The first name is read from ``last_checkpoint``, which the user may have changed to an earlier
    checkpoint. The checkpoints written before that checkpoint follow, newest first.
    """
    tagged = _lines(folder, TAG)[:1]
    listed = [name for name in _lines(folder, HISTORY) if Path(folder, name).is_file()]
    if tagged and tagged[0] in listed:
        listed = listed[: listed.index(tagged[0])]
    return [*tagged, *reversed(listed)]


def _lines(folder: str | Path, name: str) -> list[str]:
    try:
        lines = Path(folder, name).read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    # Accept plain file names only, without folders, because the oldest listed files are deleted.
    return [line.strip() for line in lines if re.fullmatch(r"[\w.-]*\w\.pth", line.strip())]


def record(folder: str | Path, name: str, keep: int) -> None:
    """Record a saved checkpoint as the newest of a run, and delete the oldest checkpoints.

    Checkpoints that are listed after the checkpoint named in ``last_checkpoint`` are removed from
    the list in ``recent_checkpoints``, but their files are not deleted.

    Args:
        folder: The run's output folder.
        name: The file name of the checkpoint, which must already exist.
        keep: The number of checkpoints to keep, or 0 to keep all. ``model_final.pth`` is never
            deleted.
    """
    folder = Path(folder)
    listed = [n for n in _lines(folder, HISTORY) if (folder / n).is_file()]
    for tagged in _lines(folder, TAG)[:1]:
        if tagged in listed:
            # If the user has edited last_checkpoint, the run did not continue from the later
            # checkpoints.
            del listed[listed.index(tagged) + 1 :]
    listed = [*(n for n in listed if n != name), name]
    write_text(folder / HISTORY, "".join(f"{n}\n" for n in listed))
    write_text(folder / TAG, name)
    for old in listed[:-keep] if keep else ():
        if old != "model_final.pth":
            sum_file(folder / old).unlink(missing_ok=True)
            (folder / old).unlink(missing_ok=True)


def forget(folder: str | Path) -> None:
    """Delete a run's list of checkpoints, but keep the checkpoint files.

    Afterwards, the run can't be resumed.
    """
    for name in (TAG, HISTORY):
        Path(folder, name).unlink(missing_ok=True)


def sweep(folder: str | Path) -> None:
    """Delete temporary files left by a process that was killed while writing."""
    for stem in ("model_*.pth", "model_*.pth.sha256", TAG, HISTORY, "*.yaml", "*.json", "*.txt"):
        for path in Path(folder).glob(f".{stem}.*.tmp"):
            path.unlink(missing_ok=True)


def drop_torn_line(path: Path) -> None:
    """Remove the last line of a text file if it is incomplete (not terminated by a newline)."""
    if path.is_file() and not (content := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def verify_checkpoint(path: Path) -> str:
    """Return a description of the damage in a checkpoint, or "" if the checkpoint is intact."""
    if not path.is_file():
        return f"{path} does not exist"
    try:
        # Without a .sha256 file, verify the CRC-32 checksums inside the ZIP archive.
        if not verify_sha256(path, None) and (bad := zipfile.ZipFile(path).testzip()):
            return f"{path}: the entry {bad} is damaged"
    # zipfile raises the last two errors if damaged bytes look like an unsupported compression
    # method or like encryption.
    except (UserError, OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        return str(error)
    return ""


def newest_whole(folder: str | Path) -> Path:
    """Return the newest intact checkpoint that every process of the job can read.

    All processes must call this function together; it returns the same path in all of them.

    Raises:
        UserError: If no checkpoint is intact.
    """
    names = comm.all_gather(checkpoints(folder))[0]
    found = []
    for name in names:
        path = Path(folder, name)
        problems = [problem for problem in comm.all_gather(verify_checkpoint(path)) if problem]
        if not problems:
            return path
        found.append(problems[0])
        logger.error("Falling back to the previous checkpoint. %s", problems[0])
    listed = "\n".join(found)
    error = UserError(
        f"The run in {folder} can't be resumed, because none of these checkpoints is intact:\n"
        f"{listed}\nTo resume from a different checkpoint in this folder, write its file name to "
        f"{os.path.join(folder, TAG)}. Otherwise, start a new run without --resume."
    )
    error.on_all_ranks = True
    raise error
