"""Loading and saving, strictly."""

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
