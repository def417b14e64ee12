"""Contents of a published model: its tensors, config, metadata and results."""

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from torch import Tensor

from senet_transfer.config.defaults import (
    config_items,
    config_value,
    get_senet_config,
    set_config_value,
)
from senet_transfer.engine.hooks import BEST_NAME
from senet_transfer.engine.model_from import LoadedModel
from senet_transfer.engine.predictor.load import load_trained
from senet_transfer.engine.setup import RunOptions
from senet_transfer.engine.train import RESULTS, evaluated_file, main
from senet_transfer.errors import UserError
from senet_transfer.models.build import backbone_name
from senet_transfer.utils.hashing import file_sha256
from senet_transfer.weights.file_geometry import local_weights
from senet_transfer.weights.formats.reader import OWN_METADATA, read_tensors
from senet_transfer.weights.mapping.target import target_of
from senet_transfer.weights.save import model_metadata


@dataclass(frozen=True)
class Contents:
    """Contents of a published model.

    Attributes:
        tensors: Tensors by name.
        cfg: Config without weights and local paths.
        metadata: Metadata for the weight file; see
            :func:`senet_transfer.weights.save.model_metadata`.
        results: Metrics of the run's evaluation of this checkpoint, as in ``results.json``. Empty
            if they are unknown.
        family: Family of the checkpoint (the project whose tensor names it uses).
        run_cfg: Config of the run.
        sha256: SHA-256 of the checkpoint.
    """

    tensors: dict[str, Tensor]
    cfg: CfgNode
    metadata: dict[str, Any]
    results: dict[str, Any]
    family: str
    run_cfg: CfgNode
    sha256: str

    def evaluate(self, weights: Path, options: Sequence[str] = ()) -> dict[str, Any]:
        """Evaluate a weight file with these contents on the run's ``DATASETS.TEST``.

        Args:
            weights: The weight file.
            options: Alternating keys and values that override the run's config, for example to
                set the paths of the datasets on this machine.

        Returns:
            The results, as in ``results.json``.
        """
        with tempfile.TemporaryDirectory() as folder:
            config_file = Path(folder, "config.yaml")
            config_file.write_text(self.run_cfg.dump(), encoding="utf-8")
            own = ["MODEL.WEIGHTS", str(weights), "OUTPUT_DIR", folder]
            own += ["TEST.ENSEMBLE.WEIGHTS", "()"]
            return main(RunOptions(str(config_file), [*options, *own], eval_only=True, quiet=True))


def contents_of(
    source: str | os.PathLike[str], config_file: str = "", *, half: bool = False
) -> Contents:
    """Load a complete model, and return the contents to publish.

    Args:
        source: The output folder of a run, a checkpoint, or another source of a complete model; see
            :func:`senet_transfer.load`.
        config_file: The config of a weight file; see :func:`senet_transfer.load`.
        half: If True, store tensors with two or more dimensions in float16. Biases and the
            parameters and statistics of norms remain in float32.

    Raises:
        UserError: If the model can't be loaded, or a value exceeds the range of float16.
    """
    one = ("TEST.ENSEMBLE.WEIGHTS", "()")
    loaded = load_trained(os.fspath(source), config_file, one, device="cpu")
    cfg, classes = _published_config(loaded), loaded.classes
    stored = _stored_values(loaded)
    target = target_of(loaded.model)
    # Keep the origin of the initial weights.
    target.backbone.weights_source = stored.get(OWN_METADATA, {}).get("source", {})
    metadata = model_metadata(loaded.model, classes)
    if cfg.MODEL.BACKBONE.ARCH:
        metadata["model"] = backbone_name(cfg)
    metadata["preprocessing"] |= {
        key: getattr(loaded.preprocessing, key) for key in ("resize", "crop", "interpolation")
    }
    tensors = {target.own_names[name]: tensor for name, tensor in target.tensors.items()}
    if half:
        tensors = {name: _in_half(name, tensor) for name, tensor in tensors.items()}
    results = _results(loaded.cfg, stored)
    sha256 = file_sha256(local_weights(loaded.cfg.MODEL.WEIGHTS)[0])
    return Contents(tensors, cfg, metadata, results, loaded.family, loaded.cfg, sha256)


def _in_half(name: str, tensor: Tensor) -> Tensor:
    if tensor.ndim < 2 or not tensor.is_floating_point():
        return tensor
    if not tensor.half().isfinite().all():
        raise UserError(f"{name} exceeds the range of float16. Publish the model without --half.")
    return tensor.half()


def changed_items(cfg: CfgNode) -> dict[str, Any]:
    """Return the config values that differ from the defaults, keyed by dotted config key."""
    default = {key: json.dumps(value) for key, value in config_items(get_senet_config())}
    # In JSON, tuples equal lists.
    return {k: value for k, value in config_items(cfg) if json.dumps(value) != default.get(k)}


def _published_config(loaded: LoadedModel) -> CfgNode:
    """Return a model's config without weights and local paths."""
    cfg = loaded.cfg.clone()
    cfg.defrost()
    default = get_senet_config()
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", default.MODEL.DEVICE
    cfg.OUTPUT_DIR, cfg.DATASETS.REGISTER = default.OUTPUT_DIR, []
    cfg.DATASETS.CLASSES = loaded.classes
    for key, value in list(config_items(cfg)):
        if key == "DATASETS.CLASSES":  # such as /a/airfield in Places365
            continue
        if isinstance(value, str) and _is_local(value):
            set_config_value(cfg, key, config_value(default, key))
        elif isinstance(value, list | tuple):  # such as DATASETS.TEST
            names = [Path(v).name if isinstance(v, str) and _is_local(v) else v for v in value]
            set_config_value(cfg, key, type(value)(names))
    return cfg


def _is_local(value: str) -> bool:
    """Return whether a value is a local path rather than a name, such as a model name."""
    path = os.path.expanduser(value)
    relative = path.startswith((f".{os.sep}", f"..{os.sep}"))
    return os.path.isabs(path) or relative or (os.sep in path and os.path.exists(path))


def _stored_values(loaded: LoadedModel) -> dict[str, Any]:
    """Return the metadata stored in a model's weight file."""
    if loaded.family != "senet_transfer":
        return {OWN_METADATA: {"source": target_of(loaded.model).backbone.weights_source}}
    return read_tensors(local_weights(loaded.cfg.MODEL.WEIGHTS)[0]).metadata


def _results(cfg: CfgNode, stored: dict[str, Any]) -> dict[str, Any]:
    """Return the evaluation results of a checkpoint, or an empty dict if they are unknown.

    For the final model of a run, the results are read from the ``results.json`` next to it. For the
    best model, the only result is the metric by which it was selected; ``model_best.pth`` contains
    the name and value of this metric.
    """
    path = Path(cfg.MODEL.WEIGHTS)
    if path.name == f"{BEST_NAME}.pth":
        known = {"metric", "value"} <= stored.keys()
        return {stored["metric"]: stored["value"]} if known else {}
    results = path.with_name(RESULTS)
    if path.name != evaluated_file(cfg) or not results.is_file():
        return {}
    content = read_json(results, "Evaluate the model again, or delete the file.")
    # If other weights were evaluated later in the same folder, the results lack "training".
    return content if isinstance(content, dict) and "training" in content else {}


def read_json(path: Path, remedy: str) -> Any:
    """Return the contents of a JSON file.

    Args:
        path: The file.
        remedy: A sentence on how to fix the error, which is added to the error message.

    Raises:
        UserError: If the file can't be read or is not valid JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a JSON file: {error}. {remedy}") from error
