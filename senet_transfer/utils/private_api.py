"""Wrappers for private APIs of other libraries, with the versions they were tested with.

No other module of the package reads or writes a private attribute of torch, fvcore, Detectron2 or
Python. ``tests/utils/test_private_api.py`` checks each function against public behaviour, so that a
test fails if an upgrade changes a private API. Importing this module does not import any of these
libraries.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.engine.hooks import PeriodicWriter
    from detectron2.utils.events import EventStorage
    from torch import nn


def intercepts_operators() -> bool:
    """Return whether a functorch transform or a dispatch mode intercepts operators.

    Private API (torch 2.11 to 2.14): ``torch._C._are_functorch_transforms_active`` and
    ``torch.utils._python_dispatch._get_current_dispatch_mode``.
    """
    import torch
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    return torch._C._are_functorch_transforms_active() or _get_current_dispatch_mode() is not None


def has_hooks(module: nn.Module) -> bool:
    """Return whether a module has forward, forward-pre, backward or backward-pre hooks.

    Global hooks are ignored.

    Private API (torch 2.11 to 2.14): ``_forward_hooks``, ``_forward_pre_hooks``,
    ``_backward_hooks`` and ``_backward_pre_hooks`` of ``torch.nn.Module``.
    """
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def set_state_dict_metadata(state: Any, metadata: Mapping[str, Any]) -> None:
    """Attach metadata to a state dict, in the attribute that usually contains module versions.

    ``torch.save`` stores this attribute, and ``load_state_dict`` ignores entries that are not named
    after a module.

    Private API (torch 2.11 to 2.14): attribute ``_metadata`` of a state dict.

    Args:
        state: State dict. It must be an ``OrderedDict``, because a plain dict can't have
            attributes.
        metadata: Metadata entries by name.
    """
    from collections import OrderedDict

    state._metadata = OrderedDict(metadata)


def inductor_freezing() -> AbstractContextManager[None]:
    """Return a context in which ``torch.compile`` treats the weights as constants.

    This has the same effect as the environment variable ``TORCHINDUCTOR_FREEZING=1``.

    Private API (torch 2.11 to 2.14): ``torch._inductor.config``.
    """
    import torch._inductor.config

    return torch._inductor.config.patch(freezing=True)


def limit_history(storage: EventStorage, length: int) -> None:
    """Limit the number of values that an event storage keeps for each metric.

    Metrics that already have a value are not affected.

    Private API (Detectron2 0.6 to 0.7): ``EventStorage._history``, a ``defaultdict``.

    Args:
        storage: Event storage of a run.
        length: Number of most recent values to keep per metric.
    """
    from fvcore.common.history_buffer import HistoryBuffer

    storage._history.default_factory = functools.partial(HistoryBuffer, max_length=length)


def set_write_period(writer: PeriodicWriter, period: int) -> None:
    """Set the number of iterations between writes of a ``PeriodicWriter``.

    Private API (Detectron2 0.6 to 0.7): ``PeriodicWriter._period``.
    """
    writer._period = period


def end_failed_load(checkpointer: DetectionCheckpointer) -> None:
    """Reset a checkpointer after a failed load, so that it can load again.

    Private API (Detectron2 0.6 to 0.7): ``DetectionCheckpointer._parsed_url_during_load``. ``load``
    requires this attribute to be None, but resets it only after a successful load.
    """
    checkpointer._parsed_url_during_load = None


def is_initializing(module: ModuleType) -> bool:
    """Return whether a module in ``sys.modules`` is still being executed.

    Private API (CPython 3.11 to 3.13): ``_initializing`` of a module spec.
    """
    return getattr(module.__spec__, "_initializing", False)
