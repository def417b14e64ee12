"""Evaluate a pretrained backbone on new classes with a linear probe and k-nearest neighbours.

    senet probe --model se_resnet50 --weights se_resnet50.pth --train flowers/train \\
        --data flowers/val --output output/probe

The backbone is not trained. Its features are computed once, and a linear classifier is fitted to
them, which takes minutes on a CPU. The output folder contains the errors in percent (probe.json)
and the classifier as a checkpoint (model_final.pth with config.yaml), which can be evaluated,
exported and used for inference.
"""

import argparse

from senet_transfer.cli.arguments import Parser, add_running_arguments, run_command
from senet_transfer.cli.little_data.features import add_backbone_arguments


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--train", required=True, help="labelled images for fitting the classifier")
    add("--data", required=True, help="labelled images for evaluating the classifier")
    add("--output", required=True, help="output folder for the classifier and the results")
    add(
        "--neighbours",
        type=int,
        default=20,
        metavar="K",
        help="number of nearest neighbours per image (default: 20)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="seed for selecting the images of --train that are held out to choose the L2 "
        "regularisation (default: 0)",
    )
    add(
        "--record",
        default="",
        metavar="FILE",
        help="also write the results to this JSON file, in the format of senet sweep --results",
    )
    add_backbone_arguments(parser)
    add_running_arguments(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Fit and evaluate the probe, and print the results."""
    from senet_transfer.engine.little_data.probe import run_probe
    from senet_transfer.engine.model_from import find_model

    results = run_probe(
        find_model(
            args.model, args.config_file, args.weights, family=args.family, options=args.opts
        ),
        train=args.train,
        data=args.data,
        output=args.output,
        device=args.device,
        classes=args.classes,
        neighbours=args.neighbours,
        seed=args.seed,
        batch_size=args.batch_size,
        workers=args.workers,
        quiet=args.quiet,
    )
    if args.record:
        from senet_transfer.analysis.results.records import write_probe_record

        write_probe_record(results, args.record, words=args.words, data=args.data, seed=args.seed)
    nearest = results["neighbours"]
    print(f"{results['train_images']} training images, {results['images']} evaluation images")
    print(f"{'':24}  top-1 error  top-5 error")
    for name, row in (
        (f"linear probe, L2 {results['weight_decay']:g}", results),
        (f"{nearest['k']} nearest neighbours", nearest),
    ):
        print(f"{name:24}  {row['top1_error']:11.2f}  {row['top5_error']:11.2f}")
    print(f"classifier: {results['checkpoint']}")


def command(words: list[str] | None = None) -> None:
    """Parse the arguments and run the command."""
    run_command(main, parser().parse_args(words))
