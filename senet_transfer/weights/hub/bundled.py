"""Weights that are included in this package, such as ``senet_transfer/cifar10_jpeg_se_resnet20``.

Each network has three files in ``senet_transfer/pretrained``: the weights
``NAME-HASH.safetensors``, the config ``NAME.yaml`` and the model card ``NAME.md``. HASH stands for
the first digits of the weight file's SHA-256. ``senet push --bundle`` writes these files.
"""

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from senet_transfer.weights.formats.reader import OWN_METADATA

PUBLISHER = "senet_transfer"
FOLDER = Path(__file__).parents[2] / "pretrained"
MAX_BYTES = 10_000_000  # maximum size of all weights in the package

_FILE = re.compile(r"(?P<name>\w+)-(?P<sha256>[0-9a-f]{8,64})\.safetensors")


def is_bundled_name(name: object) -> bool:
    """Return whether a name starts with the prefix "senet_transfer/" of bundled weights."""
    return isinstance(name, str) and name.startswith(f"{PUBLISHER}/")


def bundled_files(folder: Path | None = None) -> dict[str, tuple[Path, str]]:
    """Return the path of each weight file and the first digits of its SHA-256, by network name."""
    found = {}
    for path in sorted((folder or FOLDER).glob("*.safetensors")):
        if match := _FILE.fullmatch(path.name):
            found[match["name"]] = (path, match["sha256"])
    return found


def bundled_config(name: str) -> str:
    """Return the path of the config for one of the networks in this package.

    The result is "" if ``name`` is not the name of such a network.
    """
    path = FOLDER / f"{name.removeprefix(f'{PUBLISHER}/')}.yaml"
    return str(path) if is_bundled_name(name) and path.is_file() else ""


def stated_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata that this project has stored in a safetensors file.

    The result is {} if the file contains no such metadata, or if it can't be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return dict(json.loads((file.metadata() or {})[OWN_METADATA]))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return {}
