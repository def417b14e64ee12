"""Training, evaluation, prediction, export and analysis of SE networks.

senet train --config-file faster_rcnn_se_r50 --num-gpus 8
senet predict --weights output/model_final.pth --input photos --output predictions
senet COMMAND --help
"""

import argparse
import importlib
import sys

from senet_transfer import __version__
from senet_transfer.cli.arguments import described

# Maps each command to its module in senet_transfer.cli and its description.
COMMANDS = {
    "train": ("train", "train or evaluate a detector or classifier from a config"),
    "eval": ("evaluate", "evaluate classifiers or detectors, or ensembles of them"),
    "predict": ("predict", "run object detection or classification on images"),
    "export": ("export", "export a model to ONNX, torch.export or TorchScript"),
    "features": ("little_data.features", "write the features of a backbone for labelled images"),
    "probe": ("little_data.probe", "evaluate a backbone with a linear probe and k-NN"),
    "convert": ("convert", "convert weight files between formats"),
    "push": ("push", "upload a model to the Hugging Face Hub"),
    "report": ("analysis.report", "create an HTML report on training runs"),
    "data": ("data", "prepare, check or show a dataset"),
    "complexity": ("analysis.complexity", "count parameters and multiply-accumulates"),
    "gates": ("analysis.gates", "analyse the gates of an SE network"),
    "sweep": ("analysis.sweep", "train a model with several seeds or folds"),
    "ablation": ("analysis.ablation", "train the SE variants of the paper's ablations"),
    "env": ("environment", "print versions and hardware, for a bug report"),
    "completion": ("completion", "print a shell completion script"),
}


def parser() -> argparse.ArgumentParser:
    """Return the argument parser; each command has a separate parser for its arguments."""
    listed = described({name: text for name, (_, text) in COMMANDS.items()})
    parser = argparse.ArgumentParser(
        prog="senet",
        description=__doc__,
        epilog=f"commands:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument(
        "command", metavar="COMMAND", choices=COMMANDS, help="one of the commands below"
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments for the command")
    return parser


def command() -> None:
    """Parse the arguments and run the command."""
    args = parser().parse_args()
    name, _ = COMMANDS[args.command]
    # Usage texts and the record of a run show the command as it was typed.
    sys.argv = [f"senet {args.command}", *args.arguments]
    importlib.import_module(f"senet_transfer.cli.{name}").command(args.arguments)


if __name__ == "__main__":
    command()
