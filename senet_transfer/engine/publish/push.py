"""Upload of a trained model to the Hugging Face Hub."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from senet_transfer.engine.publish.contents import contents_of
from senet_transfer.engine.publish.model_card import Card
from senet_transfer.errors import UserError
from senet_transfer.weights.file_geometry import local_weights
from senet_transfer.weights.hub.repositories import PREFIX, hub_errors, parse_hub_name
from senet_transfer.weights.save import write_own

_UNPUBLISHED = "The weights are not published."


def push(
    source: str | os.PathLike[str], repository: str, *, private: bool = False, **options: Any
) -> str:
    """Upload a model with its config, class names, preprocessing and a generated model card.

    The repository is created if it does not exist. The model can then be passed as
    "hf-hub:owner/name" to :func:`senet_transfer.load` and to all options that take weights.

    Args:
        source: The output folder of a run, a checkpoint, or another source of a complete model; see
            :func:`senet_transfer.load`.
        repository: The name of the repository, "owner/name".
        private: If True, a new repository is private.
        **options: Further arguments for :func:`write_repository`.

    Returns:
        The URL of the uploaded commit.

    Raises:
        UserError: If the name is malformed, the model can't be loaded, there is no token, or the
            upload fails.
    """
    from huggingface_hub import HfApi, get_token

    name = _repository_name(repository)
    if not get_token():
        raise UserError(
            "The upload requires a Hugging Face token. Create a token with write access in the "
            "settings of the Hub, then run `hf auth login` or set HF_TOKEN."
        )
    with tempfile.TemporaryDirectory() as folder:
        write_repository(source, folder, name, **options)
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
    half: bool = False,
    **statements: Any,
) -> None:
    """Write the files of a repository to a folder.

    The files are ``model.safetensors``, ``config.yaml`` (without local paths), ``config.json``
    (class names, preprocessing and network, for other tools) and ``README.md``.

    Args:
        source: The model, as in :func:`push`.
        folder: The folder to write to.
        name: The name of the repository, "owner/name".
        config_file: The config of a weight file; see :func:`senet_transfer.load`.
        half: If True, store tensors with two or more dimensions in float16.
        **statements: Fields of :class:`~senet_transfer.engine.publish.model_card.Card`.

    Raises:
        UserError: If the model can't be loaded, or a file can't be written.
    """
    name = _repository_name(name)
    contents = contents_of(source, config_file, half=half)
    out = Path(folder)
    weights = out / "model.safetensors"
    write_own(weights, contents.tensors, contents.metadata)
    described = {"library_name": "senet_transfer", **contents.metadata}
    card = Card(PREFIX + name, **statements).of_file(contents, weights)
    try:
        (out / "config.yaml").write_text(contents.cfg.dump(), encoding="utf-8")
        (out / "config.json").write_text(json.dumps(described, indent=2), encoding="utf-8")
        (out / "README.md").write_text(card, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out} can't be written: {error}. Choose a different path.") from error


def write_card(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    title: str,
    *,
    config_file: str = "",
    **statements: Any,
) -> None:
    """Write the model card for a model whose weights are not published.

    The card describes the checkpoint, because there is no published weight file.

    Args:
        source: The model, as in :func:`push`.
        path: The file to write, in Markdown.
        title: The title of the card.
        config_file: The config of a weight file; see :func:`senet_transfer.load`.
        **statements: Fields of :class:`~senet_transfer.engine.publish.model_card.Card`.

    Raises:
        UserError: If the model can't be loaded, or the card can't be written.
    """
    contents = contents_of(source, config_file)
    shown = os.fspath(source)  # without local folders
    shown = Path(shown).name if os.path.isabs(os.path.expanduser(shown)) else shown
    card = Card(shown, title, use=_UNPUBLISHED, **statements)
    text = card.of_file(contents, Path(local_weights(contents.run_cfg.MODEL.WEIGHTS)[0]))
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} can't be written: {error}. Choose a different path.") from error


def _repository_name(repository: str) -> str:
    name, revision = parse_hub_name(repository)
    if revision:
        raise UserError(
            f"{repository} contains a revision; expected owner/name. Remove the @ and the revision."
        )
    return name
