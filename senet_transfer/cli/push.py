"""Upload a model to the Hugging Face Hub, with its config, class names and a model card.

    senet push output owner/name --license cc-by-4.0 --data "my photos"
    senet push output/model_final.pth owner/name --private
    senet push output owner/name --folder repository

Any option for weights accepts the uploaded model as hf-hub:owner/name. The token is that of
`hf auth login`, or the variable HF_TOKEN.
"""

import argparse

from senet_transfer.cli.arguments import run_command


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        help="the output folder of a run (its best model, otherwise its final model), or a "
        "checkpoint",
    )
    add("repository", metavar="OWNER/NAME", help="the repository, which is created if needed")
    add("--config-file", default="", help="default: the config.yaml next to the checkpoint")
    add("--private", action="store_true", help="make a new repository private")
    add("--license", default="", help="licence of the weights for the model card")
    add(
        "--data",
        action="append",
        default=[],
        metavar="NAME",
        help="training data for the model card; can be repeated",
    )
    add("--folder", default="", help="write the files to this folder, and upload nothing")
    return parser


def main(args: argparse.Namespace) -> None:
    """Upload the model, or write the files of the repository to a folder."""
    from senet_transfer.engine.publish.push import push, write_repository

    options = {"config_file": args.config_file, "licence": args.license, "data": args.data}
    if args.folder:
        write_repository(args.model, args.folder, args.repository, **options)
        print(f"Wrote the files of {args.repository} to {args.folder}; nothing was uploaded.")
        return
    address = push(args.model, args.repository, private=args.private, **options)
    print(f"Uploaded to {address}. Load it with hf-hub:{args.repository}.")


def command(words: list[str] | None = None) -> None:
    """Parse the arguments and run the command."""
    run_command(main, parser().parse_args(words))
