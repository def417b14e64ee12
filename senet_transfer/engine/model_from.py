"""The model that is meant by a name, a config or a checkpoint, as a config in each case."""

import os

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from senet_transfer.config import META_ARCHITECTURE, get_senet_config
from senet_transfer.config.load import load_config, merge_options
from senet_transfer.errors import UserError
from senet_transfer.models.empty import built_empty, fill_empty
from senet_transfer.models.registry import model_entry
from senet_transfer.weights import apply_file_geometry
from senet_transfer.weights.file_geometry import local_weights
from senet_transfer.weights.mapping.source import examine


def model_config(
    model: str = "", config_file: str = "", weights: str = "", options: list[str] = ()
) -> CfgNode:
    """The config of the model that is meant.

    Args:
        model: a name of :func:`senet_transfer.list_models`: a classifier, with what
            ``create_classifier`` builds of it.
        config_file: a config, in place of a name.
        weights: a weight file, which has the last word on geometry and preprocessing. With it
            alone, the model is that of the config.yaml beside it, or else what the file says.
        options: alternating keys and values over the config.

    Raises:
        UserError: none or two of them say what the model is, or one makes no sense.
    """
    if model and config_file:
        raise UserError("--model and --config-file both say what the model is. Give one of them.")
    beside = os.path.join(os.path.dirname(weights), "config.yaml")
    if weights and not model and not config_file and os.path.isfile(beside):
        config_file = beside
    if config_file:
        cfg = load_config(config_file, list(options))
        cfg.MODEL.WEIGHTS = weights or cfg.MODEL.WEIGHTS
        if weights:
            apply_file_geometry(cfg)
        return cfg
    stated: list[str] = []
    if weights:
        name, stated = _of_file(weights)
        model = model or name
    if not model:
        raise UserError(
            "What is the model? Give --model NAME (see senet_transfer.list_models()), "
            "--config-file, or a checkpoint that says what it is as --weights."
        )
    cfg = _named(model)
    merge_options(cfg, [*stated, *options])
    cfg.MODEL.WEIGHTS = weights
    apply_file_geometry(cfg)
    return cfg


def _of_file(weights: str) -> tuple[str, list[str]]:
    """The name of a file's network, empty where it can't be told, and the options it needs."""
    arch = examine(*local_weights(weights)).architecture
    if arch is None:
        return "", []
    stated = []
    if arch.classes:
        stated += ["MODEL.CLASSIFIER.NUM_CLASSES", str(arch.classes)]
    if arch.se_stages and arch.se_ratio:
        stated += ["MODEL.SE.STAGES", str(arch.se_stages), "MODEL.SE.RATIO", str(arch.se_ratio)]
    return arch.name, stated


def _named(name: str) -> CfgNode:
    """The config of the classifier that ``create_classifier`` builds of a name."""
    preprocessing = model_entry(name).preprocessing
    cfg = get_senet_config()
    cfg.MODEL.META_ARCHITECTURE = META_ARCHITECTURE
    cfg.MODEL.BACKBONE.NAME = "build_senet_backbone"
    cfg.MODEL.BACKBONE.ARCH = name
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.INPUT.FORMAT = preprocessing.format
    cfg.MODEL.PIXEL_MEAN = list(preprocessing.mean)
    cfg.MODEL.PIXEL_STD = list(preprocessing.std)
    cfg.INPUT.CLASSIFICATION.TEST_RESIZE = preprocessing.resize
    cfg.INPUT.CLASSIFICATION.TEST_CROP = preprocessing.crop
    cfg.INPUT.CLASSIFICATION.INTERPOLATION = preprocessing.interpolation
    return cfg


def build_to_count(cfg: CfgNode) -> nn.Module:
    """The config's model on the CPU with all weights zero, which takes no time to build."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    with built_empty():
        model = build_model(cfg)
    return fill_empty(model).eval()
