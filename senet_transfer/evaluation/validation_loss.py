"""Losses of a detector on an evaluation dataset."""

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# Modules that stay in evaluation mode while the model computes losses.
_EVALUATED = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.Dropout, nn.Dropout1d,
    nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
)  # fmt: skip

# Name of the running mean that Detectron2's dense detectors use to normalise their losses.
_NORMALISER = "loss_normalizer"


def validation_losses(model: nn.Module, loader: Iterable[list[Any]]) -> dict[str, float]:
    """Return a detector's mean losses per image, without changing the detector.

    The backbone, batch normalisation and dropout are in evaluation mode. Proposals are sampled with
    a fixed random seed, so repeated calls return the same losses. All processes must call this
    function together.

    Args:
        model: A detector, which returns a dict of losses in training mode.
        loader: A loader of batches with ground truth.

    Returns:
        The losses keyed by name, including the sum ``total_loss``, averaged over the images of all
        processes.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module
    sums: defaultdict[str, float] = defaultdict(float)
    images = 0
    devices = list({parameter.device for parameter in model.parameters() if parameter.is_cuda})
    with (
        torch.no_grad(),
        EventStorage(),  # for values that a detector logs in training mode
        torch.random.fork_rng(devices=devices),
        _loss_mode(model),
    ):
        for batch in loader:
            torch.manual_seed(0)
            losses = model(batch)
            for name, loss in losses.items():
                sums[name] += float(loss) * len(batch)
            images += len(batch)
    parts = comm.all_gather((dict(sums), images))
    total = sum(part[1] for part in parts)
    names = dict.fromkeys(name for part in parts for name in part[0])
    means = {name: sum(part[0].get(name, 0.0) for part in parts) / total for name in names}
    return {"total_loss": sum(means.values()), **means}


@contextlib.contextmanager
def _loss_mode(model: nn.Module) -> Iterator[None]:
    """Make a detector return losses inside the context, and restore the detector on exit."""
    modes = [(module, module.training) for module in model.modules()]
    normaliser = vars(model).get(_NORMALISER)
    model.train()
    for module in model.modules():
        if isinstance(module, _EVALUATED):
            module.eval()
    if isinstance(backbone := getattr(model, "backbone", None), nn.Module):
        backbone.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        if normaliser is not None:
            setattr(model, _NORMALISER, normaliser)
        else:
            vars(model).pop(_NORMALISER, None)
