"""Starting a command in one process or many, and ending it with the right status."""

import argparse
import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.engine import launch as launch_processes
from detectron2.utils import comm

from senet_transfer.errors import UserError

USER_ERROR_STATUS = 2


def run(main: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
    """Runs ``main(args)`` in every process of the job and exits.

    Under torchrun the processes are there already, and rank and world size come from the
    environment. Otherwise Detectron2 starts ``args.num_gpus`` processes a machine; without GPUs
    these share the CPU. A :class:`UserError` is printed without a traceback, exit status 2.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        _run_under_torchrun(main, args)
        return
    if torch.cuda.is_available() and args.num_gpus > torch.cuda.device_count():
        exit_with(
            UserError(
                f"--num-gpus is {args.num_gpus}, this machine has {torch.cuda.device_count()}. "
                "Give at most as many."
            )
        )
    try:
        launch_processes(
            _guarded,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(main, args),
        )
    except mp.ProcessExitedException as error:
        sys.exit(error.exit_code)


def run_single(main: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
    """Runs ``main(args)`` in this process, with the same ending as :func:`run`."""
    try:
        main(args)
    except UserError as error:
        exit_with(error)


def _run_under_torchrun(main: Callable, args: argparse.Namespace) -> None:
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if has_gpu else "gloo")
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    try:
        _guarded(main, args)
    finally:
        dist.destroy_process_group()


def _guarded(main: Callable, args: argparse.Namespace) -> None:
    # The libraries that read the environment (a data loader's worker, say) see the same world
    # whoever started the processes.
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(comm.get_rank()), str(comm.get_world_size())
    try:
        main(args)
    except UserError as error:
        exit_with(error)


def exit_with(error: UserError) -> None:
    """Prints the error, once for all processes, and exits with the status of a user's mistake."""
    # One that comes out of a data loader's worker carries the worker's traceback before it.
    message = str(error).rpartition("senet_transfer.errors.UserError: ")[2].strip()
    if comm.is_main_process():
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(USER_ERROR_STATUS)
