"""timm's networks as Detectron2 backbones.

The network is timm's own module, stored in the attribute ``net``, so its tensors have timm's names.
Feature maps come from timm's ``forward_intermediates``, as with ``features_only=True``. Layers that
are not needed for the feature maps are removed.
"""

from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn

from senet_transfer.errors import UserError
from senet_transfer.layers.squeeze_excitation import SEOptions
from senet_transfer.models.backbones.builder import FEATURES, check_freeze_at, check_out_features
from senet_transfer.models.registry import ModelEntry, register_prefix
from senet_transfer.weights.hub.timm_networks import (
    PREFIX,
    import_timm,
    pretrained_config,
    timm_preprocessing,
)

# Name of the feature for classification: timm's output before the classifier, (N, C, 1, 1).
POOLED = "pooled"

_STRIDES = {4: "res2", 8: "res3", 16: "res4", 32: "res5"}
# Side length in pixels of the images used to check the sizes of feature maps.
_SIDE = 256
_NAMES = (*_STRIDES.values(), POOLED)


class TimmBackbone(Backbone):
    """Backbone that returns the feature maps or the pooled features of one of timm's networks.

    Attributes:
        model_name: Name of the model, such as "timm/regnety_002".
        net: timm's network without its classifier.
        stages: Dict that maps the path of each module in ``net`` to its stage number: 1 for the
            stem, 2 to 5 for the stages that end with res2 to res5, and 6 for later layers. Empty if
            timm does not name the stages.
        unused_tensors: Names of the full network's tensors that are not part of this backbone.
    """

    def __init__(
        self, model_name: str, *, in_channels: int = 3, out_features: list[str] | None = None
    ):
        """
        Args:
            model_name: Name of the model, such as "timm/regnety_002".
            in_channels: Number of image channels.
            out_features: Names of the feature maps to return, from "res2" to "res5", or only
                "pooled" for the pooled features. None returns "res5".

        Raises:
            UserError: If timm has no such network, the network has no feature maps with strides 4,
                8, 16 and 32, or a name is invalid.
        """
        super().__init__()
        config = pretrained_config(model_name)
        check_out_features(out_features, _NAMES)
        self.model_name = model_name
        self._out_features = list(out_features or ["res5"])
        if POOLED in self._out_features and len(self._out_features) > 1:
            raise UserError(
                f"out_features is {self._out_features}, but {POOLED!r} can't be combined with "
                f"other names. Pass the names of feature maps, or only {POOLED!r}."
            )
        net: Any = import_timm().create_model(
            model_name.removeprefix(PREFIX), num_classes=0, in_chans=in_channels
        )
        tensors = net.state_dict().keys()
        maps = _feature_maps(model_name, net)
        self.stages = _stage_numbers(net, list(maps.values()))
        self._shapes = {
            name: ShapeSpec(channels=found["num_chs"], stride=found["reduction"])
            for name, found in maps.items()
        }
        self._shapes[POOLED] = ShapeSpec(channels=net.head_hidden_size, stride=32)
        # timm returns feature maps in the order of their indices.
        self._maps = [name for name in maps if name in self._out_features]
        if self._maps:
            if config.get("fixed_input_size"):
                raise UserError(
                    f"{model_name} only accepts images of {config['input_size'][-2:]} pixels, but "
                    "a backbone for feature maps must accept images of all sizes. Use a "
                    "convolutional network."
                )
            indices = [maps[name]["index"] for name in self._maps]
            self._indices = net.prune_intermediate_layers(indices, prune_norm=True)
        self.net = net
        self.unused_tensors = frozenset(f"net.{name}" for name in tensors - net.state_dict().keys())
        if self._maps:
            self._check_sizes(in_channels)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map images ``(N, in_channels, H, W)`` to a dict of feature maps by name."""
        if not self._maps:
            return {POOLED: self.net(x).flatten(1)[:, :, None, None]}
        found = self.net.forward_intermediates(
            x, indices=self._indices, output_fmt="NCHW", intermediates_only=True
        )
        features = dict(zip(self._maps, found, strict=True))
        return {name: features[name] for name in self._out_features}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return the channels and stride of each output feature map, keyed by its name."""
        return {name: self._shapes[name] for name in self._out_features}

    def _check_sizes(self, in_channels: int) -> None:
        """Raise a UserError if a feature map's size is not the image size divided by the stride."""
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        empty = {name: tensor.to("meta") for name, tensor in tensors.items()}
        images = torch.empty(1, in_channels, _SIDE, _SIDE, device="meta")
        self.eval()
        features = torch.func.functional_call(self, empty, (images,))
        self.train()
        for name, shape in self.output_shape().items():
            side = _SIDE // shape.stride
            found, expected = features[name].shape[1:], (shape.channels, side, side)
            if found != expected:
                raise UserError(
                    f"The feature map {name} of {self.model_name} has the shape {tuple(found)} for "
                    f"images of {_SIDE} x {_SIDE} pixels; expected {expected}, with stride "
                    f"{shape.stride}. Use a network whose convolutions are padded."
                )

    def freeze(self, freeze_at: int) -> None:
        """Freeze the parameters and the batch norm statistics of the first stages.

        Args:
            freeze_at: Number of stages, counted from the stem; 0 freezes nothing.
        """
        if freeze_at and not self.stages:
            raise UserError(
                f"freeze_at is {freeze_at}, but it is unknown which layers of {self.model_name} "
                "belong to which stage. Set freeze_at to 0 (MODEL.BACKBONE.FREEZE_AT)."
            )
        freeze_norm = import_timm().layers.freeze_batch_norm_2d
        for path, module in list(self.net.named_modules()):
            if path and self.stages.get(path, 6) <= freeze_at:
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad = False
                if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
                    self.net.set_submodule(path, freeze_norm(module))


def _feature_maps(model_name: str, net: Any) -> dict[str, dict[str, Any]]:
    """Return timm's ``feature_info`` record for the last feature map of each stride from 4 to 32.

    The records are keyed by this project's names of the feature maps, "res2" to "res5".

    Raises:
        UserError: If the network has no feature maps with strides 4, 8, 16 and 32.
    """
    records = getattr(net, "feature_info", None) or []
    found = {
        record["reduction"]: {**record, "index": index} for index, record in enumerate(records)
    }
    if not hasattr(net, "forward_intermediates") or not found.keys() >= _STRIDES.keys():
        has = ", ".join(map(str, sorted(found))) or "none"
        raise UserError(
            f"The feature maps of {model_name} have the strides {has}; expected 4, 8, 16 and 32. "
            "Use a network with these strides, such as timm/resnet50, timm/regnety_016, "
            "timm/efficientnet_b0, timm/mobilenetv3_large_100 or timm/convnext_tiny."
        )
    return {name: found[stride] for stride, name in _STRIDES.items()}


def _stage_numbers(net: nn.Module, maps: list[dict[str, Any]]) -> dict[str, int]:
    """Return a dict that maps the path of each module to its stage number (1 for the stem).

    The dict is empty if the stages are unknown. The modules of a network are listed in execution
    order, and timm specifies which module produces each feature map. The stem ends with the module
    that produces the last feature map with a smaller stride than res2. If there is no such feature
    map, the stem ends before the module that produces res2.
    """
    paths = [path for path, _ in net.named_modules() if path]

    def inside(end: str) -> list[int]:
        return [i for i, path in enumerate(paths) if f"{path}.".startswith(f"{end}.")]

    stages = [inside(record["module"]) for record in maps]
    early = [r for r in net.feature_info if r["reduction"] < maps[0]["reduction"]]
    stem = inside(early[-1]["module"]) if early else stages[0][:1]
    if not all([stem, *stages]):
        return {}
    ends = [stem[-1] if early else stem[0] - 1, *(stage[-1] for stage in stages)]
    return {path: 1 + sum(i > end for end in ends) for i, path in enumerate(paths)}


def build_timm(
    *,
    model_name: str,
    se: SEOptions | None = None,
    norm: str = "BN",
    in_channels: int = 3,
    out_features: list[str] | None = None,
    freeze_at: int = 0,
) -> TimmBackbone:
    """Build one of timm's networks.

    Args:
        model_name: Name of the model, such as "timm/regnety_002".
        se: Not used, because timm determines the network's SE layers.
        norm: "BN" keeps timm's norm layers. "FrozenBN" and "SyncBN" convert the batch norm layers.
        in_channels: Number of image channels.
        out_features: See :class:`TimmBackbone`.
        freeze_at: Number of stages to freeze, counted from the stem.

    Raises:
        UserError: If timm is not installed, an option is invalid, or the network is not supported
            as a backbone, for example because it has no feature maps with strides 4, 8, 16 and 32.
    """
    check_freeze_at(freeze_at, FEATURES)
    backbone = TimmBackbone(model_name, in_channels=in_channels, out_features=out_features)
    layers = import_timm().layers
    if norm == "GN":
        raise UserError(
            f"The norm is GN, but timm determines the norms of {model_name}; expected BN (timm's "
            "norms), FrozenBN or SyncBN (MODEL.RESNETS.NORM). For group norms, use a network such "
            "as timm/resnet50_gn."
        )
    if norm == "FrozenBN":
        backbone.net = layers.freeze_batch_norm_2d(backbone.net)
    if norm == "SyncBN":
        backbone.net = layers.convert_sync_batchnorm(backbone.net)
    backbone.freeze(freeze_at)
    return backbone


def _entry(name: str) -> ModelEntry:
    return ModelEntry(
        name=name,
        build=build_timm,
        fixed={"model_name": name},
        has_se=False,
        preprocessing=timm_preprocessing(name),
        pooled=POOLED,
    )


def _list(pattern: str) -> list[str]:
    return [PREFIX + name for name in import_timm().list_models(pattern.removeprefix(PREFIX))]


register_prefix(PREFIX, _entry, _list)
