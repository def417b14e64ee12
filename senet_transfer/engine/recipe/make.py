"""Recipes for a user's data: choosing the settings, and writing them to a config file."""

import contextlib
import json
import logging
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detectron2.utils import comm

from senet_transfer.config import config_value
from senet_transfer.config.load import find_config, load_config
from senet_transfer.data.own_data import DataPart, divide, find_parts
from senet_transfer.data.reading import reading_of
from senet_transfer.engine.checkpoints.output_folder import check_unused
from senet_transfer.engine.recipe.facts import describe_data, describe_machine
from senet_transfer.engine.recipe.rules import Choice, backbone, choose
from senet_transfer.errors import UserError
from senet_transfer.models.registry import list_models
from senet_transfer.utils.atomic_io import atomic_file
from senet_transfer.utils.text import check_utf8
from senet_transfer.weights.file_geometry import examine_config_weights
from senet_transfer.weights.hub.catalogue import resolve

if TYPE_CHECKING:
    from senet_transfer.engine.setup import RunOptions

# Name of the recipe's config file in OUTPUT_DIR.
RECIPE = "recipe.yaml"

_HEADER = """\
# Recipe made from data. To train with it again, or with changes:
#     senet train --config-file {path} OUTPUT_DIR output/again
"""

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def use_recipe(options: "RunOptions", *, resume: bool) -> Iterator["RunOptions"]:
    """Context manager that yields options with a config file chosen for ``options.data``.

    The config file is saved to the output folder on exit. All processes of a job must use this
    context manager together. The main process chooses the settings.

    Args:
        options: The run's options. If ``options.data`` is empty, they are yielded unchanged.
        resume: If True, the config file that the original run saved is used, if it exists.

    Raises:
        UserError: If the data can't be used, or if the options contradict each other.
    """
    if not options.data:
        yield options
        return
    choices: list[Choice] = []
    problem: Exception | None = None
    saved = Path(load_config("", options.options).OUTPUT_DIR, RECIPE)
    if comm.is_main_process():
        try:
            _check(options)
            # The recipe is a text file that contains these paths.
            for path in (options.data, options.val, options.images, str(saved.parent)):
                check_utf8(path, "--data, --val, --images and OUTPUT_DIR")
            if not (resume and saved.is_file()):
                if not options.overwrite:
                    check_unused(saved.parent)
                choices = _make(options)
        except Exception as error:  # Otherwise, the other processes would wait for this one.
            problem = error
    choices, problem = comm.all_gather((choices, problem))[0]
    if problem:
        raise problem
    if not choices:
        yield replace(options, config_file=str(saved))
        return
    with _config_file(choices) as path:
        yield replace(options, config_file=path, options=())
    if comm.is_main_process():
        with atomic_file(saved) as file:
            file.write((_HEADER.format(path=saved) + _text(choices)).encode())
        lines = [f"{key} {json.dumps(value)}: {reason}" for key, value, reason in choices]
        logger.info("Settings for %s, saved to %s:\n%s", options.data, saved, "\n".join(lines))


def _check(options: "RunOptions") -> None:
    for flag, given in (
        ("--config-file", options.config_file),
        ("--dataset", options.datasets),
        ("--eval-only", options.eval_only),
    ):
        if given:
            raise UserError(
                f"--data creates a training config, so it can't be combined with {flag}. Remove "
                "one of the two. To evaluate a trained model or train it differently, use its "
                "config: --config-file OUTPUT_DIR/config.yaml."
            )


def _make(options: "RunOptions") -> list[Choice]:
    """Choose the config values for training on a user's dataset.

    Values that are set on the command line take precedence.
    """
    stated = load_config("", options.options)
    train, val = find_parts(options.data, options.val, options.images)
    upright = reading_of(stated).upright
    if val is None:
        try:
            train, val, table = divide(train, Path(stated.OUTPUT_DIR, "data"), upright=upright)
        except UserError as error:
            raise UserError(
                f"There is no validation data in {options.data}, and the data can't be split: "
                f"{error} Pass the path of the validation data with --val PATH."
            ) from error
        if not options.quiet:
            print(table)
    weights, arch = None, ""
    if "MODEL.WEIGHTS" in options.options[::2]:
        source = examine_config_weights(stated)
        weights = stated.MODEL.WEIGHTS
        # A network that is not in the list of models has a description instead of a name.
        arch = source.model_name if source and source.model_name in list_models() else ""
    choices = choose_settings(
        train, val, upright=upright, weights=weights, arch=arch, device=stated.MODEL.DEVICE
    )
    with _config_file(choices) as path:
        cfg = load_config(path, options.options)
    found = {choice.key: choice for choice in choices}
    rate = round(cfg.SOLVER.REFERENCE_LR_PER_IMAGE * cfg.SOLVER.IMS_PER_BATCH, 8)
    found["SOLVER.BASE_LR"] = Choice("SOLVER.BASE_LR", rate, found["SOLVER.BASE_LR"].reason)
    for key in options.options[::2]:
        found[key] = Choice(key, config_value(cfg, key), "set on the command line")
    if cfg.SOLVER.EPOCHS is None:
        found = {key: choice for key, choice in found.items() if not key.endswith("_EPOCHS")}
        found["SOLVER.EPOCHS"] = Choice("SOLVER.EPOCHS", None, "SOLVER.MAX_ITER is set")
    return list(found.values())


@contextlib.contextmanager
def _config_file(choices: Iterable[Choice]) -> Iterator[str]:
    """Write the settings to a temporary config file, and yield its path."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, RECIPE)
        path.write_text(_text(choices))
        yield str(path)


def choose_settings(
    train: DataPart,
    val: DataPart,
    *,
    upright: bool = True,
    weights: str | None = None,
    arch: str = "",
    device: str = "cuda",
) -> list[Choice]:
    """Choose the settings for training on a dataset on this machine.

    Args:
        train: Training data.
        val: Validation data.
        upright: True if annotations refer to images with the EXIF orientation applied.
        weights: Pretrained weights, or "" to train from scratch. If None, published weights are
            downloaded; if the download fails, the network is trained from scratch.
        arch: Name of the backbone that ``weights`` belong to. If empty, a backbone is chosen.
        device: Device of the run.

    Raises:
        UserError: If the data is invalid.
    """
    data = describe_data(train, val, upright=upright)
    machine = describe_machine(device)
    reason = ""
    if weights is None:
        weights, reason = _published_weights(backbone(machine)[1])
    choices = choose(data, machine, weights, arch)
    if reason:
        key = "MODEL.WEIGHTS"
        choices = [Choice(key, weights, reason) if c.key == key else c for c in choices]
    return [*choices, *_datasets(train, val)]


def _published_weights(name: str) -> tuple[str, str]:
    """Download published weights; return ``(name, "")`` or, if this fails, ``("", reason)``."""
    try:
        resolve(name)
    except UserError as error:
        logger.warning("The network is trained from scratch: %s", error)
        return "", f"random weights, because {name} can't be downloaded"
    return name, ""


def _datasets(train: DataPart, val: DataPart) -> list[Choice]:
    if train.image_dir:
        entries = [["my_train", *train], ["my_val", *val]]
        return [
            Choice("DATASETS.REGISTER", entries, "name, annotations and images"),
            Choice("DATASETS.TRAIN", ["my_train"], "the training data"),
            Choice("DATASETS.TEST", ["my_val"], "the validation data"),
        ]
    return [
        Choice("DATASETS.TRAIN", [train.path], "the training data"),
        Choice("DATASETS.TEST", [val.path], "the validation data"),
    ]


def _text(choices: Iterable[Choice]) -> str:
    """Return the settings as YAML. A comment above each setting gives the reason for it."""
    tree: dict[str, Any] = {}
    for choice in choices:
        *path, leaf = choice.key.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = choice
    return "".join(_lines(tree, ""))


def _lines(tree: dict[str, Any], indent: str) -> Iterator[str]:
    for name, found in tree.items():
        if isinstance(found, dict):
            yield f"{indent}{name}:\n"
            yield from _lines(found, f"{indent}  ")
            continue
        value = find_config(found.value) if name == "_BASE_" else found.value
        yield f"{indent}# {found.reason}\n"
        # JSON is valid YAML, except for the escapes of characters beyond 16 bits.
        text = json.dumps(value, ensure_ascii=False)
        text = re.sub(r"[^ -~]", lambda match: f"\\U{ord(match[0]):08x}", text)
        yield f"{indent}{name}: {text}\n"
