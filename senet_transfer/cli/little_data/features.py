"""Write the pooled features of a backbone for all images of a classification dataset.

    senet features --model se_resnet50 --weights se_resnet50.pth --data flowers/train \\
        --output train.npz

The file contains the features (one row per image), the labels, the image paths and the class names.
Features are the input of the classifier's linear layer: the last feature map, averaged over all
spatial positions. The data can have any format that training supports.
"""

import argparse

from senet_transfer.cli.arguments import (
    Parser,
    add_model_arguments,
    add_running_arguments,
    run_command,
)
from senet_transfer.utils.text import counted


def add_backbone_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that specify a backbone and the order of the classes."""
    add_model_arguments(parser)
    add = parser.add_argument
    add(
        "--classes",
        default="",
        metavar="numeric|FILE",
        help="order of the classes: numeric (class folders sorted as numbers) or a file "
        "with one class name per line; default: the order in the data",
    )


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = Parser(description=__doc__)
    parser.add_argument("--data", required=True, help="labelled images: a folder or shards")
    parser.add_argument("--output", required=True, help=".npz or .safetensors file to write")
    add_backbone_arguments(parser)
    add_running_arguments(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Compute the features, write them to a file, and print a summary."""
    from senet_transfer.engine.little_data import features
    from senet_transfer.engine.model_from import find_model

    features.check_features_file(args.output)
    found = find_model(
        args.model, args.config_file, args.weights, family=args.family, options=args.opts
    )
    (dataset,) = features.open_labelled(found.cfg, test=args.data, classes=args.classes)
    computed = features.extract_features(
        features.load_backbone(found, args.device),
        dataset,
        batch_size=args.batch_size,
        workers=args.workers,
        quiet=args.quiet,
    )
    computed.write(args.output)
    images, width = computed.features.shape
    classes = counted(len(computed.classes), "class", "classes")
    print(f"{counted(images, 'image')} of {classes}, {width} features per image: {args.output}")


def command(words: list[str] | None = None) -> None:
    """Parse the arguments and run the command."""
    run_command(main, parser().parse_args(words))
