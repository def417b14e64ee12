"""Loading and saving, strictly."""

import os
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from fvcore.common.checkpoint import _IncompatibleKeys

from senet_transfer.errors import UserError


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, which fails where a tensor of model or file is left over.

    Detectron2 logs these and goes on, so that a file with nothing in common with the model
    trains from random weights.
    """

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As Detectron2's; raises UserError unless model and file fit each other wholly."""
        self._loading = path
        return super().load(path, *args, **kwargs)

    def _log_incompatible_keys(self, incompatible: _IncompatibleKeys) -> None:
        lines = [f"  missing in the file: {key}" for key in incompatible.missing_keys]
        lines += [f"  left over: {key}" for key in incompatible.unexpected_keys]
        lines += [
            f"  of another shape: {key}, {tuple(found)} in the file, {tuple(expected)} in the model"
            for key, found, expected in incompatible.incorrect_shapes
        ]
        if not lines:
            return
        shown = "\n".join(lines[:12] + (["  ..."] if len(lines) > 12 else []))
        raise UserError(
            f"{self._loading} does not fit the model, in {len(lines)} tensors:\n{shown}\n"
            "Set MODEL.WEIGHTS to a checkpoint of this model, or the config to that of the file."
        )


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
