"""Export a model, and compare the outputs of the exported and the original model.

    senet export --weights output/model_best.pth --output se_resnet50.onnx
    senet export --weights output/model_best.pth --backbone --output features.pt2
    senet export --weights output/model_final.pth --image photo.jpg --output detector.onnx

Batch norms are folded into the preceding convolutions where possible.
The suffix of --output selects the format: ONNX (.onnx), torch.export (.pt2) or TorchScript (.ts).
With --compile, AOTInductor compiles the .pt2 file for this machine's processor.
Classifiers and backbones can be exported to all formats, but detectors only to ONNX and
TorchScript. classify_onnx.py and detect_onnx.py run ONNX files without torch.
"""

import argparse
from pathlib import Path

from senet_transfer.cli.arguments import Parser, run_command


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = Parser(description=__doc__)
    parser.lists = ("--size",)
    add = parser.add_argument
    add("--weights", default="", help="a checkpoint or weight file; default: random weights")
    add("--model", default="", help="model name, as listed by senet_transfer.list_models()")
    add(
        "--config-file",
        default="",
        help="config file; default: the config.yaml next to the weights",
    )
    add("--output", required=True, help="the file to write: .onnx, .pt2 or .ts")
    add("--backbone", action="store_true", help="export only the backbone")
    # The old name of --backbone.
    add("--trunk", dest="backbone", action="store_true", help=argparse.SUPPRESS)
    add(
        "--size",
        type=int,
        action="append",
        help="image size in pixels: one side length, or height and width; default: the test crop",
    )
    add(
        "--image",
        default="",
        help="image with objects, for tracing a detector and checking the exported file; required "
        "to export a detector to TorchScript (.ts)",
    )
    add(
        "--precision",
        choices=["float32", "float16", "int8"],
        default="float32",
        help="precision of a classifier or backbone in an ONNX file; float16 and int8 require "
        "--calibration",
    )
    add(
        "--calibration",
        default="",
        help="folder of calibration images for --precision, preferably with a subfolder per class",
    )
    add(
        "--compile",
        action="store_true",
        help="compile the .pt2 file of a classifier or backbone with AOTInductor for this "
        "machine's CPU",
    )
    add("--quiet", action="store_true", help="hide the progress bar")
    add("opts", nargs=argparse.REMAINDER, help="config options: KEY VALUE ...")
    return parser


def main(args: argparse.Namespace) -> None:
    """Export a model, and print its differences from the original model and the file size."""
    from senet_transfer.engine.model_from import find_model
    from senet_transfer.engine.predictor.load import take_classes
    from senet_transfer.export.write import export_model, format_of
    from senet_transfer.utils.progress import no_bars

    format_of(
        args.output, compiled=args.compile
    )  # Reject an invalid name before reading the weights.
    with no_bars(args.quiet):
        found = find_model(args.model, args.config_file, args.weights, options=args.opts)
        if not found.cfg.DATASETS.CLASSES:
            take_classes(found.cfg)
        loaded = found.build("cpu")
        compared = export_model(
            loaded.model,
            loaded.cfg,
            args.output,
            backbone_only=args.backbone,
            size=args.size,
            image=args.image,
            precision=args.precision,
            calibration=args.calibration,
            compiled=args.compile,
        )
    print(compared)
    print(f"{args.output}: {Path(args.output).stat().st_size / 1e6:.1f} MB")


def command(words: list[str] | None = None) -> None:
    """Parse the arguments and run the command."""
    run_command(main, parser().parse_args(words))
