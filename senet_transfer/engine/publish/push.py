"""Upload of a trained model to the Hugging Face Hub."""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from senet_transfer.config.defaults import (
    config_items,
    config_value,
    get_senet_config,
    set_config_value,
)
from senet_transfer.engine.hooks import BEST_NAME
from senet_transfer.engine.model_from import LoadedModel
from senet_transfer.engine.predictor.load import load_trained
from senet_transfer.engine.publish.model_card import model_card
from senet_transfer.engine.train import RESULTS
from senet_transfer.errors import UserError
from senet_transfer.weights.file_geometry import local_weights
from senet_transfer.weights.formats.reader import OWN_METADATA, read_tensors
from senet_transfer.weights.hub.repositories import hub_errors, parse_hub_name
from senet_transfer.weights.mapping.target import target_of
from senet_transfer.weights.save import model_metadata, save_weights


def push(
    source: str | os.PathLike[str],
    repository: str,
    *,
    config_file: str = "",
    private: bool = False,
    licence: str = "",
    data: Sequence[str] = (),
) -> str:
    """Upload a model with its config, class names, preprocessing and a generated model card.

    The repository is created if it does not exist. :func:`senet_transfer.load` and all options for
    weights accept it as "hf-hub:owner/name".

    Args:
        source: The output folder of a run, a checkpoint, or another source of a complete model; see
            :func:`senet_transfer.load`.
        repository: The name of the repository, "owner/name".
        config_file: The config of a weight file; see :func:`senet_transfer.load`.
        private: If True, a new repository is private.
        licence: The licence of the weights for the model card, such as "apache-2.0".
        data: The names of the training data for the model card.

    Returns:
        The address of the uploaded commit.

    Raises:
        UserError: If the name is malformed, the model can't be loaded, there is no token, or the
            upload fails.
    """
    from huggingface_hub import HfApi, get_token

    name = _repository_name(repository)
    if not get_token():
        raise UserError(
            "There is no token for the upload. Create one with write access in the settings of the "
            "Hub, then run `hf auth login` or set HF_TOKEN."
        )
    with tempfile.TemporaryDirectory() as folder:
        write_repository(source, folder, name, config_file=config_file, licence=licence, data=data)
        with hub_errors(name):
            api = HfApi()
            api.create_repo(name, private=private or None, exist_ok=True)
            done = api.upload_folder(
                repo_id=name, folder_path=folder, commit_message="Upload with senet_transfer"
            )
    return str(done.commit_url)


def write_repository(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    name: str,
    *,
    config_file: str = "",
    licence: str = "",
    data: Sequence[str] = (),
) -> None:
    """Write the files of a repository to a folder; see :func:`push` for the arguments.

    The files are ``model.safetensors``, ``config.yaml`` (without paths of this machine),
    ``config.json`` (class names, preprocessing and network, for other programs) and ``README.md``.

    Raises:
        UserError: If the model can't be loaded, or a file can't be written.
    """
    name = _repository_name(name)
    loaded = load_trained(os.fspath(source), config_file, device="cpu")
    cfg, classes = _published_config(loaded), loaded.classes
    stored = _stored_values(loaded)
    # Keep the origin of the weights from which training started.
    target_of(loaded.model).backbone.weights_source = stored.get(OWN_METADATA, {}).get("source", {})
    metadata = model_metadata(loaded.model, classes)
    metadata["preprocessing"] |= {
        key: getattr(loaded.preprocessing, key) for key in ("resize", "crop", "interpolation")
    }
    out = Path(folder)
    save_weights(loaded.model, out / "model.safetensors", classes)
    try:
        (out / "config.yaml").write_text(cfg.dump(), encoding="utf-8")
        (out / "config.json").write_text(
            json.dumps({"library_name": "senet_transfer", **metadata}, indent=2), encoding="utf-8"
        )
        card = model_card(
            name,
            cfg,
            metadata,
            _results(loaded.cfg, stored),
            family=loaded.family,
            licence=licence,
            data=data,
        )
        (out / "README.md").write_text(card, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out} can't be written: {error}. Choose a different path.") from error


def _repository_name(repository: str) -> str:
    name, revision = parse_hub_name(repository)
    if revision:
        raise UserError(f"{repository} has a revision; expected owner/name. Leave out the @.")
    return name


def _published_config(loaded: LoadedModel) -> CfgNode:
    """Return a model's config without weights and paths of this machine."""
    cfg = loaded.cfg.clone()
    cfg.defrost()
    default = get_senet_config()
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", default.MODEL.DEVICE
    cfg.OUTPUT_DIR, cfg.DATASETS.REGISTER = default.OUTPUT_DIR, []
    cfg.DATASETS.CLASSES = loaded.classes
    for key, value in list(config_items(cfg)):
        if key == "DATASETS.CLASSES":  # in Places365, for example, names such as /a/airfield
            continue
        if isinstance(value, str) and _is_local(value):
            set_config_value(cfg, key, config_value(default, key))
        elif isinstance(value, list | tuple):  # such as DATASETS.TEST
            names = [Path(v).name if isinstance(v, str) and _is_local(v) else v for v in value]
            set_config_value(cfg, key, type(value)(names))
    return cfg


def _is_local(value: str) -> bool:
    """Return whether a value is a path on this machine, not, for example, the name of a model."""
    path = os.path.expanduser(value)
    relative = path.startswith((f".{os.sep}", f"..{os.sep}"))
    return os.path.isabs(path) or relative or (os.sep in path and os.path.exists(path))


def _stored_values(loaded: LoadedModel) -> dict[str, Any]:
    """Return the values that are stored with the tensors of a model's weight file."""
    if loaded.family != "senet_transfer":
        return {OWN_METADATA: {"source": target_of(loaded.model).backbone.weights_source}}
    return read_tensors(local_weights(loaded.cfg.MODEL.WEIGHTS)[0]).metadata


def _results(cfg: CfgNode, stored: dict[str, Any]) -> dict[str, Any]:
    """Return the results of this checkpoint's evaluation, as far as they are known.

    They are in the ``results.json`` next to a run's final model, and in its best model itself.
    """
    path = Path(cfg.MODEL.WEIGHTS)
    if path.name == f"{BEST_NAME}.pth":
        known = {"metric", "value"} <= stored.keys()
        return {stored["metric"]: stored["value"]} if known else {}
    results = path.with_name(RESULTS)
    evaluated = "model_ema.pth" if cfg.SOLVER.EMA.ENABLED else "model_final.pth"
    if path.name != evaluated or not results.is_file():
        return {}
    try:
        content = json.loads(results.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{results} is not a JSON file: {error}. Evaluate the model again, or delete the file."
        ) from error
    # A later evaluation of other weights in the same folder has no entry "training".
    return content if isinstance(content, dict) and "training" in content else {}
