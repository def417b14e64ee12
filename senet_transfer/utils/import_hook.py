"""Importing Detectron2, and code that runs when another package is imported, now or later."""

import contextlib
import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType

from senet_transfer.utils.private_api import is_initializing


@contextlib.contextmanager
def without_script_warnings() -> Iterator[None]:
    """Hide the deprecation of ``torch.jit.script`` while Detectron2, which uses it, is imported."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.script")
        yield


def after_import(name: str, action: Callable[[], object]) -> None:
    """Run an action once a module has been imported: at once if it has been, else right after.

    Args:
        name: the dotted name of the module.
        action: takes no arguments.
    """
    module = sys.modules.get(name)
    if module is not None and not is_initializing(module):
        action()
    else:
        sys.meta_path.insert(0, _Finder(name, action))


class _Finder(importlib.abc.MetaPathFinder):
    """A finder of one module that leaves the search to all others and adds to its execution."""

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
    """A module's own loader, followed by an action."""

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
