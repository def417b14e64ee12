"""Convert a weight file of any supported family to the format of this or another project."""

import argparse
import logging

from senet_transfer.cli.arguments import WEIGHT_FAMILIES, WEIGHT_TARGETS, run_command

_EPILOG = """
Examples:

    senet convert SE-ResNet-50.caffemodel se_resnet50.safetensors --check
    senet convert cadene/se_resnet50 se_resnet50.pth
    senet convert torchvision/resnet50 R-50.pkl
    senet convert classifier.pth seresnet50.pth --to timm
    senet convert moco.pth.tar resnet50.pth --prefix encoder_q. --head ignore
"""


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "input",
        metavar="IN",
        help="a weight file, the name of published weights, or hf-hub:OWNER/NAME",
    )
    parser.add_argument(
        "output",
        metavar="OUT",
        help="the file to write: .pth, .safetensors, or .pkl for Detectron2",
    )
    parser.add_argument(
        "--to",
        choices=WEIGHT_TARGETS,
        help="format of OUT; default: detectron2 for .pkl, otherwise senet_transfer",
    )
    parser.add_argument(
        "--family",
        choices=WEIGHT_FAMILIES,
        help="weight family of IN, if its tensor names match several families",
    )
    parser.add_argument(
        "--prefix", help="prefix of the network's tensor names, if IN contains several networks"
    )
    parser.add_argument(
        "--ema",
        choices=("auto", "true", "false"),
        default="auto",
        help="whether to use the averaged (EMA) weights in IN; auto: follow the convention of "
        "the project that wrote IN (default: auto)",
    )
    parser.add_argument(
        "--head",
        choices=("strict", "ignore"),
        default="strict",
        help="strict: reject a file with unused tensors; ignore: leave out the classifier or "
        "projection head of IN (default: strict)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="check that the networks in both files give the same outputs",
    )
    parser.add_argument(
        "--backbone", action="store_true", help="leave out the classifier or the detector's heads"
    )
    parser.add_argument("--force", action="store_true", help="overwrite OUT if it exists")
    parser.add_argument("--quiet", action="store_true", help="print only warnings")
    return parser


def main(args: argparse.Namespace) -> None:
    """Convert the file and print a summary."""
    from detectron2.utils.logger import setup_logger

    from senet_transfer.export.conversion import convert_file
    from senet_transfer.utils.progress import no_bars

    setup_logger(name="senet_transfer").setLevel(logging.WARNING if args.quiet else logging.INFO)
    options = {"to": args.to, "family": args.family, "force": args.force, "check": args.check}
    options["backbone_only"] = args.backbone
    ema = {"auto": None, "true": True, "false": False}[args.ema]
    with no_bars(args.quiet):
        comparison = convert_file(
            args.input, args.output, **options, prefix=args.prefix, ema=ema, head=args.head
        )
    if comparison:
        print(f"Checked: {comparison}")


def command(words: list[str] | None = None) -> None:
    """Parse the arguments and run the command."""
    run_command(main, parser().parse_args(words))
