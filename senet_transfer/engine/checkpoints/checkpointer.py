"""Detectron2's checkpointer, with this project's strict loading in it."""

from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from senet_transfer.engine.checkpoints import checkpoint_history as history
from senet_transfer.errors import UserError
from senet_transfer.utils.atomic_io import atomic_file
from senet_transfer.utils.private_api import end_failed_load
from senet_transfer.weights.file_geometry import local_weights
from senet_transfer.weights.formats.reader import OWN_METADATA
from senet_transfer.weights.load import LoadReport, load_source
from senet_transfer.weights.mapping.source import examine
from senet_transfer.weights.save import model_metadata


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, which accounts for every tensor of model and file.

    Detectron2 logs what does not fit and goes on, so that a file with nothing in common with the
    model trains from random weights. Checkpoints say what their network is, so that they load as
    what they are wherever they are taken.

    A checkpoint is on the disk as a whole or not at all, with its SHA-256 beside it, before the
    tag names it. Where it is damaged later, the one before it is resumed from.

    Attributes:
        report: what was loaded last; None before that.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        family: str = "",
        keep: int = 0,
        **kwargs: Any,
    ):
        """
        Args:
            model: as Detectron2's, like the other arguments.
            save_dir: as Detectron2's.
            family: of weight files whose names are those of several, ``MODEL.WEIGHTS_FAMILY``;
                not of the checkpoints in ``save_dir``.
            keep: the newest so many checkpoints stay; 0 for all.
            kwargs: as Detectron2's.
        """
        super().__init__(model, save_dir, **kwargs)
        self.family = family
        self.keep = keep
        self.report: LoadReport | None = None
        self._whole = True
        self._family: str | None = None

    def save(self, name: str, **kwargs: Any) -> None:
        """As Detectron2's; with what the network is, and whole or not at all.

        Raises:
            UserError: it can't be written.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict(), OWN_METADATA: model_metadata(self.model)}
        data |= {key: part.state_dict() for key, part in self.checkpointables.items()}
        path = Path(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        try:
            with atomic_file(path) as stream:
                torch.save({**data, **kwargs}, stream)
                # The sum of a file that is replaced would say that the new one is damaged.
                history.sum_file(path).unlink(missing_ok=True)
            history.write_sum(path)
            self.tag_last_checkpoint(path.name)
        # Where the disk is full, torch raises a RuntimeError in the course of an OSError.
        except (OSError, RuntimeError) as error:
            reason = error if isinstance(error, OSError) else error.__context__ or error
            raise UserError(
                f"The checkpoint {path} can't be written: {reason}. What was saved before is as "
                "it was. Make room, or make the folder writable, and go on with --resume."
            ) from error

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """As Detectron2's; and deletes checkpoints that are too old."""
        history.record(self.save_dir, last_filename_basename, self.keep)

    def has_checkpoint(self) -> bool:
        """Whether there is something to resume from."""
        return bool(history.checkpoints(self.save_dir))

    def get_checkpoint_file(self) -> str:
        """The newest checkpoint that is whole; every process of a job has to ask at once."""
        return str(history.newest_whole(self.save_dir))

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Loads a checkpoint, or the weights to start from.

        Args:
            path: a weight file of any family, or a name in the catalogue; an empty one loads
                nothing.
            checkpointables: None for a checkpoint of this very model, which must fit it wholly
                and whose training state is taken too; ``[]`` for weights to start from, where the
                rules of :func:`senet_transfer.load_weights` hold.

        Raises:
            UserError: there is no such file, or it does not fit the model.
        """
        self._whole = checkpointables is None
        self._family = self.family or None
        try:
            if path:
                path, self._family = local_weights(path, self._family)
            return super().load(path, checkpointables)
        finally:
            end_failed_load(self)

    def _load_file(self, filename: str) -> dict[str, Any]:
        resumed = self._whole and bool(self.checkpointables)
        state = _training_state(filename, list(self.checkpointables)) if resumed else {}
        family = None if resumed else self._family
        return {**state, "model": examine(filename, family)}

    def _load_model(self, checkpoint: dict[str, Any]) -> None:
        self.report = load_source(self.model, checkpoint.pop("model"), exact=self._whole)


def _training_state(filename: str, names: list[str]) -> dict[str, Any]:
    """Return what a checkpoint holds besides the model, without running code from it.

    The file is mapped into memory, so that the model's tensors are not read a second time.
    """
    try:
        checkpoint = torch.load(filename, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise UserError(
            f"{filename} is no checkpoint of a run: its training state can't be read "
            f"({str(error).splitlines()[0]}). To start from its weights alone, leave out --resume."
        ) from error
    missing = [name for name in names if name not in checkpoint]
    if missing:
        raise UserError(
            f"{filename} holds no state of the {', '.join(missing)}, so no run can be taken up "
            "from it. To start from its weights alone, leave out --resume."
        )
    return {key: value for key, value in checkpoint.items() if key != "model"}


class UntaggedCheckpointer(Checkpointer):
    """Saves models that are no points to resume from."""

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Leaves the tag to the checkpoints that a run is resumed from."""
