"""Upload a model to the Hugging Face Hub, with its config, class names and a model card.

    senet push output owner/name --license cc-by-4.0 --data "my photos"
    senet push output/model_final.pth owner/name --private
    senet push output owner/name --folder repository

All options that take weights accept the uploaded model as hf-hub:owner/name. To upload, log
in with `hf auth login`, or set the environment variable HF_TOKEN to an access token.

In a clone of this project, --bundle adds a small model to the package instead:

    senet push output/model_final.pth senet_transfer/my_network --bundle --half --evaluate

Write only the model card, for a model whose weights are not published:

    senet push output/model_final.pth my_network --card my_network.md
"""

import argparse
from pathlib import Path

from senet_transfer.cli.arguments import run_command
from senet_transfer.errors import UserError


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        help="a checkpoint, or the output folder of a run, from which model_best.pth or, if that "
        "file does not exist, model_final.pth is uploaded",
    )
    add(
        "repository",
        metavar="OWNER/NAME",
        help="the repository, which is created if it does not exist; with --card, the title of the "
        "model card",
    )
    add(
        "--config-file",
        default="",
        help="config file; default: the config.yaml next to the checkpoint",
    )
    add("--private", action="store_true", help="make a new repository private")
    add("--license", default="", help="licence of the weights, to be stated in the model card")
    add(
        "--data",
        action="append",
        default=[],
        metavar="NAME",
        help="name of the training data, for the model card; can be repeated",
    )
    add(
        "--runs",
        default="",
        metavar="FOLDER",
        help="folder with the results (seed<N>.json) of all runs with the same config, to be "
        "summarised in the model card",
    )
    add(
        "--half",
        action="store_true",
        help="store weights in float16, except biases and parameters of norms",
    )
    add(
        "--evaluate",
        action="store_true",
        help="evaluate the written weight file, and add the metrics to the model card",
    )
    add("--folder", default="", help="write the files to this folder instead of uploading them")
    add(
        "--card",
        default="",
        metavar="FILE",
        help="write only the model card to FILE, without uploading anything",
    )
    add(
        "--bundle",
        action="store_true",
        help="write the files to the weight folder of this package (or to --folder) instead of "
        "uploading them; OWNER must be senet_transfer. Models in the weight folder of this package "
        "can be loaded by their names",
    )
    add(
        "--opts",
        nargs="+",
        default=[],
        metavar="KEY VALUE",
        help="config options for --evaluate, for example to specify datasets",
    )
    return parser


def main(args: argparse.Namespace) -> None:
    """Upload the model, or write its files to a folder."""
    from senet_transfer.engine.publish.bundle import bundle
    from senet_transfer.engine.publish.model_card import read_runs
    from senet_transfer.engine.publish.push import push, write_card, write_repository
    from senet_transfer.weights.hub.bundled import FOLDER

    if args.opts and not args.evaluate:
        raise UserError("--opts has an effect only with --evaluate. Add --evaluate.")
    if args.private and (args.bundle or args.folder or args.card):
        raise UserError(
            "--private has no effect with --bundle, --card or --folder, which upload nothing. "
            "Remove it."
        )
    if args.card and (args.bundle or args.folder or args.half):
        raise UserError(
            "--card writes no weights, so it can't be combined with --bundle, --folder "
            "or --half. Remove --card or these options."
        )
    options = {
        "config_file": args.config_file,
        "licence": args.license,
        "data": args.data,
        "runs": read_runs(args.runs) if args.runs else (),
        "evaluate": args.evaluate,
        "opts": args.opts,
    }
    if args.card:
        write_card(args.model, args.card, args.repository, **options)
        print(f"Wrote {args.card}")
        return
    options["half"] = args.half
    if args.bundle:
        folder = Path(args.folder or FOLDER)
        print(f"Wrote {bundle(args.model, args.repository, folder, **options)}")
        if folder.resolve() == FOLDER.resolve():
            print(f"To use the model, pass --weights {args.repository}, such as to senet predict.")
    elif args.folder:
        write_repository(args.model, args.folder, args.repository, **options)
        print(f"Wrote the files of {args.repository} to {args.folder}; nothing was uploaded.")
    else:
        address = push(args.model, args.repository, private=args.private, **options)
        weights = f"hf-hub:{args.repository}"
        print(
            f"Uploaded to {address}. To use the model, pass --weights {weights}, for example to "
            "senet predict."
        )


def command(words: list[str] | None = None) -> None:
    """Parse the arguments and run the command."""
    run_command(main, parser().parse_args(words))
