"""``senet``: one program for all commands.

senet train --config-file faster_rcnn_se_r50 --num-gpus 8
senet predict --weights output/model_final.pth --input photos --output predictions
senet COMMAND --help
"""

import argparse
import importlib
import sys

from senet_transfer import __version__

# Name of the command -> module of senet_transfer.cli, and what it does.
COMMANDS = {
    "train": ("train", "train or evaluate a detector or classifier from a config"),
    "eval": ("evaluate", "evaluate a classifier: errors, worst and most confused classes"),
    "predict": ("predict", "detect objects in images, or classify them"),
    "export": ("export", "write a model for production: ONNX, torch.export, TorchScript"),
    "convert": ("convert", "convert a weight file between projects"),
    "report": ("report", "make an HTML page of runs"),
    "data": ("data", "prepare a data set"),
    "complexity": ("complexity", "count parameters and multiply-accumulates"),
    "gates": ("gates", "draw what the gates of an SE network do"),
    "sweep": ("sweep", "train a config with several seeds"),
    "ablation": ("ablation", "train the paper's variants of SE"),
}


def parser() -> argparse.ArgumentParser:
    """Return the command line, of which each command has a further one."""
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"    {name:{width}}  {text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="senet",
        description=__doc__,
        epilog=f"commands:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    return parser


def command() -> None:
    """Run as the command line says."""
    args = parser().parse_args()
    name, _ = COMMANDS[args.command]
    sys.argv[0] = f"senet {args.command}"
    importlib.import_module(f"senet_transfer.cli.{name}").command(args.arguments)


if __name__ == "__main__":
    command()
