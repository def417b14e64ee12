"""The checkpoints that a run has written: which there are, and which of them is whole.

``last_checkpoint`` is Detectron2's tag, the name of the newest. ``recent_checkpoints`` has the
names of all that a run keeps, the newest last: what is gone back to where the newest is damaged,
and what is deleted in time. Both are replaced as a whole, after the file that they name is on the
disk.
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
    """Where the SHA-256 of a file is, as ``sha256sum`` writes it."""
    return path.with_name(f"{path.name}.sha256")


def write_sum(path: Path) -> None:
    """Writes a file's SHA-256 beside it."""
    write_text(sum_file(path), f"{file_sha256(path)}  {path.name}\n")


def write_text(path: Path, text: str) -> None:
    """Replaces a file as a whole, or leaves it as it is."""
    with atomic_file(path) as stream:
        stream.write(text.encode())


def checkpoints(folder: str | Path) -> list[str]:
    """The names of a run's checkpoints, the one that it goes on from first.

    That is the one that the tag names, which a user may have set back; then those before it.
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
    # Names alone: what such a file says is deleted in time.
    return [line.strip() for line in lines if re.fullmatch(r"[\w.-]*\w\.pth", line.strip())]


def record(folder: str | Path, name: str, keep: int) -> None:
    """Makes a checkpoint, which is on the disk, the newest; deletes those that are too many.

    Args:
        folder: of the run.
        name: of the file.
        keep: how many stay, 0 for all; ``model_final.pth`` always does.
    """
    folder = Path(folder)
    listed = [n for n in _lines(folder, HISTORY) if n != name and (folder / n).is_file()]
    listed.append(name)
    write_text(folder / HISTORY, "".join(f"{n}\n" for n in listed))
    write_text(folder / TAG, name)
    for old in listed[:-keep] if keep else ():
        if old != "model_final.pth":
            sum_file(folder / old).unlink(missing_ok=True)
            (folder / old).unlink(missing_ok=True)


def forget(folder: str | Path) -> None:
    """Leaves nothing to resume from; the files of an earlier run stay."""
    for name in (TAG, HISTORY):
        Path(folder, name).unlink(missing_ok=True)


def sweep(folder: str | Path) -> None:
    """Removes what a process that was killed while it wrote has left."""
    for stem in ("model_*.pth", "model_*.pth.sha256", TAG, HISTORY, "*.yaml", "*.json", "*.txt"):
        for path in Path(folder).glob(f".{stem}.*.tmp"):
            path.unlink(missing_ok=True)


def drop_torn_line(path: Path) -> None:
    """Cuts off what stands after the last line of a file that is written line by line."""
    if path.is_file() and not (content := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def verify_checkpoint(path: Path) -> str:
    """Return what is wrong with a checkpoint file; empty if nothing is."""
    if not path.is_file():
        return f"{path} is not there"
    try:
        # Without a sum beside it, its own checksums.
        if not verify_sha256(path, None) and (bad := zipfile.ZipFile(path).testzip()):
            return f"{path}: {bad} in it is damaged"
    # zipfile's own last two: damage can look like a compression or a cipher that it doesn't have.
    except (UserError, OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        return str(error)
    return ""


def newest_whole(folder: str | Path) -> Path:
    """The newest checkpoint of a run that every process of the job can read in full.

    All processes have to call this; all get the same.

    Raises:
        UserError: there is none.
    """
    names = comm.all_gather(checkpoints(folder))[0]
    found = []
    for name in names:
        path = Path(folder, name)
        problems = [problem for problem in comm.all_gather(verify_checkpoint(path)) if problem]
        if not problems:
            return path
        found.append(problems[0])
        logger.error("A checkpoint is damaged, and the one before it is taken: %s", problems[0])
    listed = "\n".join(found)
    error = UserError(
        f"No checkpoint in {folder} is whole, so there is nothing to resume:\n{listed}\nWrite the "
        f"name of one that is into {os.path.join(folder, TAG)}, or start a new run without "
        "--resume."
    )
    error.on_all_ranks = True
    raise error
