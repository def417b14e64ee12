"""Protection against overwriting an earlier run in the output folder of a new run."""

import os
from collections.abc import Iterator
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.utils import comm

from senet_transfer.engine.checkpoints.checkpoint_history import HISTORY, TAG, checkpoints
from senet_transfer.errors import UserError
from senet_transfer.utils import tracking
from senet_transfer.utils.text import first_of

LOG = "log.txt"

# Files that identify a training run.
_CHECKPOINTS = ("model_final.pth", "model_best.pth", "model_ema.pth", "model_[0-9]*[0-9].pth")
_METRICS = "metrics.json"
# All files written by a run, except the log and the files that every new run replaces at its start.
_WRITTEN = (
    *(name for stem in _CHECKPOINTS for name in (stem, f"{stem}.sha256")),
    TAG,
    HISTORY,
    _METRICS,
    "results.json",
    tracking.FILE,
    "events.out.tfevents.*",
    "nonfinite_[0-9]*_rank[0-9]*.json",
    "inference*/*/predictions.json",
    "inference*/*/diagnostics.json",
    "inference*/*/box_proposals.pkl",
    "inference*/*/instances_predictions.pth",
    "inference*/*/*_instances_results.json",
    "inference*/*/*_coco_format.json",
    "inference*/*/sem_seg_predictions.json",
    "inference*/*/sem_seg_evaluation.pth",
)
_SHOWN = 3


def claim_output_folder(cfg: CfgNode, *, overwrite: bool, restarted: bool) -> None:
    """Raise an error if the output folder of a new training run contains an earlier run.

    All processes of a job must call this function together. Call it after all other checks, because
    it may delete files.

    Args:
        cfg: The config of a run that starts from iteration 0.
        overwrite: If True, delete the earlier run's files.
        restarted: If True, the launcher has started this command again after a failure, so existing
            files belong to this run.

    Raises:
        UserError: If the folder contains files of an earlier run, or if ``MODEL.WEIGHTS`` is one of
            the files to delete.
    """
    folder = Path(cfg.OUTPUT_DIR)
    # Only the main process checks, because other processes may see a different state of the folder.
    found = comm.all_gather(_earlier(folder))[0]
    if not found or restarted and not overwrite:
        return
    if not overwrite:
        raise _contains_earlier(folder, found)
    weights = os.path.realpath(cfg.MODEL.WEIGHTS) if cfg.MODEL.WEIGHTS else ""
    written = list(_written(folder))
    if weights in map(os.path.realpath, written):
        raise UserError(
            f"MODEL.WEIGHTS is {cfg.MODEL.WEIGHTS}, which --overwrite would delete from OUTPUT_DIR "
            f"({cfg.OUTPUT_DIR}). Set OUTPUT_DIR to another folder, or move the file."
        )
    if comm.is_main_process():
        for path in written:
            path.unlink(missing_ok=True)


def check_unused(folder: Path) -> None:
    """Raise a UserError if the output folder of a new run contains an earlier run."""
    if found := _earlier(folder):
        raise _contains_earlier(folder, found)


def _contains_earlier(folder: Path, found: list[str]) -> UserError:
    return UserError(
        f"OUTPUT_DIR ({folder}) contains an earlier run ({first_of(found, _SHOWN)}), "
        "whose files a new run would replace or mix with its own. To continue the earlier run, "
        "add --resume. To keep it, set OUTPUT_DIR to another folder. To delete its files and "
        "train from scratch, add --overwrite."
    )


def _earlier(folder: Path) -> list[str]:
    """Return the names of an earlier run's checkpoint and metrics files in a folder, if any."""
    names = dict.fromkeys(name for name in checkpoints(folder) if Path(folder, name).is_file())
    for pattern in _CHECKPOINTS:
        names |= dict.fromkeys(sorted(path.name for path in folder.glob(pattern)))
    metrics = folder / _METRICS
    return [*names, *([_METRICS] if metrics.is_file() and metrics.stat().st_size else [])]


def _written(folder: Path) -> Iterator[Path]:
    for pattern in _WRITTEN:
        yield from (path for path in folder.glob(pattern) if path.is_file())


def drop_earlier_log(folder: str | Path, size: int) -> None:
    """Remove the messages of an earlier run from the log.

    These messages are the first ``size`` bytes of the file. The file is rewritten in place, because
    this process has opened it for appending.
    """
    path = Path(folder, LOG)
    if size and path.is_file():
        with open(path, "r+b") as log:
            log.seek(size)
            rest = log.read()
            log.seek(0)
            log.truncate()
            log.write(rest)


def log_size(folder: str | Path) -> int:
    """Return the size of a folder's log in bytes, or 0 if there is no log."""
    path = Path(folder, LOG)
    return path.stat().st_size if path.is_file() else 0
