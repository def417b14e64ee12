"""Weight family for state dicts of timm's networks, which this project calls ``timm/NAME``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from senet_transfer.errors import UserError
from senet_transfer.utils.text import shown
from senet_transfer.weights.families.geometry import Geometry
from senet_transfer.weights.families.registry import Family
from senet_transfer.weights.families.statements import stated_names, without_publisher
from senet_transfer.weights.formats.timm_config import TimmConfig
from senet_transfer.weights.hub.timm_networks import PREFIX, classifier_name, import_timm

# Name of the family. It is determined by the model instead of being detected.
TIMM_NETWORK = "timm_network"


def timm_family(network: str) -> Family:
    """Return the weight family for state dicts of a timm network, such as "timm/regnety_002"."""
    classifier = classifier_name(network)

    def rename(tensor: str) -> str | None:
        if not classifier or not tensor.startswith(f"{classifier}."):
            return f"net.{tensor}"
        leaf = tensor.removeprefix(f"{classifier}.")
        # Another head, such as an MLP, has names like "fc.0.weight".
        return None if "." in leaf else f"linear.{leaf}"

    return Family(
        TIMM_NETWORK,
        f"timm's network {network.removeprefix(PREFIX)}",
        detect=lambda tensors, metadata: False,
        rename=rename,
        geometry=lambda architecture: Geometry(),
        preprocessing=lambda architecture: None,
    )


def stated_network(
    path: Path,
    metadata: Mapping[str, Any],
    network: str,
    timm: TimmConfig | None = None,
    *,
    several: bool = False,
) -> str:
    """Return a timm network's name, with the tag of its weights if the file specifies a tag.

    Args:
        path: Path of the file.
        metadata: Values in the file, such as the architecture in checkpoints from timm's training
            script.
        network: Name of the network that loads the weights, such as "timm/regnety_002".
        timm: Content of timm's ``config.json`` next to the file.
        several: Whether the file contains several networks. If True, names of other networks are
            ignored.

    Raises:
        UserError: If ``several`` is False, and the file specifies a different timm network.
    """
    own, tagged = network.removeprefix(PREFIX).partition(".")[0], network
    for key, name in stated_names(metadata, timm):
        stated = without_publisher(name)
        arch, _, tag = stated.partition(".")
        if not import_timm().is_model(arch):
            continue
        if arch == own:
            tagged = PREFIX + stated if tag and tagged == network else tagged
        elif not several:
            raise UserError(
                f"{path} contains the network {stated} (its entry {key!r} is {shown(name)!r}), but "
                f"the model is {network}. Use weights for {network}, or build the model "
                f"{PREFIX}{arch} (MODEL.BACKBONE.ARCH)."
            )
    return tagged
