"""Import helpers that suppress known warnings and run actions after an import."""

import contextlib
import importlib.abc
import importlib.util
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType

from senet_transfer.utils.private_api import is_initializing

# Names of torch loggers, each with the start of a message to hide.
_LOGGERS = ("torch.fx._symbolic_trace", "torch.utils.cpp_extension")
_HIDDEN = ("is_fx_tracing will return true", "No CUDA runtime is found, using CUDA_HOME")


@contextlib.contextmanager
def without_script_warnings() -> Iterator[None]:
    """Suppress the ``torch.jit.script`` deprecation warning that importing Detectron2 triggers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.script")
        yield


def hide_library_warnings() -> None:
    """Hide torch warnings that Detectron2 triggers and that users of a command can't act on.

    Only commands should call this function, because it changes the process's warning filters and
    loggers.
    """
    warnings.filterwarnings("ignore", message="torch.meshgrid: in an upcoming release")
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_is_shown)


def _is_shown(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_HIDDEN)


def require_detectron2() -> None:
    """Raise an ImportError with installation instructions if Detectron2 is missing."""
    if importlib.util.find_spec("detectron2") is None:
        raise ImportError(
            "senet_transfer requires Detectron2, which is not installed. PyPI has no package named "
            "detectron2. Run `install_detectron2.py`, which pip installed next to the `senet` "
            "command (in a clone of this project: `python tools/install_detectron2.py`), or build "
            "Detectron2 from its official source."
        )


def after_import(name: str, action: Callable[[], object]) -> None:
    """Run an action as soon as a module has been imported.

    If the module is already imported, the action runs immediately.

    Args:
        name: Dotted name of the module.
        action: Function to call, without arguments.
    """
    module = sys.modules.get(name)
    if module is not None and not is_initializing(module):
        action()
    else:
        sys.meta_path.insert(0, _Finder(name, action))


class _Finder(importlib.abc.MetaPathFinder):
    """Meta path finder that runs an action after the given module is executed."""

    def __init__(self, name: str, action: Callable[[], object]):
        self.name, self.action = name, action

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.action)
        return spec


class _Loader(importlib.abc.Loader):
    """Loader wrapper that runs an action after the module is executed."""

    def __init__(self, loader: importlib.abc.Loader, action: Callable[[], object]):
        self.loader, self.action = loader, action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.action()
