"""Launcher that runs a command in one or more processes and sets its exit status."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.engine import launch as launch_processes
from detectron2.utils import comm

from senet_transfer.engine.signals import passed_to_children
from senet_transfer.errors import RunError, UserError
from senet_transfer.utils.import_hook import hide_library_warnings
from senet_transfer.utils.text import counted

# Disk errors. They are not bugs and need no traceback.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)


def run(
    main: Callable[[Any], object],
    argument: Any,
    *,
    device: Callable[[], str] = lambda: "cuda",
    num_gpus: int = 1,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
) -> None:
    """Call ``main(argument)`` in every process of the job, and exit if it fails.

    Under torchrun, the processes already exist, and the rank and world size are read from the
    environment. Otherwise, Detectron2 starts ``num_gpus`` processes on this machine. If there are
    no GPUs, or if ``MODEL.DEVICE`` is "cpu", the processes share the CPU.

    The exit status is 2 for a :class:`UserError` and 1 for a :class:`RunError`; both are printed
    without a traceback. The exit status is also 1 for any other error, and 75 (``signals.STATUS``)
    after a graceful shutdown.

    Args:
        main: A module-level function, so that it can be pickled.
        argument: Any object that can be pickled.
        device: A function that returns ``MODEL.DEVICE``. It is called only if there are several
            processes.
        num_gpus: The number of processes on each machine.
        num_machines: The number of machines.
        machine_rank: The index of this machine, from 0.
        dist_url: The address of the first machine (``tcp://HOST:PORT``), or "auto" for a single
            machine.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        _run_under_torchrun(main, argument, device)
        return
    spawns = num_gpus * num_machines > 1
    try:
        on_cpu = spawns and _is_cpu(device)
        _check_processes(num_gpus, num_machines, dist_url, on_cpu=on_cpu)
    except UserError as error:
        exit_with(error)
    try:
        with contextlib.ExitStack() as stack:
            if num_gpus > 1:
                stack.enter_context(passed_to_children())
            if on_cpu:
                stack.enter_context(_without_gpus())
            launch_processes(
                _run_spawned,
                num_gpus,
                num_machines=num_machines,
                machine_rank=machine_rank,
                dist_url=dist_url,
                args=(main, argument),
            )
    except mp.ProcessExitedException as error:
        if error.exit_code < 0:
            print(f"error: {error}. The other processes were stopped.", file=sys.stderr, flush=True)
        sys.exit(max(error.exit_code, 1))


def _is_cpu(device: Callable[[], str]) -> bool:
    return device().partition(":")[0] == "cpu"


@contextlib.contextmanager
def _without_gpus() -> Iterator[None]:
    """Hide the GPUs from processes that are started inside the context.

    Detectron2 otherwise gives each process a GPU, even if its model runs on the CPU.
    """
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        yield
    finally:
        del os.environ["CUDA_VISIBLE_DEVICES"]
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def _check_processes(num_gpus: int, num_machines: int, dist_url: str, *, on_cpu: bool) -> None:
    if num_gpus < 1 or num_machines < 1:
        raise UserError(
            f"--num-gpus is {num_gpus} and --num-machines is {num_machines}; expected 1 or more "
            "for both. --num-gpus is the number of processes per machine, with or without GPUs."
        )
    gpus = torch.cuda.device_count()
    if not on_cpu and torch.cuda.is_available() and num_gpus > gpus:
        raise UserError(
            f"--num-gpus is {num_gpus}, but this machine has {counted(gpus, 'GPU')}. Reduce "
            "--num-gpus, or set MODEL.DEVICE to cpu."
        )
    if num_machines > 1 and (dist_url == "auto" or "127.0.0.1" in dist_url):
        raise UserError(
            f"--num-machines is {num_machines}, but --dist-url is {dist_url}, which other machines "
            "can't reach. Set --dist-url to the address of the first machine: tcp://HOST:PORT."
        )


def run_single(main: Callable[[Any], object], argument: Any) -> None:
    """Call ``main(argument)`` in this process; errors set the same exit status as :func:`run`."""
    try:
        main(argument)
    except (UserError, RunError) as error:
        exit_with(error)


def _run_under_torchrun(
    main: Callable[[Any], object], argument: Any, device: Callable[[], str]
) -> None:
    try:
        has_gpu = torch.cuda.is_available() and not _is_cpu(device)
    except UserError as error:
        exit_with(error)
    # Launchers such as SLURM or Kubernetes may set only RANK and WORLD_SIZE. In that case, each
    # process runs on a separate machine or in a separate container.
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if has_gpu:
        torch.cuda.set_device(local_rank)
    store, rank, processes = next(dist.rendezvous("env://"))
    # torchrun's store outlives a restart and still contains the addresses of the old processes.
    store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "nccl" if has_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=processes)
    comm.create_local_process_group(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    try:
        _guarded(main, argument)
    finally:
        dist.destroy_process_group()


def _run_spawned(main: Callable[[Any], object], argument: Any) -> None:
    # The launching process has hidden these warnings only for itself.
    hide_library_warnings()
    _guarded(main, argument)
    # Otherwise, the process group's threads may still be running at exit and abort the process.
    if dist.is_initialized():
        dist.destroy_process_group()


def _guarded(main: Callable[[Any], object], argument: Any) -> None:
    if comm.get_world_size() > 1:
        # Libraries such as WebDataset read these variables, which not all launchers set.
        os.environ["RANK"] = str(comm.get_rank())
        os.environ["WORLD_SIZE"] = str(comm.get_world_size())
    try:
        main(argument)
    except (UserError, RunError) as error:
        exit_with(error)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        exit_with(
            RunError(
                f"Writing a file failed: {error}. Free disk space, then continue with --resume."
            )
        )


def exit_with(error: UserError | RunError) -> NoReturn:
    """Print an error and exit with the corresponding status.

    If all processes raise the same error, only the main process prints it.
    """
    if comm.is_main_process() or not error.on_all_ranks:
        print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(error.exit_status)
