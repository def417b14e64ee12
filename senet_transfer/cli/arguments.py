"""The command line of training: Detectron2's arguments, and own data sets."""

import argparse
import sys
from collections.abc import Sequence

from detectron2.engine import default_argument_parser

_EPILOG = """
Examples:

Train the paper's detector on COCO with 8 GPUs:
    python tools/train_net.py --config-file configs/faster_rcnn_se_r50.yaml --num-gpus 8

The same under torchrun, which sets rank and world size:
    torchrun --nproc-per-node 8 tools/train_net.py --config-file configs/faster_rcnn_se_r50.yaml

Go on after an interruption; evaluate:
    python tools/train_net.py --config-file output/config.yaml --resume
    python tools/train_net.py --config-file output/config.yaml --eval-only \\
        MODEL.WEIGHTS output/model_final.pth

Own data in COCO's format (classes and their number come from the JSON):
    python tools/train_net.py --config-file configs/finetune_detector.yaml \\
        --dataset my_train train.json images/ --dataset my_val val.json images/

Exit status: 0 done, 1 a fault, 2 a mistake in what was asked for, 75 told to stop by SIGTERM or
Ctrl-C, and saved (a second one ends at once, with 128 and its number).
"""


class Parser(argparse.ArgumentParser):
    """A command line that ends in the config's options (``opts``), KEY VALUE pairs.

    argparse would take a flag after them for one of them, and ``--resume`` is what one adds to the
    end of the command before.
    """

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """As argparse does, with flags before, after and between the config's options."""
        words = list(sys.argv[1:] if args is None else args)
        found = super().parse_args(words, namespace)
        flag = next((at for at, word in enumerate(found.opts) if word[:2] == "--" != word), None)
        if flag is None:
            return found
        pairs, rest = found.opts[:flag], found.opts[flag:]
        found = self.parse_args([*words[: len(words) - len(found.opts)], *rest], namespace)
        found.opts = pairs + found.opts
        return found


def argument_parser() -> argparse.ArgumentParser:
    """Detectron2's arguments, ``--dataset`` and ``--quiet``."""
    parser = Parser(epilog=_EPILOG, parents=[default_argument_parser()], add_help=False)
    add_dataset_argument(parser)
    parser.add_argument(
        "--quiet", action="store_true", help="leave the log to log.txt, but for warnings"
    )
    return parser


def add_dataset_argument(parser: argparse.ArgumentParser) -> None:
    """Adds ``--dataset NAME JSON FOLDER``, which may be repeated."""
    parser.add_argument(
        "--dataset",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "JSON", "FOLDER"),
        help="makes a data set in COCO's format known by name, for DATASETS.TRAIN and "
        "DATASETS.TEST; may be repeated",
    )


def add_running_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds how a command goes over images with a model, and the config's options."""
    add = parser.add_argument
    add("--batch-size", type=int, default=32, help="images a batch (32)")
    add("--workers", type=int, default=2, help="processes that read and decode (2)")
    add("--device", default="", help="such as cpu or cuda:1; default: a GPU where there is one")
    add("--quiet", action="store_true", help="no progress bar")
    add("opts", nargs=argparse.REMAINDER, help="config options: KEY VALUE ...")
