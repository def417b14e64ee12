"""``senet-train``: trains or evaluates a model from a config."""

from senet_transfer.cli.arguments import argument_parser


def command() -> None:
    """Runs as the command line says."""
    args = argument_parser().parse_args()
    # Only now, so that --help and mistakes in the arguments don't wait for all that training needs.
    from senet_transfer.engine.launch import run
    from senet_transfer.engine.train import main

    run(main, args)


if __name__ == "__main__":
    command()
