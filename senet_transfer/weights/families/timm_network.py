"""Family of files with the state dicts of timm's networks, for models called ``timm/NAME``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from senet_transfer.errors import UserError
from senet_transfer.weights.families.geometry import Geometry
from senet_transfer.weights.families.registry import Family
from senet_transfer.weights.hub.timm_networks import PREFIX, classifier_name, import_timm

# Name of the family. It is determined by the model instead of being detected.
TIMM_NETWORK = "timm_network"


def timm_family(network: str) -> Family:
    """Return the family for state dicts of a network such as "timm/regnety_002"."""
    classifier = classifier_name(network)

    def rename(tensor: str) -> str:
        layer, _, leaf = tensor.rpartition(".")
        return f"linear.{leaf}" if classifier and layer == classifier else f"net.{tensor}"

    return Family(
        TIMM_NETWORK,
        f"timm's network {network.removeprefix(PREFIX)}",
        detect=lambda tensors, metadata: False,
        rename=rename,
        geometry=lambda architecture: Geometry(),
        preprocessing=lambda architecture: None,
    )


def stated_network(path: Path, metadata: Mapping[str, Any], network: str) -> str:
    """Return the name of a file's network, including the tag of the weights if it is specified.

    Args:
        path: Path of the file.
        metadata: Values in the file, such as the architecture in checkpoints from timm's training
            script.
        network: Name of the model, such as "timm/regnety_002".

    Raises:
        UserError: If the file specifies a different timm network.
    """
    stated = metadata.get("architecture") or metadata.get("arch")
    if not isinstance(stated, str) or not import_timm().is_model(stated):
        return network
    arch, _, tag = stated.partition(".")
    if arch != network.removeprefix(PREFIX).partition(".")[0]:
        raise UserError(
            f"{path} contains the network {stated}, but the model is {network}. Use weights for "
            f"this model, or the model {PREFIX}{arch} (MODEL.BACKBONE.ARCH)."
        )
    return PREFIX + stated if tag else network
