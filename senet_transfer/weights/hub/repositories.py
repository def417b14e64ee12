"""Weights in Hugging Face Hub repositories, such as ``hf-hub:timm/resnet18.a1_in1k``."""

import contextlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from senet_transfer.errors import UserError
from senet_transfer.utils.text import first_of, shown
from senet_transfer.weights.formats.timm_config import WEIGHT_FILES

PREFIX = "hf-hub:"

# Files that describe the network. Other files are not downloaded, because they can contain code.
_DESCRIPTIONS = ["config.yaml", "config.json"]


def is_hub_name(name: object) -> bool:
    """Return whether a name refers to a Hugging Face Hub repository."""
    return isinstance(name, str) and name.startswith(PREFIX)


def parse_hub_name(name: str) -> tuple[str, str | None]:
    """Split a name ``hf-hub:owner/name@revision`` into the repository and the revision.

    Raises:
        UserError: If the name is malformed.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    repository, at, revision = name.removeprefix(PREFIX).partition("@")
    try:
        if repository.count("/") != 1 or (at and not revision):
            raise HFValidationError("expected owner/name or owner/name@revision")
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(
            f"{name} is not the name of a Hugging Face Hub repository: {error}. Use a name such as "
            f"{PREFIX}timm/resnet18.a1_in1k."
        ) from error
    return repository, revision or None


@lru_cache(maxsize=64)
def hub_weights(name: str) -> Path:
    """Return the path of a repository's weight file, after downloading it if it has changed.

    The file is stored in huggingface_hub's cache, next to the ``config.yaml`` and ``config.json``
    of the repository. Without network access, the cached files are used. Each process contacts the
    Hub only once per name. huggingface_hub provides the credentials for private repositories, for
    example from the environment variable HF_TOKEN.

    Args:
        name: Name such as "hf-hub:owner/name" or "hf-hub:owner/name@revision". The revision is a
            branch, a tag or a commit.

    Raises:
        UserError: If the name is malformed, the repository or the revision does not exist, the
            repository contains no weights, or the download fails.
    """
    from huggingface_hub import HfApi, snapshot_download

    repository, revision = parse_hub_name(name)
    with hub_errors(name):
        for file in WEIGHT_FILES:
            folder = snapshot_download(
                repository, revision=revision, allow_patterns=[file, *_DESCRIPTIONS]
            )
            if (path := Path(folder, file)).is_file():
                return path
        found = HfApi().list_repo_files(repository, revision=revision)
    raise UserError(
        f"{name} contains no {' or '.join(WEIGHT_FILES)}; its files are: "
        f"{first_of(map(shown, found), 8)}. Expected a repository written by `senet push` or timm. "
        "To use a different file, download it and pass its path."
    )


@contextlib.contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Convert exceptions that huggingface_hub raises in the ``with`` block to UserErrors."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(
            f"{name} is a gated repository. Accept its conditions on {constants.ENDPOINT}, then "
            "run `hf auth login` or set HF_TOKEN."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{name} does not exist on {constants.ENDPOINT}, or it is private and the token has no "
            "access to it. Check the name; for a private repository, run `hf auth login` or set "
            "HF_TOKEN."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(
            f"The revision in {name} does not exist. Use an existing branch, tag or commit after "
            "the @."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"{name} is not completely cached in {constants.HF_HUB_CACHE}, and "
            f"{constants.ENDPOINT} can't be reached. Check the network access and the environment "
            "variables HF_HUB_OFFLINE and HF_ENDPOINT, or download the repository on a different "
            "machine and pass the path of its weight file."
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        raise UserError(
            f"{constants.ENDPOINT} rejected the request for {name} with status {status}: "
            f"{shown(error.server_message or error, 200)}. Check that the token has the required "
            "access (`hf auth whoami`), or try again later."
        ) from error
    except UserError:
        raise
    # Errors from the HTTP library have no base class in common with those above.
    except Exception as error:
        raise UserError(
            f"The transfer between this machine and {name} failed: "
            f"{shown(error, 200) or type(error).__name__}. Check the network access and the disk "
            "space, and try again."
        ) from error
