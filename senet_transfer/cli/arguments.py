"""Argument parsers shared by several commands, including the parser for training."""

import argparse
import io
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence

from senet_transfer.utils.import_hook import (
    hide_library_warnings,
    require_detectron2,
    without_script_warnings,
)

# Copies of constants in the package, because importing them would take seconds. A test compares
# them with the originals.
ABLATION_AXES = ("ratio", "squeeze", "excitation", "stages", "placement", "bias")
CIFAR_DOWNLOADS = ("cifar10", "cifar100")
CONFIG_KEYS = (
    "CUDNN_BENCHMARK",
    "DATALOADER",
    "DATASETS",
    "DETERMINISTIC",
    "GLOBAL",
    "INPUT",
    "MODEL",
    "OUTPUT_DIR",
    "SEED",
    "SOLVER",
    "TEST",
    "TRACKING",
    "VERSION",
    "VIS_PERIOD",
)
DETECTION_FORMATS = ("voc", "yolo", "labelme", "cvat", "labelstudio", "via")
CROPS = (1, 10)
EVAL_MODES = ("short_side", "squash", "ten_crop")
IMAGENET_SPLITS = ("val", "train")
PLACES365_SIZES = ("256", "large")
PLACES365_SPLITS = ("val", "train_standard", "train_challenge")
WEIGHT_FAMILIES = (
    "senet_transfer",
    "caffe",
    "places365_caffe",
    "cadene",
    "timm_legacy",
    "places365",
    "torchvision_v1",
    "torchvision_v2",
    "timm",
    "moskomule",
    "mmpretrain",
    "detectron1",
    "detectron2",
    "detectron2_torchvision",
)
WEIGHT_TARGETS = (
    "senet_transfer",
    "detectron2",
    "torchvision",
    "timm",
    "timm_legacy",
    "cadene",
    "mmpretrain",
)

_EPILOG = """
Examples:

Train the paper's detector on COCO with 8 GPUs:
    senet train --config-file configs/faster_rcnn_se_r50.yaml --num-gpus 8

The same in a clone with torchrun, which sets the rank and world size:
    torchrun --nproc-per-node 8 tools/train_net.py --config-file configs/faster_rcnn_se_r50.yaml

Resume after an interruption, or evaluate:
    senet train --config-file output/config.yaml --resume
    senet train --config-file output/config.yaml --eval-only \\
        MODEL.WEIGHTS output/model_final.pth

Train a detector or classifier on your own data with a generated config:
    senet train --data voc OUTPUT_DIR output/mine

Train on your own data in COCO format (the classes are read from the JSON files):
    senet train --config-file configs/finetune_detector.yaml \\
        --dataset my_train train.json images/ --dataset my_val val.json images/

Exit status: 0 for success; 1 for an error; 2 for invalid arguments, config or files; 75 if SIGTERM
or Ctrl-C stopped the run after it saved a checkpoint. A second signal stops the run immediately,
with status 128 plus the signal number.
"""


_CONFIG_KEY = re.compile(rf"({'|'.join(CONFIG_KEYS)})(\.[A-Z0-9_]+)*")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Help formatter that shows flags with several values as ``--flag X [X ...]``.

    Flags with a ``metavar`` are shown as in argparse.

    Attributes:
        lists: Flags that take one or more values.
    """

    lists: tuple[str, ...] = ()

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        text = super()._format_args(action, default_metavar)
        several = action.metavar is None and {*action.option_strings} & {*self.lists}
        return f"{text} [{text} ...]" if several else text


class Parser(argparse.ArgumentParser):
    """Argument parser whose last argument (``opts``) contains config options as KEY VALUE pairs.

    Unlike argparse's standard parser, it accepts flags after the config options, because users
    often append ``--resume`` to their previous command. The attribute ``words`` of the parsed
    arguments contains the command line as a list of strings, for the files written by ``--record``.

    Attributes:
        lists: Flags that take one or more values. Their action must be "append", because a flag
            with ``nargs="+"`` would also consume the config options that follow.
    """

    lists: tuple[str, ...] = ()

    def _get_formatter(self) -> _Formatter:
        formatter = _Formatter(self.prog)
        formatter.lists = self.lists
        return formatter

    def parse_args(  # type: ignore[override]  # typeshed has overloads for other namespaces
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse flags before, after and between the config options."""
        given = list(sys.argv[1:] if args is None else args)
        words = _with_repeated_flags(_with_image_folders(given), self.lists)
        pairs: list[str] = []
        while True:
            found = super().parse_args(words, namespace)
            is_flag = [word[:2] == "--" != word for word in found.opts]
            if True not in is_flag:
                found.opts = pairs + found.opts
                found.words = given
                return found
            # Keep the options before the flag, and parse the flag and everything after it again.
            first = is_flag.index(True)
            pairs += found.opts[:first]
            words = [*words[: len(words) - len(found.opts)], *found.opts[first:]]


def described(names: Mapping[str, str]) -> str:
    """Format a dictionary from names to descriptions as a list for a help text."""
    width = max(map(len, names))
    return "\n".join(f"    {name:{width}}  {text}" for name, text in names.items())


def argument_parser() -> argparse.ArgumentParser:
    """Return the argument parser for training, with Detectron2's and this project's arguments."""
    parser = Parser(
        description="Train and evaluate a detector or classifier, or only evaluate it.",
        epilog=_EPILOG,
    )
    _add_detectron2_arguments(parser)
    add_data_arguments(parser)
    add_dataset_argument(parser)
    parser.add_argument(
        "--classes",
        default="",
        metavar="numeric|FILE",
        help="order of a classifier's labels: numeric (class names sorted as numbers) or a file "
        "with one class name per line; default: sorted by name. The classes of a checkpoint take "
        "precedence",
    )
    parser.add_argument(
        "--iou-types",
        metavar="TYPES",
        help="IoU types for a detector's error diagnostics: bbox, segm or bbox,segm "
        "(TEST.DIAGNOSTICS)",
    )
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="on a GPU, use deterministic algorithms where PyTorch provides them (slower)",
    )
    parser.add_argument(
        "--quiet", action="store_true", help="print only warnings; log.txt contains the full log"
    )
    return parser


def _add_detectron2_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --overwrite and the arguments of Detectron2's parser.

    Detectron2's arguments are repeated here because importing Detectron2 is slow.
    """
    add = parser.add_argument
    add("--config-file", default="", metavar="FILE", help="a YAML file, or the name of a config")
    add("--resume", action="store_true", help="continue from the last checkpoint in OUTPUT_DIR")
    add(
        "--overwrite",
        action="store_true",
        help="delete the files of an earlier run in OUTPUT_DIR, and train from scratch",
    )
    add("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS instead of training")
    add(
        "--num-gpus",
        type=int,
        default=1,
        help="number of processes per machine, one per GPU (default: 1)",
    )
    add("--num-machines", type=int, default=1, help="number of machines (default: 1)")
    add("--machine-rank", type=int, default=0, help="index of this machine, starting at 0")
    # As in Detectron2, the port depends on the user id. A process left over from an earlier job of
    # the same user therefore causes the error "address already in use".
    port = 2**15 + 2**14 + hash(os.getuid()) % 2**14
    address = f"tcp://127.0.0.1:{port}"
    add("--dist-url", default=address, help="address of the first machine, tcp://HOST:PORT")
    add("opts", nargs=argparse.REMAINDER, help="config options: KEY VALUE ...")


def start_process() -> None:
    """Exit with status 2 if Detectron2 is missing, and hide warnings that users can't act on."""
    try:
        require_detectron2()
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    hide_library_warnings()


def run_command(main: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
    """Run a command in this process.

    If the command raises a UserError, the error is printed and the exit status is 2.
    """
    start_process()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # File names may contain characters that the terminal can't show.
        sys.stdout.reconfigure(errors="backslashreplace")
    # Imported here because --help and invalid arguments need neither torch nor Detectron2.
    with without_script_warnings():
        from senet_transfer.engine.launch import run_single

    run_single(main, args)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for training on a user's own dataset without a config file."""
    add = parser.add_argument
    add(
        "--data",
        default="",
        metavar="PATH",
        help="train on this data, with a generated config that is saved to "
        "OUTPUT_DIR/recipe.yaml. The data can be labelled images, annotations for detection "
        "(as for --dataset), or a folder that contains train and val data",
    )
    add(
        "--val",
        default="",
        metavar="PATH",
        help="validation data; default: the validation data in --data or, if there is none, a "
        "fifth of the training data",
    )
    add(
        "--images",
        default="",
        metavar="FOLDER",
        help="image folder for the annotations in --data and --val; default: the folder in "
        "which the annotation format usually stores images",
    )


def _with_image_folders(words: list[str]) -> list[str]:
    """Insert an empty string as the image folder where ``--dataset NAME JSON`` has none.

    The argument after ``JSON`` is the image folder unless it is a flag or a config option.
    """
    found = []
    for index, word in enumerate(words):
        found.append(word)
        if words[max(index - 2, 0)] == "--dataset" and index >= 2:
            following = words[index + 1] if index + 1 < len(words) else "--"
            found += [""] if following.startswith("--") or _is_key(following) else []
    return found


def _with_repeated_flags(words: list[str], flags: Sequence[str]) -> list[str]:
    """Repeat flags with several values: ``--scales 1 2`` becomes ``--scales 1 --scales 2``."""
    found: list[str] = []
    flag = ""
    for word in words:
        if word.startswith("-") or _is_key(word):
            # argparse also accepts abbreviated flags.
            is_list = word[2:] and any(name.startswith(word) for name in flags)
            flag = word if is_list else ""
        elif flag and found[-1] != flag:
            found.append(flag)
        found.append(word)
    return found


def _is_key(word: str) -> bool:
    """Return whether a word on the command line is a config key rather than a file."""
    return bool(_CONFIG_KEY.fullmatch(word)) and not os.path.exists(word)


def add_dataset_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument ``--dataset NAME JSON [FOLDER]``, which can be repeated."""
    parser.add_argument(
        "--dataset",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "JSON", "FOLDER"),
        help="register a dataset under a name, for use in DATASETS.TRAIN and DATASETS.TEST; can "
        "be repeated. JSON is an annotation file in COCO format, or a file or folder in Pascal "
        "VOC, YOLO (data.yaml), LabelMe, CVAT, Label Studio or VIA format, followed by the split "
        "if there are several (data.yaml:train). FOLDER contains the images; it may be omitted if "
        "they are where the format usually stores them. If the config names no registered "
        "datasets, the first --dataset is used for training and the second for evaluation",
    )


def add_model_arguments(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """Add the arguments that specify a classifier or backbone.

    If ``several`` is True, ``--weights`` can be repeated.
    """
    add = parser.add_argument
    add("--model", default="", help="model name, as listed by senet_transfer.list_models()")
    add(
        "--weights",
        action="append" if several else "store",
        default=[] if several else "",
        metavar="WEIGHTS",
        help=f"{'one or more weight files' if several else 'a weight file'}; default: the "
        "config's MODEL.WEIGHTS",
    )
    add(
        "--family",
        default="",
        help="weight family, such as timm; required if the tensor names match several families",
    )
    add(
        "--config-file",
        default="",
        help="config file, instead of --model; default: the config.yaml next to the weights",
    )


def add_running_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments and config options shared by all commands that run a model on images."""
    add = parser.add_argument
    add("--batch-size", type=int, default=32, help="number of images per batch (default: 32)")
    add(
        "--workers", type=int, default=2, help="number of processes that decode images (default: 2)"
    )
    add("--device", default="", help="device, such as cpu or cuda:1; default: a GPU if available")
    add("--quiet", action="store_true", help="hide the progress bar")
    add("opts", nargs=argparse.REMAINDER, help="config options: KEY VALUE ...")
