"""Starting a command in one process or many, and ending it with the right status."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.engine import launch as launch_processes
from detectron2.utils import comm

from senet_transfer.engine.signals import passed_to_children
from senet_transfer.errors import RunError, UserError

# What no program can do anything about.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)


def run(
    main: Callable[[Any], object],
    argument: Any,
    *,
    num_gpus: int = 1,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
) -> None:
    """Call ``main(argument)`` in every process of the job, and exit unless it returns.

    Under torchrun the processes exist already, and rank and world size come from the environment.
    Otherwise Detectron2 starts ``num_gpus`` processes on this machine; without GPUs these share
    the CPU.

    Args:
        main: a function of a module, so that it can be sent to another process.
        argument: any object that can be pickled.
        num_gpus: processes on each machine.
        num_machines: machines of the job.
        machine_rank: number of this machine, from 0.
        dist_url: address of the first machine, ``tcp://HOST:PORT``; "auto" on a single machine.

    Exit status: 2 for a :class:`UserError` and 1 for a :class:`RunError`, whose messages are
    printed without a traceback; 1 for any other error; 75 where the run was told to stop and has
    saved (``interruption.STATUS``).
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        _run_under_torchrun(main, argument)
        return
    try:
        _check_processes(num_gpus, num_machines, dist_url)
    except UserError as error:
        exit_with(error)
    try:
        with passed_to_children() if num_gpus > 1 else contextlib.nullcontext():
            launch_processes(
                _guarded,
                num_gpus,
                num_machines=num_machines,
                machine_rank=machine_rank,
                dist_url=dist_url,
                args=(main, argument),
            )
    except mp.ProcessExitedException as error:
        if error.exit_code < 0:
            print(f"error: {error}; the others were ended.", file=sys.stderr, flush=True)
        sys.exit(max(error.exit_code, 1))


def _check_processes(num_gpus: int, num_machines: int, dist_url: str) -> None:
    if num_gpus < 1 or num_machines < 1:
        raise UserError(
            f"--num-gpus is {num_gpus} and --num-machines {num_machines}, expected 1 or "
            "more: the processes of each machine (which share the CPU where there is no GPU)."
        )
    if torch.cuda.is_available() and num_gpus > torch.cuda.device_count():
        raise UserError(
            f"--num-gpus is {num_gpus}, this machine has {torch.cuda.device_count()}. "
            "Give at most as many."
        )
    if num_machines > 1 and (dist_url == "auto" or "127.0.0.1" in dist_url):
        raise UserError(
            f"--num-machines is {num_machines} and --dist-url {dist_url}, which other "
            "machines can't reach. Give the address of the first: tcp://HOST:PORT."
        )


def run_single(main: Callable[[Any], object], argument: Any) -> None:
    """Call ``main(argument)`` in this process; errors end it as in :func:`run`."""
    try:
        main(argument)
    except (UserError, RunError) as error:
        exit_with(error)


def _run_under_torchrun(main: Callable[[Any], object], argument: Any) -> None:
    has_gpu = torch.cuda.is_available()
    # Other starters than torchrun (SLURM, Kubernetes) may set rank and world size alone: then each
    # process has a machine, or a container, of its own.
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if has_gpu:
        torch.cuda.set_device(local_rank)
    store, rank, processes = next(dist.rendezvous("env://"))
    # torchrun's store outlives a restart, and with it the addresses of processes that are gone.
    store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "nccl" if has_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=processes)
    comm.create_local_process_group(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    try:
        _guarded(main, argument)
    finally:
        dist.destroy_process_group()


def _guarded(main: Callable[[Any], object], argument: Any) -> None:
    if comm.get_world_size() > 1:
        # What reads the environment sees the same world, whoever started the processes.
        os.environ["RANK"] = str(comm.get_rank())
        os.environ["WORLD_SIZE"] = str(comm.get_world_size())
    try:
        main(argument)
    except (UserError, RunError) as error:
        exit_with(error)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        fault = RunError(f"A file can't be written: {error}. Make room, and go on with --resume.")
        exit_with(fault)


def exit_with(error: UserError | RunError) -> None:
    """Print an error, once where all processes raise it, and exit with its status."""
    if comm.is_main_process() or not error.on_all_ranks:
        print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(error.exit_status)
