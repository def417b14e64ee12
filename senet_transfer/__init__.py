"""Squeeze-and-Excitation networks beyond ImageNet, on Detectron2.

Importing this package is fast because its public functions are imported on first access. Its
backbones and heads are registered with Detectron2 as soon as both packages are imported, in either
order.
"""

import importlib
from typing import TYPE_CHECKING, Any

from senet_transfer import _moved
from senet_transfer.errors import UserError
from senet_transfer.utils.import_hook import (
    after_import,
    require_detectron2,
    without_script_warnings,
)

__version__ = "0.1.0"  # pyproject.toml reads it from here.

if TYPE_CHECKING:
    from senet_transfer.config import add_senet_config, get_senet_config
    from senet_transfer.engine.predictor.load import load
    from senet_transfer.export.deploy import deploy
    from senet_transfer.models import create_backbone, create_classifier, list_models
    from senet_transfer.weights import (
        apply_file_geometry,
        list_catalogue,
        load_weights,
        save_weights,
    )

_PLACES = {
    "add_senet_config": "config",
    "apply_file_geometry": "weights",
    "create_backbone": "models",
    "create_classifier": "models",
    "deploy": "export.deploy",
    "get_senet_config": "config",
    "list_catalogue": "weights",
    "list_models": "models",
    "load": "engine.predictor.load",
    "load_weights": "weights",
    "save_weights": "weights",
}

__all__ = [
    "UserError",
    "add_senet_config",
    "apply_file_geometry",
    "create_backbone",
    "create_classifier",
    "deploy",
    "get_senet_config",
    "list_catalogue",
    "list_models",
    "load",
    "load_weights",
    "save_weights",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first access (PEP 562)."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_detectron2()
    with without_script_warnings():
        value = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_moved.install()
after_import("detectron2.modeling", lambda: importlib.import_module("senet_transfer.models"))
