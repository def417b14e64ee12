#!/usr/bin/env python
"""Writes a model for production, batch norms folded, and compares it with the eager one.

    python tools/export.py --weights output/model_best.pth --output se_resnet50.onnx
    python tools/export.py --weights output/model_best.pth --trunk --size 512 --output trunk.pt2
    python tools/export.py --weights output/model_final.pth --image photo.jpg --output detector.ts

A classifier, or the trunk of a classifier or detector, becomes ONNX (.onnx), a program of
torch.export (.pt2) or TorchScript (.ts), as the name of the output says; a detector TorchScript.
tools/classify_onnx.py runs a classifier without torch.
"""

import argparse
from pathlib import Path

from senet_transfer.cli.arguments import Parser
from senet_transfer.cli.export import export_model
from senet_transfer.engine.launch import run_single
from senet_transfer.utils.progress import no_bars


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--weights", default="", help="a checkpoint or a weight file; without it, random weights")
    add("--model", default="", help="a name of senet_transfer.list_models()")
    add("--config-file", default="", help="default: the config.yaml beside the weights")
    add("--output", required=True, help="the file to write: .onnx, .pt2 or .ts")
    add("--trunk", action="store_true", help="the feature maps alone")
    add("--size", type=int, nargs="+", help="pixels: a side, or height and width; default: 224")
    add("--image", help="to trace a detector with")
    add("--quiet", action="store_true", help="no progress bar")
    add("opts", nargs=argparse.REMAINDER, help="config options: KEY VALUE ...")
    return parser


def main(args: argparse.Namespace) -> None:
    """Writes and says what was compared."""
    with no_bars(args.quiet):
        compared = export_model(args)
    print(compared)
    print(f"{args.output}: {Path(args.output).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_single(main, parser().parse_args())
