"""``senet train``: training and evaluation of a model from a config."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from senet_transfer.cli.arguments import argument_parser as parser
from senet_transfer.cli.arguments import start_process
from senet_transfer.utils.import_hook import without_script_warnings

if TYPE_CHECKING:
    from senet_transfer.engine.setup import RunOptions

__all__ = ["command", "parser", "run_options"]


def command(words: list[str] | None = None) -> None:
    """Parse the arguments and run the command."""
    args: argparse.Namespace = parser().parse_args(words)
    start_process()
    # Imported here because --help and invalid arguments need neither torch nor Detectron2.
    with without_script_warnings():
        from senet_transfer.config.load import load_config
        from senet_transfer.engine import train
        from senet_transfer.engine.launch import run

    options = run_options(args)
    main: Callable[..., object]
    if args.config_file.endswith(".py"):
        from senet_transfer.engine.lazy_config import train as lazy

        main, device = lazy.main, lambda: lazy.load_lazy_config(options).train.device
    else:
        main = train.main
        device = lambda: load_config(args.config_file, list(args.opts)).MODEL.DEVICE  # noqa: E731
    run(
        main,
        options,
        device=device,
        num_gpus=args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
    )


def run_options(args: argparse.Namespace) -> "RunOptions":
    """Convert parsed arguments to run options."""
    from senet_transfer.engine.setup import RunOptions

    options = tuple(args.opts)
    if args.iou_types is not None:
        options += ("TEST.DIAGNOSTICS", repr(tuple(filter(None, args.iou_types.split(",")))))
    return RunOptions(
        config_file=args.config_file,
        options=options,
        datasets=tuple(tuple(words if words[2] else words[:2]) for words in args.dataset),
        classes=args.classes,
        resume=args.resume,
        eval_only=args.eval_only,
        deterministic=args.deterministic,
        quiet=args.quiet,
        overwrite=args.overwrite,
        data=args.data,
        val=args.val,
        images=args.images,
    )


if __name__ == "__main__":
    command()
