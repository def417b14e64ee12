"""``senet-train``: trains or evaluates a model from a config."""

from senet_transfer.engine.arguments import argument_parser
from senet_transfer.engine.launch import run
from senet_transfer.engine.train import main


def command() -> None:
    """Runs as the command line says."""
    run(main, argument_parser().parse_args())
