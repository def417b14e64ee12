"""timm's networks: their names, preprocessing and pretrained weights.

A network that timm builds is called ``timm/NAME``, where NAME is a name in ``timm.list_models()``,
with or without the tag of its pretrained weights. timm is an optional dependency.
"""

import difflib
import importlib.util
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from senet_transfer.errors import UserError
from senet_transfer.preprocessing import Preprocessing
from senet_transfer.utils.atomic_io import atomic_path
from senet_transfer.utils.text import first_line

PREFIX = "timm/"


def import_timm() -> Any:
    """Import and return the module ``timm``.

    Raises:
        UserError: If timm is not installed.
    """
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise UserError(
            f"Models whose names start with {PREFIX} require timm, which can't be imported "
            f"({error}). Install it with `pip install 'senet_transfer[timm]'`."
        ) from error


def is_timm(name: object) -> bool:
    """Return whether a model name refers to a network that timm builds."""
    return isinstance(name, str) and name.startswith(PREFIX)


def timm_publishes(name: str) -> bool:
    """Return whether ``timm/NAME`` refers to pretrained weights of the installed timm version."""
    if not is_timm(name) or importlib.util.find_spec("timm") is None:
        return False
    names = import_timm().models
    return names.is_model(_short(name)) and names.is_model_pretrained(_short(name))


def pretrained_config(name: str) -> dict[str, Any]:
    """Return timm's ``pretrained_cfg`` for a network.

    Args:
        name: Name such as "timm/resnet50" or "timm/resnet50.a1_in1k".

    Raises:
        UserError: If timm is not installed, or has no such network or tag.
    """
    timm, short = import_timm(), _short(name)
    arch = short.partition(".")[0]
    if not timm.is_model(arch):
        near = difflib.get_close_matches(arch, timm.list_models(), n=4, cutoff=0.6)
        hint = f" Did you mean {' or '.join(PREFIX + other for other in near)}?" if near else ""
        raise UserError(
            f"timm {timm.__version__} has no network called {arch!r} (the model is {name}).{hint} "
            'Call senet_transfer.list_models("timm/*") for a list.'
        )
    try:
        found = timm.get_pretrained_cfg(short)
    except RuntimeError as error:
        tags = ", ".join(timm.list_models(f"{arch}.*", pretrained=True))
        raise UserError(
            f"timm {timm.__version__} has no weights called {short!r} ({error}). Available: {tags}."
        ) from error
    # A few architectures are registered without a configuration.
    return found.to_dict() if found else {"architecture": arch}


def timm_preprocessing(name: str) -> Preprocessing:
    """Return timm's preprocessing for a network, with mean and std for pixels from 0 to 255."""
    data = import_timm().data.resolve_data_config(pretrained_cfg=pretrained_config(name))
    side = data["input_size"][-1]
    mean, std = (tuple(round(255 * v, 3) for v in data[key]) for key in ("mean", "std"))
    return Preprocessing(
        mean=mean,
        std=std,
        # As in timm's evaluation.
        resize=math.floor(side / data["crop_pct"]),
        crop=side,
        interpolation=data["interpolation"],
        mode={"center": "short_side"}.get(data["crop_mode"], data["crop_mode"]),
    )


def classifier_name(name: str) -> str:
    """Return the name of a timm network's classifier layer, or "" if it has none or several.

    For example, distilled transformers have two classifiers, whose logits they average.
    """
    found = pretrained_config(name).get("classifier")
    return found if isinstance(found, str) else ""


def first_convolution(name: str) -> str:
    """Return the name of a timm network's first convolution, or "" if it is unknown."""
    found = pretrained_config(name).get("first_conv") or ""
    return found if isinstance(found, str) else str(found[0])


def tensor_names(name: str) -> tuple[str, ...]:
    """Return the names in the state dict of a timm network."""
    with torch.device("meta"):
        return tuple(import_timm().create_model(_short(name)).state_dict())


def fetch_timm(name: str) -> Path:
    """Return the path of timm's pretrained weights, after downloading them on first use.

    timm downloads the weights to the Hugging Face cache and converts the tensor names to those of
    its own network. The result is stored in torch.hub's cache.

    Raises:
        UserError: If timm can't load the weights.
    """
    timm, config = import_timm(), pretrained_config(name)
    full = ".".join(filter(None, (config["architecture"], config.get("tag"))))
    path = Path(torch.hub.get_dir(), "checkpoints", "timm", f"{full}.safetensors")
    if path.is_file():
        return path
    try:
        tensors = timm.create_model(full, pretrained=True).state_dict()
    # Hugging Face's client and timm raise exceptions of many types.
    except Exception as error:
        raise UserError(
            f"timm can't load the weights {full}: {first_line(error)}. Check the network "
            "connection and HF_HOME, or put a file with the state dict of timm's network at "
            f"{os.path.abspath(path)}."
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as partial:
        tensors = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}
        save_file(tensors, partial, {"format": "pt", "architecture": full})
    return path


def _short(name: str) -> str:
    return name.removeprefix(PREFIX)
