"""Loading of configs from files, built-in config names and command-line options."""

import ast
import contextlib
import difflib
import os
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg
from fvcore.common.config import BASE_KEY

from senet_transfer.config.defaults import (
    ACCEPT_AUTO,
    FILE_KEYS,
    config_items,
    config_value,
    get_senet_config,
    set_config_value,
)
from senet_transfer.config.validation import MOST_CHANNELS, check_elements, check_encoding
from senet_transfer.errors import UserError

# Keys whose values may have several types: an integer or a float (epochs), a string or a list.
_SEVERAL_TYPES = {
    "MODEL.CLASSIFIER.CLASS_WEIGHTS",
    "SOLVER.CHECKPOINT_EPOCHS",
    "SOLVER.EPOCHS",
    "SOLVER.FROZEN_BN_EPOCHS",
    "SOLVER.WARMUP_EPOCHS",
    "TEST.EVAL_EPOCHS",
}


def load_config(config_file: str, options: Sequence[str] = ()) -> CfgNode:
    """Load this project's defaults, merge a config file into them, then apply the options.

    Args:
        config_file: The path of a YAML file, or the name of one of this project's configs. If
            empty, only the defaults are used.
        options: Alternating keys and values, as on the command line.

    Raises:
        UserError: If the file is missing or malformed, if a key is unknown, or if a value has the
            wrong type.
    """
    cfg = get_senet_config()
    if config_file:
        config_file = find_config(config_file)
        _check_config_file(config_file)
        with _merge_errors(config_file), _accepts_auto(cfg):
            _merge_file(cfg, config_file)
        _use_one_schedule(cfg, _schedule_keys(config_file))
        _extend_weights_keep(cfg, _user_keys(config_file))
    merge_options(cfg, options)
    return cfg


def merge_options(cfg: CfgNode, options: Sequence[str]) -> None:
    """Set config keys in place from alternating keys and values, as on the command line.

    Raises:
        UserError: If a key is unknown, or if a value has the wrong type.
    """
    if len(options) % 2:
        raise UserError(
            f"Config options must be KEY VALUE pairs, but their number is odd "
            f"({len(options)}): {' '.join(options)}. Quote values that contain spaces."
        )
    if options:
        for key in options[::2]:
            if not _has_key(cfg, key):
                raise UserError(f"In the command-line options: {_explain_unknown(cfg, key)}")
        check_encoding(zip(options[::2], options[1::2], strict=True))
        for key in _SEVERAL_TYPES.intersection(options[::2]):
            # yacs would reject 0.5 if the config file contains an integer.
            set_config_value(cfg, key, None)
        for key, value in zip(options[::2], options[1::2], strict=True):
            _check_list("the command-line options", key, config_value(cfg, key), value)
        _reset_weight_selection(cfg, dict(zip(options[::2], options[1::2], strict=True)))
        with _merge_errors("the command-line options"), _accepts_auto(cfg):
            cfg.merge_from_list(_integers_as_floats(cfg, list(options)))
        _use_one_schedule(cfg, set(options[::2]))
        _extend_weights_keep(cfg, set(options[::2]))
    _check_no_none(cfg)
    check_elements(cfg)
    _use_channels(cfg)


def _use_channels(cfg: CfgNode) -> None:
    """Set ``INPUT.FORMAT`` to match ``INPUT.CHANNELS``, if the latter is set."""
    channels = cfg.INPUT.CHANNELS
    if channels is None:
        return
    if type(channels) is not int or not 1 <= channels <= MOST_CHANNELS:
        raise UserError(
            f"INPUT.CHANNELS is {channels!r}; expected an integer from 1 to {MOST_CHANNELS}, or "
            "None for colour and grayscale images."
        )
    cfg.INPUT.FORMAT = f"C{channels}"


def _reset_weight_selection(cfg: CfgNode, options: dict[str, str]) -> None:
    """Reset the keys that select tensors from a weight file if the options specify another file.

    For example, a run's config.yaml may select one of several networks in a pretraining checkpoint.
    This selection does not apply to the run's own checkpoint.
    """
    if cfg.MODEL.WEIGHTS and options.get("MODEL.WEIGHTS", cfg.MODEL.WEIGHTS) != cfg.MODEL.WEIGHTS:
        default = get_senet_config()
        for key in ("WEIGHTS_PREFIX", "WEIGHTS_EMA", "WEIGHTS_HEAD"):
            cfg.MODEL[key] = default.MODEL[key]


def _use_one_schedule(cfg: CfgNode, user_keys: set[str]) -> None:
    """Remove the iteration-based schedule if the user sets the number of epochs, and vice versa.

    Args:
        cfg: The config, which is changed in place.
        user_keys: The keys that the user sets. If they include both ``SOLVER.EPOCHS`` and
            ``SOLVER.MAX_ITER``, the config is not changed.
    """
    default = get_senet_config().SOLVER
    if "SOLVER.EPOCHS" in user_keys and "SOLVER.MAX_ITER" not in user_keys:
        if cfg.SOLVER.EPOCHS is None:
            return
        for key in {"MAX_ITER", "STEPS"} - {key.removeprefix("SOLVER.") for key in user_keys}:
            cfg.SOLVER[key] = default[key]
    elif "SOLVER.MAX_ITER" in user_keys and "SOLVER.EPOCHS" not in user_keys:
        cfg.SOLVER.EPOCHS = None


def _schedule_keys(path: str) -> set[str]:
    """Return all keys in the first config file that sets ``SOLVER.EPOCHS`` or ``SOLVER.MAX_ITER``.

    The given file is searched first, then its ``_BASE_`` files. If no file sets either key, the
    result is empty.
    """
    if "://" in path:
        return set()
    with open(path) as file:
        content = yaml.safe_load(file) or {}
    bases = content.pop(BASE_KEY, [])
    found = set(_dotted(content))
    if found & {"SOLVER.EPOCHS", "SOLVER.MAX_ITER"}:
        return found
    for base in reversed(bases if isinstance(bases, list) else [bases]):
        base = os.path.join(os.path.dirname(path), os.path.expanduser(base))
        if found := _schedule_keys(base):
            return found
    return set()


def _extend_weights_keep(cfg: CfgNode, user_keys: set[str]) -> None:
    """Extend ``MODEL.WEIGHTS_KEEP`` with the keys that the user has set.

    This list protects keys whose values would otherwise be inferred from the weight file. Keys that
    are never inferred are not added.
    """
    kept = cfg.MODEL.WEIGHTS_KEEP or []
    if wrong := [key for key in kept if key not in FILE_KEYS]:
        raise UserError(
            f"MODEL.WEIGHTS_KEEP contains {wrong[0]!r}; expected one or more of "
            f"{', '.join(FILE_KEYS)}."
        )
    cfg.MODEL["WEIGHTS_KEEP"] = [key for key in FILE_KEYS if key in kept or key in user_keys]


def _user_keys(path: str) -> set[str]:
    """Return the keys that are set in a user's config file and in its ``_BASE_`` files.

    The files in ``configs/base``, from which this project's configs inherit, are ignored. So is the
    config.yaml of a run, because it contains all keys.
    """
    own_base = os.path.realpath(str(resources.files("senet_transfer").joinpath("configs", "base")))
    if os.path.dirname(os.path.realpath(path)) == own_base or "://" in path:
        return set()
    with open(path) as file:
        content = yaml.safe_load(file) or {}
    bases = content.pop(BASE_KEY, [])
    found = set(_dotted(content))
    if found >= {key for key, _ in config_items(get_cfg())}:
        return set()
    for base in bases if isinstance(bases, list) else [bases]:
        base = os.path.expanduser(base)
        found |= _user_keys(os.path.join(os.path.dirname(path), base))
    return found


def _dotted(content: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


@contextlib.contextmanager
def _accepts_auto(cfg: CfgNode) -> Iterator[None]:
    """Allow True, False and "auto" for the keys in ``ACCEPT_AUTO`` while a config is merged.

    yacs accepts only values of the same type as the previous value.

    Raises:
        ValueError: If one of these keys is set to another value.
    """
    before = {key: config_value(cfg, key) for key in ACCEPT_AUTO}
    for key in before:
        set_config_value(cfg, key, None)  # yacs accepts any type if the old value is None
    yield
    for key, old in before.items():
        value = config_value(cfg, key)
        if value is None:
            set_config_value(cfg, key, old)
        elif not isinstance(value, bool) and value != "auto":
            raise ValueError(f"{key} is {value!r}; expected True, False or auto")


def _check_no_none(cfg: CfgNode) -> None:
    """Raise a UserError if a key is None although its default is neither None nor a string.

    yacs does not reject None.
    """
    values = dict(config_items(cfg))
    for key, default in config_items(get_senet_config()):
        if default is not None and not isinstance(default, str) and values.get(key) is None:
            raise UserError(
                f"{key} is None; expected a value of the same type as its default, {default!r}. "
                "Set a value, or remove the key from the config."
            )


def find_config(name: str) -> str:
    """Return the path of a config, given its path or the name of one of this project's configs.

    Args:
        name: A path, or a name such as "faster_rcnn_se_r50". If no file has this path, the prefix
            "configs/" and the suffix ".yaml" are ignored.

    Raises:
        UserError: If neither a file nor one of this project's configs has this name.
    """
    if os.path.exists(name) or name.endswith(".py"):
        return name
    own = resources.files("senet_transfer").joinpath("configs")
    stem = name.removeprefix("configs/").removesuffix(".yaml")
    path = own.joinpath(f"{stem}.yaml")
    if path.is_file():
        return str(path)
    names = [entry.name for entry in own.iterdir() if entry.is_file()]
    known = [name.removesuffix(".yaml") for name in names if name.endswith(".yaml")]
    near = difflib.get_close_matches(stem, known, n=3) or sorted(known)
    raise UserError(
        f"There is no config file {name}. Pass the path of a config file, or a name such as "
        f"{', '.join(near)}."
    )


def _check_config_file(path: str) -> None:
    if path.endswith(".py"):
        raise UserError(
            f"{path} is a LazyConfig, which only `senet train` supports. Use a YAML config; see "
            "docs/detectron2.md."
        )
    try:
        with open(path) as file:
            content = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The config file {path} can't be read: {error}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"The config file {path} is not plain YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(
            f"The config file {path} contains a {type(content).__name__}; expected a mapping with "
            "keys such as MODEL and SOLVER."
        )


def _integers_as_floats(cfg: CfgNode, options: list[str]) -> list[str]:
    """Return the options with integer values converted to floats where the key requires a float.

    yacs rejects an integer for a float key because the type differs from that of the default.
    """
    floats = {key for key, value in config_items(cfg) if isinstance(value, float)}
    return [
        f"{word}.0" if key in floats and str(word).lstrip("-").isdigit() else word
        for key, word in zip([None, *options], options, strict=False)
    ]


@contextlib.contextmanager
def _merge_errors(source: str) -> Iterator[None]:
    """Convert the errors of Detectron2 and yacs during a config merge into UserErrors."""
    try:
        yield
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The config file {source} can't be read: {error}.") from error
    except yaml.YAMLError as error:
        raise UserError(f"The config file {source} is not valid YAML: {error}") from error
    except RecursionError as error:
        raise UserError(
            f"The config file {source} includes itself as its _BASE_. Set _BASE_ to a different "
            "file."
        ) from error
    except (
        ValueError,
        AssertionError,
        AttributeError,
        KeyError,
        TypeError,
        SyntaxError,
    ) as error:
        raise UserError(
            f"In {source}: {error}. Expected a value of the same type as the key's default; see "
            "Detectron2's config reference and senet_transfer/config/defaults.py."
        ) from error


def _merge_file(cfg: CfgNode, path: str) -> None:
    """Merge a YAML file and its ``_BASE_`` files into a config.

    Raises:
        UserError: If a key does not exist.
    """
    with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
        # Errors while reading the file are reported below.
        _check_lists(path, cfg, cfg.load_yaml_with_base(path))
    try:
        # By default, Detectron2 falls back to an unsafe YAML loader, which runs code in YAML tags.
        cfg.merge_from_file(path, allow_unsafe=False)
    except KeyError as error:
        unknown = next(_unknown_keys(cfg, cfg.load_yaml_with_base(path)), None)
        if unknown is None:
            raise
        raise UserError(f"In {path}: {_explain_unknown(cfg, unknown)}") from error


def _check_lists(source: str, cfg: CfgNode, content: dict[str, Any], prefix: str = "") -> None:
    """Raise a UserError if a value in a config file is a string although its default is a list."""
    for key, value in content.items():
        if key not in cfg:
            continue
        if isinstance(value, dict) and isinstance(cfg[key], CfgNode):
            _check_lists(source, cfg[key], value, f"{prefix}{key}.")
        else:
            _check_list(source, f"{prefix}{key}", cfg[key], value)


def _check_list(source: str, key: str, default: Any, value: Any) -> None:
    """Raise a UserError if a value is a string although the key's default is a list.

    In Python, parentheses without a comma do not create a tuple: ``('my_train')`` is a string.
    """
    if not isinstance(default, list | tuple) or not isinstance(value, str):
        return
    with contextlib.suppress(ValueError, SyntaxError):  # raised for a string without quotes
        value = ast.literal_eval(value)
    if isinstance(value, str):
        raise UserError(
            f"In {source}: {key} is the string {value!r}; expected a list. A list of one element "
            f"needs square brackets or a comma: \"['{value}']\" or \"('{value}',)\"."
        )


def _unknown_keys(cfg: CfgNode, content: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys in a file's contents that do not exist in the config."""
    for key, value in content.items():
        if key not in cfg:
            if not cfg.is_new_allowed():
                yield f"{prefix}{key}"
        elif isinstance(value, dict) and isinstance(cfg[key], CfgNode):
            yield from _unknown_keys(cfg[key], value, f"{prefix}{key}.")


def _has_key(cfg: CfgNode, key: str) -> bool:
    node: Any = cfg
    for part in key.split("."):
        if not isinstance(node, CfgNode) or part not in node:
            return False
        node = node[part]
    return True


def _explain_unknown(cfg: CfgNode, key: str) -> str:
    known = [
        ".".join(parts[:n])
        for name, _ in config_items(cfg)
        for parts in [name.split(".")]
        for n in range(1, len(parts) + 1)
    ]
    near = difflib.get_close_matches(key, dict.fromkeys(known), n=3, cutoff=0.6)
    hint = (
        f"Did you mean {' or '.join(near)}?"
        if near
        else "It is defined by neither Detectron2 nor this project."
    )
    return f"There is no config key {key}. {hint}"
