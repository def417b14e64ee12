"""Evaluates a classifier on Places365's validation set, beside the rows of the paper's Table VI.

    %(prog)s --model se_resnet152 --weights FILE --data datasets/places365/val --output results.json

--data takes the shards that datasets/prepare_places365.py makes, the folder with the lists and
val_256 or val_large, such a folder of images itself, or the archive val_256.tar beside the lists.
"""

import argparse

from senet_transfer.cli.evaluate import evaluation_parser, run_evaluation
from senet_transfer.engine.launch import run_single
from senet_transfer.evaluation.paper_results import PLACES365


def _evaluate(args: argparse.Namespace) -> None:
    run_evaluation(args, PLACES365)


def command() -> None:
    """Runs as the command line says."""
    run_single(_evaluate, evaluation_parser(__doc__).parse_args())
