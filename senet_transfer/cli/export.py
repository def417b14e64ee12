"""Write a model for production, batch norms folded, and compare it with the eager one.

    python tools/export.py --weights output/model_best.pth --output se_resnet50.onnx
    python tools/export.py --weights output/model_best.pth --backbone --output features.pt2
    python tools/export.py --weights output/model_final.pth --image photo.jpg --output detector.ts

A classifier, or the backbone of a classifier or detector, becomes ONNX (.onnx), a program of
torch.export (.pt2) or TorchScript (.ts), by the suffix of the output; a detector TorchScript.
tools/classify_onnx.py runs a classifier without torch.
"""

import argparse
from pathlib import Path

from senet_transfer.cli.arguments import Parser, run_command


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--weights", default="", help="a checkpoint or a weight file; without it, random weights")
    add("--model", default="", help="a name of senet_transfer.list_models()")
    add("--config-file", default="", help="default: the config.yaml next to the weights")
    add("--output", required=True, help="the file to write: .onnx, .pt2 or .ts")
    add("--backbone", "--trunk", action="store_true", help="only the backbone's feature maps")
    add("--size", type=int, nargs="+", help="pixels: a side, or height and width; default: 224")
    add("--image", default="", help="an image to trace a detector with")
    add("--quiet", action="store_true", help="no progress bar")
    add("opts", nargs=argparse.REMAINDER, help="config options: KEY VALUE ...")
    return parser


def main(args: argparse.Namespace) -> None:
    """Export, and print what was compared and written."""
    from senet_transfer.engine.model_from import find_model
    from senet_transfer.export.write import export_model, format_of
    from senet_transfer.utils.progress import no_bars

    format_of(args.output)  # An invalid name is an error before the weights are read.
    with no_bars(args.quiet):
        found = find_model(args.model, args.config_file, args.weights, options=args.opts)
        loaded = found.build("cpu")
        compared = export_model(
            loaded.model,
            loaded.cfg,
            args.output,
            backbone_only=args.backbone,
            size=args.size,
            image=args.image,
        )
    print(compared)
    print(f"{args.output}: {Path(args.output).stat().st_size / 1e6:.1f} MB")


def command(words: list[str] | None = None) -> None:
    """Run as the command line says."""
    run_command(main, parser().parse_args(words))
