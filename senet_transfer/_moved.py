"""Import paths from version 0.1, which are deprecated and will be removed in version 0.3.

Importing from an old path emits a DeprecationWarning and returns the same objects as importing from
the new path.
"""

import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType

_MODELS = "senet_transfer.models"
_FAMILIES = "senet_transfer.weights.families"

# Packages are listed in addition to their modules.
MOVED = {
    "senet_transfer.backbones": _MODELS,
    "senet_transfer.backbones.build": f"{_MODELS}.build",
    "senet_transfer.backbones.registry": f"{_MODELS}.registry",
    "senet_transfer.backbones.parts": f"{_MODELS}.backbones.common",
    "senet_transfer.backbones.shake": f"{_MODELS}.backbones.shake_resnet",
    "senet_transfer.backbones.trunk": f"{_MODELS}.backbones.builder",
    **{
        f"senet_transfer.backbones.{name}": f"{_MODELS}.backbones.{name}"
        for name in (
            "blocks", "bn_inception", "cifar_blocks", "cifar_resnet", "inception_resnet",
            "mobilenet", "resnet", "shufflenet", "vgg", "wide_resnet",
        )
    },
    "senet_transfer.classification": _MODELS,
    "senet_transfer.classification.classifier": f"{_MODELS}.classifier",
    "senet_transfer.classification.image_classifier": f"{_MODELS}.image_classifier",
    "senet_transfer.data.coco": "senet_transfer.data.detection.coco",
    "senet_transfer.layers.gated_sum": "senet_transfer.layers.fused_gate",
    "senet_transfer.layers.shake": "senet_transfer.layers.shake_shake",
    "senet_transfer.weights.architecture": f"{_FAMILIES}.architecture",
    "senet_transfer.weights.catalogue": "senet_transfer.weights.hub.catalogue",
    "senet_transfer.weights.config": "senet_transfer.weights.file_geometry",
    "senet_transfer.weights.detect": f"{_FAMILIES}.detect",
    "senet_transfer.weights.geometry": f"{_FAMILIES}.geometry",
    "senet_transfer.weights.names": f"{_FAMILIES}.renaming",
    "senet_transfer.weights.source": "senet_transfer.weights.mapping.source",
}  # fmt: skip


class MovedFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import hook that redirects old module names to the modules that replaced them."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        if fullname not in MOVED:
            return None
        return importlib.util.spec_from_loader(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        old, new = module.__name__, MOVED[module.__name__]
        warnings.warn(
            f"{old} has moved to {new}; the old name will be removed in version 0.3.",
            DeprecationWarning,
            stacklevel=2,
        )
        module.__doc__ = f"Deprecated alias of :mod:`{new}`."
        current = importlib.import_module(new)
        namespace = vars(module)
        namespace["__getattr__"] = lambda name: getattr(current, name)
        namespace["__dir__"] = lambda: dir(current)
        if hasattr(current, "__all__"):
            namespace["__all__"] = current.__all__


def install() -> None:
    """Make the old module names importable."""
    if not any(isinstance(finder, MovedFinder) for finder in sys.meta_path):
        # This finder must come first: an updated clone may still contain a folder of stale bytecode
        # under an old name, which the default finders would import as an empty package.
        sys.meta_path.insert(0, MovedFinder())
