"""Detectron2's checkpointer, with this project's strict loading in it."""

import os
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from senet_transfer.errors import UserError
from senet_transfer.weights.config import local_weights
from senet_transfer.weights.files import OWN_METADATA
from senet_transfer.weights.load import LoadReport, load_source
from senet_transfer.weights.save import model_metadata
from senet_transfer.weights.source import examine


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, which accounts for every tensor of model and file.

    Detectron2 logs what does not fit and goes on, so that a file with nothing in common with the
    model trains from random weights. Checkpoints say what their network is, so that they load as
    what they are wherever they are taken.

    Attributes:
        report: what was loaded last; None before that.
    """

    def __init__(self, model: nn.Module, save_dir: str = "", *, family: str = "", **kwargs: Any):
        """
        Args:
            model: as Detectron2's, like the other arguments.
            save_dir: as Detectron2's.
            family: of weight files whose names are those of several, ``MODEL.WEIGHTS_FAMILY``;
                not of the checkpoints in ``save_dir``.
            kwargs: as Detectron2's.
        """
        super().__init__(model, save_dir, **kwargs)
        self.family = family
        self.report: LoadReport | None = None
        self._whole = True
        self._family: str | None = None

    def save(self, name: str, **kwargs: Any) -> None:
        """As Detectron2's; with what the network is."""
        super().save(name, **{OWN_METADATA: model_metadata(self.model), **kwargs})

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
            self._parsed_url_during_load = None  # Detectron2's, for a load that failed

    def _load_file(self, filename: str) -> dict[str, Any]:
        resumed = self._whole and bool(self.checkpointables)
        state = _training_state(filename, list(self.checkpointables)) if resumed else {}
        family = None if resumed else self._family
        return {**state, "model": examine(filename, family)}

    def _load_model(self, checkpoint: dict[str, Any]) -> None:
        self.report = load_source(self.model, checkpoint.pop("model"), exact=self._whole)


def _training_state(filename: str, names: list[str]) -> dict[str, Any]:
    """What a checkpoint holds beside the model, read without running anything in it."""
    try:
        # Not mapped: the run will write its next checkpoint over this file.
        checkpoint = torch.load(filename, map_location="cpu", weights_only=True)
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
    """Saves models that are no points to resume from, each wholly or not at all."""

    def save(self, name: str, **kwargs: Any) -> None:
        """As Detectron2's, but for the tag; an interrupted one leaves the file that was there."""
        partial = f".{name}-incoming"
        super().save(partial, **kwargs)
        os.replace(
            os.path.join(self.save_dir, f"{partial}.pth"),
            os.path.join(self.save_dir, f"{name}.pth"),
        )

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Leaves the tag to the checkpoints that a run is resumed from."""
