"""Detectron2 checkpointer with strict loading and atomic saving."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from senet_transfer.engine.checkpoints import checkpoint_history as history
from senet_transfer.errors import UserError
from senet_transfer.utils.atomic_io import atomic_file
from senet_transfer.utils.private_api import end_failed_load
from senet_transfer.utils.text import first_line
from senet_transfer.weights.choice import Choice
from senet_transfer.weights.file_geometry import local_weights
from senet_transfer.weights.formats.reader import OWN_METADATA
from senet_transfer.weights.load import LoadReport, load_source
from senet_transfer.weights.mapping.source import examine
from senet_transfer.weights.mapping.target import target_of
from senet_transfer.weights.save import model_metadata


class Checkpointer(DetectionCheckpointer):
    """Checkpointer that raises an error if a weight file does not match the model.

    Detectron2's checkpointer only logs mismatches, so training would start from scratch if no
    tensor in a file matched the model. Checkpoints include a description of the network, so they
    can be loaded without a config.

    Checkpoints are written atomically, with a SHA-256 file next to each, before
    ``last_checkpoint`` is updated. If a checkpoint is later found to be corrupted, the run resumes
    from the previous one.

    Attributes:
        report: The report of the last load, or None before the first load.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        family: str = "",
        choice: Choice | None = None,
        keep: int = 0,
        classes: Sequence[str] = (),
        **kwargs: Any,
    ):
        """
        Args:
            model: The model to save and load.
            save_dir: The run's output folder.
            family: The family of a pretrained weight file whose tensor names match several families
                (``MODEL.WEIGHTS_FAMILY``). Checkpoints in ``save_dir`` don't need it.
            choice: The network to load from a pretrained weight file that contains several
                networks (``MODEL.WEIGHTS_PREFIX`` and similar keys). Checkpoints in ``save_dir``
                don't need it.
            keep: The number of checkpoints to keep, or 0 to keep all. The oldest are deleted.
            classes: The class names in the order of the model's outputs, to store in checkpoints.
            kwargs: Additional arguments for Detectron2's ``DetectionCheckpointer``.
        """
        super().__init__(model, save_dir, **kwargs)
        self.family = family
        self.choice = choice or Choice()
        self.keep = keep
        self.classes = tuple(classes)
        self.report: LoadReport | None = None
        self._whole = True
        self._family: str | None = None

    def save(self, name: str, **kwargs: Any) -> None:
        """Save a checkpoint atomically, with a description of the network.

        Args:
            name: The file name without the suffix ``.pth``.
            kwargs: Additional values to store, such as ``iteration``.

        Raises:
            UserError: If the file can't be written.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        metadata = model_metadata(self.model, classes=self.classes)
        data = {"model": self.model.state_dict(), OWN_METADATA: metadata}
        data |= {key: part.state_dict() for key, part in self.checkpointables.items()}
        path = Path(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        try:
            with atomic_file(path) as stream:
                torch.save({**data, **kwargs}, stream)
                # The checksum of the file being replaced would make the new file look corrupted.
                history.sum_file(path).unlink(missing_ok=True)
            history.write_sum(path)
            self.tag_last_checkpoint(path.name)
        # On a full disk, torch raises a RuntimeError while it handles an OSError.
        except (OSError, RuntimeError) as error:
            reason = error if isinstance(error, OSError) else error.__context__ or error
            raise UserError(
                f"The checkpoint {path} can't be written: {reason}. Earlier checkpoints are "
                "unaffected. Free disk space or make the folder writable, then continue with "
                "--resume."
            ) from error

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Record the name of the newest checkpoint, and delete the oldest checkpoints."""
        history.record(self.save_dir, last_filename_basename, self.keep)

    def has_checkpoint(self) -> bool:
        """Return whether there is a checkpoint to resume from."""
        return bool(history.checkpoints(self.save_dir))

    def get_checkpoint_file(self) -> str:
        """Return the newest intact checkpoint, and write its name to ``last_checkpoint``.

        All processes of a job must call this method. Damaged checkpoints that are newer than the
        returned one are skipped. When the run saves its next checkpoint, they are removed from the
        list of checkpoints, but their files are not deleted.
        """
        path = history.newest_whole(self.save_dir)
        if self.save_to_disk:
            history.write_text(path.with_name(history.TAG), path.name)
        return str(path)

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load a checkpoint or pretrained weights.

        Args:
            path: A weight file of any family, or a name in the catalogue. If empty, nothing is
                loaded.
            checkpointables: None for a checkpoint of the same model: all tensors must match, and
                the training state is also restored. ``[]`` for pretrained weights, which are loaded
                as in :func:`senet_transfer.load_weights`.

        Raises:
            UserError: If the file does not exist or does not match the model.
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
        if resumed:
            # The same call as in apply_file_geometry, so that the file is read once.
            return {**state, "model": examine(filename, None)}
        return {"model": examine(filename, self._family, **self.choice)}

    def _load_model(self, checkpoint: dict[str, Any]) -> None:
        self.report = load_source(self.model, checkpoint.pop("model"), exact=self._whole)
        if OWN_METADATA in checkpoint:  # Keep the origin of the initial weights.
            origin = checkpoint[OWN_METADATA].get("source", {})
            target_of(self.model).backbone.weights_source = origin


def _training_state(filename: str, names: list[str]) -> dict[str, Any]:
    """Return all entries of a checkpoint except the model, without executing code from the file.

    The file is memory-mapped to avoid reading the model's tensors a second time.
    """
    try:
        checkpoint = torch.load(filename, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise UserError(
            f"{filename} is not a training checkpoint: its training state can't be read "
            f"({first_line(error)}). To load only its weights, omit --resume."
        ) from error
    missing = [name for name in names if name not in checkpoint]
    if missing:
        raise UserError(
            f"Training can't be resumed from {filename}: it contains no complete training "
            f"state (missing: {', '.join(missing)}). To load only its weights, omit --resume."
        )
    return {key: value for key, value in checkpoint.items() if key != "model"}


class UntaggedCheckpointer(Checkpointer):
    """Checkpointer for files that are not used to resume training, such as ``model_best.pth``."""

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Leave ``last_checkpoint`` unchanged, so that runs do not resume from the saved file."""
