"""Information in a weight file about its network: the name of the architecture, or a config.

Tensor names and shapes do not fully determine a network. Some networks, such as timm's
``resnetaa50``, have the same tensors as a supported network but compute different outputs. Values
that a training script stored next to the tensors can distinguish these networks.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from senet_transfer.preprocessing import Preprocessing
from senet_transfer.weights.families.architecture import Architecture
from senet_transfer.weights.families.geometry import Geometry
from senet_transfer.weights.formats.timm_config import TimmConfig

# CSAIL's ResNet-18 without the stem's max pool. Source: wideresnet.py in CSAILVision/places365,
# which run_placesCNN_unified.py uses with the file wideresnet18_places365.pth.tar.
WIDE_RESNET = "places365_wideresnet18"

# Networks with the tensors of a supported network but different outputs. Source:
# timm/models/resnet.py.
_LOOKALIKES = {
    "resnet18": ("timm's resnetblur18", "CSAIL's wideresnet18"),
    "resnet50": ("timm's resnetaa50", "timm's resnetblur50"),
}

# Description of the entry in timm's config.json, for messages.
_CONFIG_KEY = "architecture in config.json"
_NAME_KEYS = ("arch", "architecture", "model_name", "arch_name")
# Keys for a run's options. In the options, the network may also be stored under one of _PART_KEYS,
# as a name or as a dictionary of the network's options, which may have the key "name".
_OPTION_KEYS = ("hyper_parameters", "args", "config", "hparams", "cfg", "opt")
_PART_KEYS = ("model", "backbone")
_MAX_DEPTH = 4

_RESNET = re.compile(
    r"(se_?)?(resnet|resnext)_?(18|34|50|101|152)(?:_?(\d+)x(\d+)d)?", re.IGNORECASE
)
_WIDE = re.compile(r"wide_?resnet_?(50|101)_2", re.IGNORECASE)
_WIDE_18 = re.compile(r"(places365_)?wideresnet18(_places365)?", re.IGNORECASE)
# Networks with anti-aliased or blurred downsampling, other stems or shortcuts (c, d, s, t), or
# dilation.
_OTHERS = re.compile(
    r"(?:(?:se|eca)_?)?res(?:net|next)(?:aa|blur|rs|v2_?)_?\d+\w*"
    r"|(?:(?:se|eca)_?)?res(?:net|next)_?\d+(?:c|d|e|s|t|ts)"
    r"|(?:deeplabv3|deeplabv3_plus|fcn|pspnet)_resnet\d+",
    re.IGNORECASE,
)
_PUBLISHERS = re.compile(
    r"^(timm[./:_]|tu[-_]|hf[-_]hub:|torchvision[./]|models[./])+", re.IGNORECASE
)
_VARIANTS = re.compile(r"^(tv_|gluon_|legacy_)+")
_TEXT = 2**16


@dataclass(frozen=True)
class Statements:
    """Information in a weight file about its network.

    Attributes:
        contradiction: Description of how the information contradicts the tensors or specifies an
            unsupported network; empty if there are no contradictions other than those in ``notes``.
        notes: Descriptions of tolerated contradictions: entries that contradict the tensors
            although another entry confirms the network.
        confirmed: Whether the information confirms the architecture inferred from the tensors.
        wide: Whether the network is CSAIL's ``wideresnet18``.
        preprocessing: Channel order, mean and std; None if they are not specified.
        timm: Content of timm's ``config.json``, which determines the layer options and all of the
            preprocessing; None if there is no such file.
    """

    contradiction: str = ""
    notes: tuple[str, ...] = ()
    confirmed: bool = False
    wide: bool = False
    preprocessing: Preprocessing | None = None
    timm: TimmConfig | None = None

    @property
    def recorded(self) -> frozenset[str]:
        """Return the names of the layer options and preprocessing fields specified in the file."""
        pixels = {"format", "mean", "std"} if self.preprocessing or self.timm else set()
        geometry = {field.name for field in fields(Geometry)} if self.timm else set()
        return frozenset(pixels | geometry | ({"stem_pool"} if self.wide else set()))


def statements_of(
    metadata: Mapping[str, Any], architecture: Architecture | None, timm: TimmConfig | None = None
) -> Statements:
    """Compare the network names and configs in a file with the architecture of its tensors.

    Args:
        metadata: Values stored with the tensors.
        architecture: Architecture inferred from the tensors, or None if it is unknown.
        timm: Content of timm's ``config.json`` next to the file, or None if there is no such file.

    Returns:
        The information about the network, and any contradictions between this information and the
        tensors. Both are empty if the architecture is unknown.
    """
    if architecture is None:
        return Statements()
    found = _from_names(metadata, architecture, timm)
    if found.contradiction:
        return found
    meta = metadata.get("meta")
    for key in ("cfg", "config"):
        text = meta.get(key) if isinstance(meta, Mapping) else None
        if isinstance(text, str) and "backbone" in text[:_TEXT]:
            return replace(_from_mm_config(text[:_TEXT], architecture), notes=found.notes)
    return found


def _from_names(
    metadata: Mapping[str, Any], architecture: Architecture, timm: TimmConfig | None
) -> Statements:
    """Compare the network names in a file and its ``config.json`` with the tensors' architecture.

    A wrong name may describe another network of the training run, such as a teacher. It is
    tolerated if another entry names the inferred architecture. Two kinds of wrong names are always
    errors: a name in ``config.json``, because this file also determines the preprocessing, and the
    name of an unsupported network that can have the same tensors, such as timm's ``resnetaa50``.
    """
    confirmed = wide = False
    errors: list[str] = []
    others: list[str] = []
    for key, name in stated_names(metadata, timm):
        judged = _judge(name, architecture)
        confirmed |= judged is True
        wide |= judged is True and bool(_WIDE_18.fullmatch(_plain(name)))
        if judged is False:
            fatal = key == _CONFIG_KEY or _OTHERS.fullmatch(_plain(name))
            (errors if fatal else others).append(
                f"its entry {key!r} is {name!r}, but its tensors are those of {architecture.name}"
            )
    if not confirmed:
        errors += others
    if errors:
        return Statements(contradiction=errors[0])
    notes = tuple(f"{sentence}, as another entry states" for sentence in others)
    return Statements(notes=notes, confirmed=confirmed, wide=wide, timm=timm)


def named_model(architecture: Architecture | None, geometry: Geometry) -> str:
    """Return a network's model name, or "" if its architecture is unknown.

    If no registered model has this architecture, a description is returned instead.
    """
    if architecture is None:
        return ""
    return architecture.name if geometry.has_pool else WIDE_RESNET


def lookalikes(architecture: Architecture | None) -> tuple[str, ...]:
    """Return the names of other projects' networks that can be confused with this one.

    Their tensors have the same names and shapes as this network's, but their outputs differ.
    """
    return _LOOKALIKES.get(architecture.name, ()) if architecture else ()


def stated_names(
    metadata: Mapping[str, Any], timm: TimmConfig | None = None
) -> Iterator[tuple[str, str]]:
    """Yield the key and value of each entry that names a network, in a file or timm's config.

    Args:
        metadata: Values stored with the tensors in the file.
        timm: Content of timm's ``config.json`` next to the file.
    """
    if timm:
        yield _CONFIG_KEY, timm.architecture
    for key in _NAME_KEYS:
        if isinstance(metadata.get(key), str):
            yield key, metadata[key]
    for key in _OPTION_KEYS:
        if isinstance(metadata.get(key), Mapping):
            yield from _option_names(metadata[key], key, _MAX_DEPTH)


def _option_names(options: Mapping[str, Any], path: str, depth: int) -> Iterator[tuple[str, str]]:
    for key in (*_NAME_KEYS, *_PART_KEYS):
        if isinstance(options.get(key), str):
            yield f"{path}.{key}", options[key]
    for key in _PART_KEYS if depth else ():
        part = options.get(key)
        if isinstance(part, Mapping):
            if isinstance(part.get("name"), str):
                yield f"{path}.{key}.name", part["name"]
            yield from _option_names(part, f"{path}.{key}", depth - 1)


def without_publisher(name: str) -> str:
    """Remove the name of a package or website, such as ``timm/``, from a network's name."""
    return _PUBLISHERS.sub("", name.strip())


def _plain(name: str) -> str:
    """Remove the publisher and the tag (such as timm's ``.a1_in1k``) from a network's name."""
    name = _VARIANTS.sub("", without_publisher(name))
    return name.partition(".")[0].replace("-", "_")


def _judge(name: str, architecture: Architecture) -> bool | None:
    """Return whether a network name matches an architecture, or None if this is unclear.

    The number of channels is compared only if the name of a ResNeXt contains it. Scripts also use
    the standard names, such as "resnet50", for wider or narrower networks.
    """
    name = _plain(name)
    depth = _depth(architecture)
    if _OTHERS.fullmatch(name):
        return False
    if depth is None:
        # For example, a CIFAR network or a network without a name.
        return True if name == architecture.name else None
    if _WIDE_18.fullmatch(name):
        return depth == "18" and not architecture.se_stages
    if match := _WIDE.fullmatch(name):
        return depth == match[1] and architecture.groups == 1
    match = _RESNET.fullmatch(name)
    if match is None:
        return True if name == architecture.name else None
    has_se, kind, stated, groups, width = match.groups()
    # A name without "se" is accepted: the tensors show the SE layers, and scripts often have an
    # option for them.
    if stated != depth or (has_se and not architecture.se_stages):
        return False
    if groups and (int(groups), int(width)) != (architecture.groups, architecture.width_per_group):
        return False
    return (kind.lower() == "resnext") == (architecture.groups > 1)


def _depth(architecture: Architecture) -> str | None:
    """Return the number of layers of a ResNet or ResNeXt, or None for other networks."""
    match = re.match(r"(?:se_)?res(?:net|next)(\d+)(?:_\d+x\d+d)?$", architecture.name)
    return match[1] if match and not architecture.network else None


def _from_mm_config(text: str, architecture: Architecture) -> Statements:
    """Read the backbone and the input normalisation from an mmpretrain or mmdetection config.

    The input normalisation consists of the channel order, mean and std.
    """
    # Other parts of the config, such as a teacher, can also have a backbone.
    model = re.search(r"^model\s*=", text, re.MULTILINE)
    start = model.start() if model and "backbone" in text[model.start() :] else 0
    backbone = text[text.index("backbone", start) :]
    backbone = re.split(r"\b(?:neck|head|rpn_head|decode_head)\s*=", backbone)[0]
    said = {
        key: match[1]
        for key in ("type", "depth", "style", "strides", "dilations", "deep_stem", "avg_down")
        if (match := re.search(rf"\b{key}=\s*['\"]?(\([^)]*\)|[\w.]+)", backbone))
    }
    expected = {
        "style": ("pytorch",),
        "deep_stem": ("False",),
        "avg_down": ("False",),
        "strides": ("1222",),
        "dilations": ("1111",),
    }
    for key, values in expected.items():
        value = re.sub(r"[^\w]", "", said.get(key, values[0]))
        if value not in values:
            return Statements(
                contradiction=f"its config has a backbone with {key}={said[key]}, whose outputs "
                "differ from those of the supported networks"
            )
    depth = _depth(architecture)
    if depth and said.get("depth", depth) != depth:
        return Statements(
            contradiction=f"its config has a backbone with depth={said['depth']}, but its tensors "
            f"are those of {architecture.name}"
        )
    return Statements(confirmed="depth" in said, preprocessing=_mm_pixels(text))


def _mm_pixels(text: str) -> Preprocessing | None:
    values = {}
    for key in ("mean", "std"):
        match = re.search(rf"\b{key}=\s*[\[(]([-\d.,\s]+)[\])]", text)
        numbers = re.findall(r"-?\d+\.?\d*", match[1]) if match else []
        if len(numbers) != 3:
            return None
        values[key] = tuple(map(float, numbers))
    order = re.search(r"\b(?:to_rgb|bgr_to_rgb)=\s*(True|False)", text)
    if (
        order is None
        or not all(abs(v) < 1000 for v in values["mean"])
        or not all(0 < v < 1000 for v in values["std"])
    ):
        return None
    mean, std = values["mean"], values["std"]
    return Preprocessing(
        format="RGB" if order[1] == "True" else "BGR",
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
    )
