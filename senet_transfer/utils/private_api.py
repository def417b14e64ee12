"""Private parts of other libraries, each behind a function, with the versions it was checked on.

No other module of the package reads or writes a private attribute of torch, fvcore, Detectron2 or
Python. ``tests/utils/test_private_api.py`` checks each function against public behaviour, so that
a test fails where an upgrade has moved something. Importing this module imports no library.
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
    """Return whether a functorch transform or a dispatch mode sees each operator that is called.

    torch 2.11 to 2.14: ``torch._C._are_functorch_transforms_active`` and
    ``torch.utils._python_dispatch._get_current_dispatch_mode``.
    """
    import torch
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    return torch._C._are_functorch_transforms_active() or _get_current_dispatch_mode() is not None


def has_hooks(module: nn.Module) -> bool:
    """Return whether a forward, forward-pre, backward or backward-pre hook is on a module.

    torch 2.11 to 2.14: ``_forward_hooks``, ``_forward_pre_hooks``, ``_backward_hooks`` and
    ``_backward_pre_hooks`` of ``torch.nn.Module``. Global hooks are not seen.
    """
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def set_state_dict_metadata(state: Any, metadata: Mapping[str, Any]) -> None:
    """Attach metadata to a state dict where ``torch.save`` keeps the versions of modules.

    ``load_state_dict`` ignores entries under names that are no module's.

    torch 2.11 to 2.14: ``_metadata`` of what ``state_dict()`` returns.

    Args:
        state: an ``OrderedDict``; a plain dict takes no attributes.
        metadata: entries by name.
    """
    from collections import OrderedDict

    state._metadata = OrderedDict(metadata)


def inductor_freezing() -> AbstractContextManager[None]:
    """Return a context in which ``torch.compile`` treats the weights as constants.

    Same as ``TORCHINDUCTOR_FREEZING=1`` in the environment.

    torch 2.11 to 2.14: ``torch._inductor.config``.
    """
    import torch._inductor.config

    return torch._inductor.config.patch(freezing=True)


def limit_history(storage: EventStorage, length: int) -> None:
    """Make an event storage keep the last values only of each metric that is not logged yet.

    Detectron2 0.6 to 0.7: ``_history``, a ``defaultdict``, of ``EventStorage``.

    Args:
        storage: the storage of a run.
        length: values to keep for each metric.
    """
    from fvcore.common.history_buffer import HistoryBuffer

    storage._history.default_factory = functools.partial(HistoryBuffer, max_length=length)


def set_write_period(writer: PeriodicWriter, period: int) -> None:
    """Set how many iterations lie between two writes of Detectron2's hook.

    Detectron2 0.6 to 0.7: ``_period`` of ``PeriodicWriter``.
    """
    writer._period = period


def end_failed_load(checkpointer: DetectionCheckpointer) -> None:
    """Allow the next load after one that raised an exception.

    Detectron2 0.6 to 0.7: ``_parsed_url_during_load`` of ``DetectionCheckpointer``, which
    ``load`` resets after a success only, and requires to be None.
    """
    checkpointer._parsed_url_during_load = None


def is_initializing(module: ModuleType) -> bool:
    """Return whether a module in ``sys.modules`` is still being executed.

    CPython 3.11 to 3.13: ``_initializing`` of a module's spec.
    """
    return getattr(module.__spec__, "_initializing", False)
