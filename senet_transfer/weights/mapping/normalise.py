"""Conversions of tensors in a weight file to the form that this project's networks use.

All functions change a dictionary from tensor name to tensor in place, except :func:`reshaped`. The
ones that return a list return notes for the user.
"""

from pathlib import Path

import torch
from torch import Tensor

from senet_transfer.errors import UserError
from senet_transfer.utils.text import first_of
from senet_transfer.weights.families import renaming as names

# The constant that the norms of this project's networks add to the variance.
EPS = 1e-5


def convert_dtypes(tensors: dict[str, Tensor], path: str | Path) -> None:
    """Convert 8-bit floats to float32, because PyTorch has no arithmetic for 8-bit floats.

    Raises:
        UserError: If a dtype packs several numbers into one element.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype.itemsize == 1:
            try:
                tensors[name] = tensor.float()
            except RuntimeError as error:
                raise UserError(
                    f"{path}: {name} has the dtype {tensor.dtype}, which is not supported. "
                    "Convert the weights to float32, float16 or bfloat16."
                ) from error


def repair_counters(tensors: dict[str, Tensor]) -> list[str]:
    """Convert ``num_batches_tracked`` to integer scalars, and drop those without a valid value.

    Scripts that convert or average all tensors change the dtype and shape of these counters. The
    counters have no effect on a network's outputs.
    """
    dropped = []
    for name in [name for name in tensors if name.endswith(".num_batches_tracked")]:
        values = tensors[name].flatten()
        if not tensors[name].ndim and values.dtype == torch.int64:
            continue
        real = values.numel() and not values.is_complex()
        if real and bool((values == values[0]).all()) and bool(values[0].double().abs() < 2**53):
            tensors[name] = values[0].double().round().long()
        else:
            del tensors[name]
            dropped.append(name)
    shown_names = first_of(dropped, 2)
    return [f"batch counters without a valid value were dropped ({shown_names})"] * bool(dropped)


def reshaped(name: str, tensor: Tensor) -> Tensor:
    """Reshape a linear layer's weight that is stored as the weight of a 1x1 convolution."""
    linear = name.startswith("linear.") or (name.startswith(names.BACKBONE) and ".se.fc" in name)
    if linear and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
        return tensor.flatten(1)
    return tensor


def fold_biases(tensors: dict[str, Tensor]) -> list[str]:
    """Fold biases of convolutions into the running means of the following norms."""
    notes = []
    for name in [name for name in tensors if name.endswith(".bias")]:
        mean = f"{name.removesuffix('.bias')}.norm.running_mean"
        if mean in tensors and tensors[mean].shape == tensors[name].shape:
            tensors[mean] = tensors[mean] - tensors.pop(name)
            notes.append(f"{name} was folded into {mean}")
    return notes


def expand_affine(tensors: dict[str, Tensor]) -> list[str]:
    """Add neutral statistics (mean 0, variance 1 - eps) to norms with only a weight and a bias."""
    for name in [name for name in tensors if name.endswith(".norm.weight")]:
        norm, weight = name.removesuffix(".weight"), tensors[name]
        tensors[f"{norm}.running_mean"] = torch.zeros_like(weight)
        tensors[f"{norm}.running_var"] = torch.ones_like(weight) - EPS
    if "stem.conv1.bias" in tensors and not tensors["stem.conv1.bias"].any():
        del tensors["stem.conv1.bias"]
        return ["stem.conv1.bias is zero and was dropped"]
    return []


def drop_background(tensors: dict[str, Tensor]) -> list[str]:
    """Drop the first class of a classifier with 1001 classes."""
    for name in ("linear.weight", "linear.bias"):
        if name in tensors:
            tensors[name] = tensors[name][1:]
    return ["the background class, the first of the classifier's 1001 classes, was dropped"]
