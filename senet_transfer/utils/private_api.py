"""Wrappers for private APIs of other libraries; each docstring lists the tested versions.

No other module of the package reads or writes a private attribute of torch, fvcore, Detectron2 or
Python. ``tests/utils/test_private_api.py`` checks each function against public behaviour, so a test
fails if an upgrade changes a private API. Importing this module does not import any of these
libraries.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.engine.hooks import PeriodicWriter
    from detectron2.modeling import FPN
    from detectron2.utils.events import EventStorage
    from torch import Tensor, nn
    from torch.amp import GradScaler
    from torch.distributed import ProcessGroup
    from torch.export import ExportedProgram
    from torch.optim import Optimizer


def intercepts_operators() -> bool:
    """Return whether a functorch transform or a dispatch mode is active.

    Uses a private API of torch 2.11 to 2.14: ``torch._C._are_functorch_transforms_active`` and
    ``torch.utils._python_dispatch._get_current_dispatch_mode``.
    """
    import torch
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    return torch._C._are_functorch_transforms_active() or _get_current_dispatch_mode() is not None


def is_exporting() -> bool:
    """Return whether ``torch.export`` is tracing, as opposed to ``torch.compile``.

    In torch 2.11 to 2.13, ``torch.compiler.is_exporting`` also returns True while
    ``torch.compile`` compiles a function.

    Uses a private API of torch 2.11 to 2.14: ``torch.compiler._is_exporting_flag``.
    """
    import torch

    return torch.compiler._is_exporting_flag


def has_hooks(module: nn.Module) -> bool:
    """Return whether a module has forward, forward-pre, backward or backward-pre hooks.

    Global hooks are ignored.

    Uses a private API of torch 2.11 to 2.14: ``_forward_hooks``, ``_forward_pre_hooks``,
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

    Uses a private API of torch 2.11 to 2.14: attribute ``_metadata`` of a state dict.

    Args:
        state: State dict. It must be an ``OrderedDict``, because a plain dict can't have
            attributes.
        metadata: Metadata entries by name.
    """
    from collections import OrderedDict

    state._metadata = OrderedDict(metadata)


def norms_of(tensors: Sequence[Tensor], order: float) -> Tensor:
    """Return the norms of N tensors as a tensor of shape ``(N,)``, using few kernel launches.

    Uses a private API of torch 2.11 to 2.14: ``torch._foreach_norm``.
    """
    import torch

    return torch.stack(torch._foreach_norm(tensors, order))


def multiply_all(tensors: Sequence[Tensor], factors: Tensor) -> None:
    """Multiply each of N tensors in place by its element of ``factors``, a ``(N,)`` tensor.

    Uses a private API of torch 2.11 to 2.14: ``torch._foreach_mul_``.
    """
    import torch

    torch._foreach_mul_(tensors, factors.unbind())


def copy_all(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy tensors into the corresponding targets, using few kernel launches.

    Uses a private API of torch 2.11 to 2.14: ``torch._foreach_copy_``.
    """
    import torch

    torch._foreach_copy_(targets, values)


def lerp_all(
    targets: Sequence[Tensor],
    values: Sequence[Tensor],
    weight: float | Tensor,
    held: Tensor | None = None,
) -> None:
    """Interpolate each target towards its value, in place and with few kernel launches.

    Uses a private API of torch 2.11 to 2.14: ``torch._foreach_lerp_``, ``torch._foreach_mul``,
    ``torch._foreach_mul_``, ``torch._foreach_sub`` and ``torch._foreach_add_``.

    Args:
        targets: Tensors to change.
        values: Finite tensors with the same shapes and dtypes as the targets.
        weight: Weight of the values, in [0, 1], as a number or a scalar tensor on the same device.
        held: Scalar tensor on the same device: 1 leaves the targets unchanged, 0 interpolates them.
            None is equivalent to 0.
    """
    import torch

    if isinstance(weight, torch.Tensor):
        differences = torch._foreach_sub(values, targets)
        torch._foreach_mul_(differences, weight if held is None else weight * (1 - held))
        torch._foreach_add_(targets, differences)
        return
    if held is not None:
        # A held target is interpolated towards itself. Products with 0 and 1 are exact.
        values = torch._foreach_mul(values, 1 - held)
        torch._foreach_add_(values, torch._foreach_mul(targets, held))
    torch._foreach_lerp_(targets, values, weight)


def skips_on_device(optimizer: Optimizer) -> bool:
    """Return whether an optimizer can skip a step on the device if its ``found_inf`` tensor is 1.

    Uses a private API of torch 2.11 to 2.14: ``_step_supports_amp_scaling``, which is True for
    fused optimizers.
    """
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def scaler_state(scaler: GradScaler) -> list[Tensor]:
    """Return the tensors that ``GradScaler.update`` changes in place.

    Uses a private API of torch 2.11 to 2.14: ``_scale`` and ``_growth_tracker``, which the first
    call to ``scale`` creates.
    """
    if not scaler.is_enabled():
        return []
    return [tensor for tensor in (scaler._scale, scaler._growth_tracker) if tensor is not None]


def cpu_group() -> ProcessGroup:
    """Return a process group of all ranks for collective operations on CPU tensors.

    Uses a private API of Detectron2 0.6 to 0.7: ``_get_global_gloo_group``, which
    ``comm.all_gather`` uses.
    """
    from detectron2.utils import comm

    return comm._get_global_gloo_group()


def inductor_freezing() -> AbstractContextManager[None]:
    """Return a context manager that makes ``torch.compile`` treat the weights as constants.

    This has the same effect as the environment variable ``TORCHINDUCTOR_FREEZING=1``.

    Uses a private API of torch 2.11 to 2.14: ``torch._inductor.config``.
    """
    import torch._inductor.config

    return torch._inductor.config.patch(freezing=True)


def limit_history(storage: EventStorage, length: int) -> None:
    """Limit the number of values that an event storage keeps for each metric.

    Metrics that already have a value are not affected.

    Uses a private API of Detectron2 0.6 to 0.7: ``EventStorage._history``, a ``defaultdict``.

    Args:
        storage: Event storage of a run.
        length: Number of most recent values to keep per metric.
    """
    from fvcore.common.history_buffer import HistoryBuffer

    storage._history.default_factory = functools.partial(HistoryBuffer, max_length=length)


def set_write_period(writer: PeriodicWriter, period: int) -> None:
    """Set the number of iterations between writes of a ``PeriodicWriter``.

    Uses a private API of Detectron2 0.6 to 0.7: ``PeriodicWriter._period``.
    """
    writer._period = period


def set_size_divisibility(fpn: FPN, multiple: int) -> None:
    """Set the size divisibility of an FPN: images are padded to multiples of this number of pixels.

    Uses a private API of Detectron2 0.6 to 0.7: ``FPN._size_divisibility``.
    """
    fpn._size_divisibility = multiple


def end_failed_load(checkpointer: DetectionCheckpointer) -> None:
    """Reset a checkpointer after a failed load, so that it can load again.

    Uses a private API of Detectron2 0.6 to 0.7: ``DetectionCheckpointer._parsed_url_during_load``.
    ``load`` requires this attribute to be None, but resets it only after a successful load.
    """
    checkpointer._parsed_url_during_load = None


def is_initializing(module: ModuleType) -> bool:
    """Return whether a module in ``sys.modules`` is still being executed.

    Uses a private API of Python 3.11 to 3.13: ``_initializing`` of a module spec.
    """
    return getattr(module.__spec__, "_initializing", False)


def parser_arguments(parser: Any) -> list[Any]:
    """Return the arguments of an ``ArgumentParser`` in definition order.

    Uses a private API of Python 3.11 to 3.13: ``ArgumentParser._actions``.
    """
    return parser._actions


def compile_program(program: ExportedProgram, path: str, metadata: Mapping[str, str]) -> None:
    """Compile an exported program with AOTInductor, and write it to a package (``.pt2``).

    Uses a private but documented API of torch 2.11 to 2.14:
    ``torch._inductor.aoti_compile_and_package``, and exceptions in ``torch._inductor.exc``.

    Args:
        program: Exported program.
        path: Path of the package to write.
        metadata: Strings to store in the package.

    Raises:
        FileNotFoundError: If there is no C++ compiler.
    """
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.exc import InductorError, InvalidCxxCompiler

    configs = {"aot_inductor.metadata": dict(metadata)}
    try:
        aoti_compile_and_package(program, package_path=path, inductor_configs=configs)
    except InductorError as error:
        if isinstance(error.inner_exception, InvalidCxxCompiler):
            raise FileNotFoundError("no C++ compiler was found") from error
        raise


def open_compiled(path: str) -> tuple[Callable[..., Any], dict[str, str]]:
    """Load a compiled function and its metadata from a package written by :func:`compile_program`.

    Uses a private API of torch 2.11 to 2.14: ``torch._inductor.aoti_load_package``.
    """
    from torch._inductor import aoti_load_package

    compiled = aoti_load_package(path)
    return compiled, compiled.get_metadata()
