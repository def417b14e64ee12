"""Construction of models from a model name, a config file or a weight file."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from senet_transfer.config import META_ARCHITECTURE, get_senet_config, is_classification
from senet_transfer.config.load import load_config, merge_options
from senet_transfer.config.validation import check_input
from senet_transfer.data.cifar.in_memory import SIDE
from senet_transfer.data.images.published_classes import published_classes
from senet_transfer.data.images.transforms import EVAL_MODES
from senet_transfer.engine.checkpoints.classes import apply_file_classes, config_next_to
from senet_transfer.engine.numerics import set_memory_format
from senet_transfer.engine.setup import use_available_device
from senet_transfer.errors import UserError
from senet_transfer.models.build import weights_follow
from senet_transfer.models.empty import built_empty, fill_empty
from senet_transfer.models.image_classifier import preprocessing_of
from senet_transfer.models.registry import list_models, model_entry
from senet_transfer.preprocessing import Preprocessing, channels_of
from senet_transfer.utils.text import first_of
from senet_transfer.weights import apply_file_geometry
from senet_transfer.weights.choice import Choice, config_choice, stated_values
from senet_transfer.weights.file_geometry import (
    OPTION_KEYS,
    examine_config_weights,
    local_weights,
)
from senet_transfer.weights.formats.timm_config import read_timm_config
from senet_transfer.weights.hub.catalogue import only_in_timm, own_model
from senet_transfer.weights.hub.timm_networks import PREFIX as TIMM_PREFIX
from senet_transfer.weights.hub.timm_networks import is_timm
from senet_transfer.weights.load import LoadReport, load_source
from senet_transfer.weights.mapping.source import Source, examine, with_stated

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode.

    Attributes:
        model: The model, on the device specified in the config.
        cfg: The model's config.
        family: The weight file's family (the project whose tensor names it uses). Empty if the
            weights are random.
    """

    model: nn.Module
    cfg: CfgNode
    family: str = ""

    @property
    def preprocessing(self) -> Preprocessing:
        """Image format, size and normalisation that the model expects."""
        return preprocessing_of(self.cfg)

    @property
    def classes(self) -> list[str]:
        """Class names, or an empty list if they are unknown.

        The weight files of published classifiers don't contain class names. For these files, this
        package provides the names.
        """
        names = list(self.cfg.DATASETS.CLASSES)
        if names or not is_classification(self.cfg):
            return names
        return published_classes(self.family, self.cfg.MODEL.CLASSIFIER.NUM_CLASSES)


@dataclass(frozen=True)
class ModelSource:
    """Description of a model that has not been built yet.

    Attributes:
        cfg: The config. ``MODEL.WEIGHTS`` is the weight file.
        source: The contents of the weight file, or of the checkpoint to load instead of it. None if
            the file has not been read yet.
        config_file: The config file that was read. Empty for a model without a config file.
    """

    cfg: CfgNode
    source: Source | None = None
    config_file: str = ""

    def examined(self) -> "ModelSource":
        """Return a copy of this model source with the weight file's contents and class names.

        Raises:
            UserError: If the weight file can't be read.
        """
        source = _with_stated(self.cfg, self.source) or examine_config_weights(self.cfg)
        if source is None:
            return self
        cfg = self.cfg.clone()
        apply_file_classes(cfg, source)
        return replace(self, cfg=cfg, source=source)

    def build(self, device: str = "", *, backbone_only: bool = False) -> LoadedModel:
        """Build the model, and load all weights from its weight file.

        The stride placement, stem pooling and preprocessing are those that the weights were trained
        with.

        Args:
            device: The device, such as "cpu" or "cuda:1". If empty, ``MODEL.DEVICE`` is used. If
                there are no GPUs, the model is built on the CPU.
            backbone_only: If True, the weight file may lack the final linear layer, or contain one
                for a different number of classes. The model's linear layer is then randomly
                initialised.

        Raises:
            UserError: If the weight file can't be read or does not match the model (including the
                number of classes), or if the device does not exist.
        """
        found = self.examined()
        cfg, source = found.cfg.clone(), found.source
        cfg.defrost()
        cfg.MODEL.DEVICE = device or cfg.MODEL.DEVICE
        use_available_device(cfg, logger)
        _check_class_count(cfg, found.config_file)
        check_input(cfg)
        if source is None:
            return LoadedModel(set_memory_format(cfg, build_model(cfg)).eval(), cfg)
        apply_file_geometry(cfg, source)
        with weights_follow():
            model = set_memory_format(cfg, build_model(cfg))
        report = load_source(model, source, exact=not backbone_only)
        _check_backbone(report)
        return LoadedModel(model.eval(), cfg, source.family.name)


def _check_backbone(report: LoadReport) -> None:
    """Raise a UserError if weights are missing for any layer except the final linear layer."""
    random = {k: why for k, why in report.initialised.items() if not k.startswith("linear.")}
    if random:
        raise UserError(
            f"{report.path} contains no weights for {len(random)} tensors of the model: "
            f"{first_of(list(random), 3)} ({next(iter(random.values()))}). Use weights for this "
            "network, or build the network to which the weights in the file belong."
        )


def _check_class_count(cfg: CfgNode, config_file: str) -> None:
    """Raise a UserError if a classifier's class names and outputs differ in number."""
    names, count = len(cfg.DATASETS.CLASSES), cfg.MODEL.CLASSIFIER.NUM_CLASSES
    if is_classification(cfg) and names and names != count:
        raise UserError(
            f"In {config_file or 'the config'}, DATASETS.CLASSES contains {names} names, but "
            f"MODEL.CLASSIFIER.NUM_CLASSES is {count}; expected one name per output of the model. "
            "Use the config.yaml that training wrote next to the weights, or correct one of the "
            "keys."
        )


def find_model(
    model: str = "",
    config_file: str = "",
    weights: str = "",
    *,
    family: str = "",
    options: Sequence[str] = (),
) -> ModelSource:
    """Find the config and the weights of a model.

    Args:
        model: A model name, as returned by :func:`senet_transfer.list_models`. The model is the
            classifier that ``create_classifier`` builds.
        config_file: A config file, as an alternative to ``model``.
        weights: A weight file, whose stride placement and stem pooling override the config. If
            empty, ``MODEL.WEIGHTS`` is used. If neither ``model`` nor ``config_file`` is given, the
            model is specified by the ``config.yaml`` next to the weight file or, without one, by
            the weight file's metadata.
        family: The family of ``weights``, if its tensor names match several families.
        options: Alternating keys and values that override the config.

    Raises:
        UserError: If the arguments specify no model or two models, or if a file is missing or
            invalid.
    """
    if model and config_file:
        raise UserError(
            "Both --model and --config-file are set, but only one of them is allowed. Remove one."
        )
    if not model:
        config_file = config_file or config_next_to(weights)
    stated = _weight_options(options)
    family = family or stated.MODEL.WEIGHTS_FAMILY
    if config_file:
        cfg, source = load_config(config_file, list(options)), None
    else:
        cfg, source = _named(model, weights, family, config_choice(stated))
        merge_options(cfg, list(options))
    if weights:
        if family or weights != cfg.MODEL.WEIGHTS:
            # The family in the config applies to the initial weights of the training run.
            cfg.MODEL.WEIGHTS_FAMILY = family
        if weights != cfg.MODEL.WEIGHTS:
            for key in ("WEIGHTS_PREFIX", "WEIGHTS_EMA", "WEIGHTS_HEAD"):
                cfg.MODEL[key] = stated.MODEL[key]
        cfg.MODEL.WEIGHTS = weights
    return ModelSource(cfg, source, config_file)


def _with_stated(cfg: CfgNode, source: Source | None) -> Source | None:
    """Return ``source`` with the preprocessing and layer options that the user specified.

    If ``source`` is None, None is returned.
    """
    return source and with_stated(source, stated_values(cfg))


def _weight_options(options: Sequence[str]) -> CfgNode:
    """Return the default config, with only the given ``MODEL.WEIGHTS_*`` options applied."""
    cfg = get_senet_config()
    pairs = zip(options[::2], options[1::2], strict=False)
    found = [pair for pair in pairs if pair[0].startswith("MODEL.WEIGHTS_")]
    merge_options(cfg, [word for pair in found for word in pair])
    return cfg


def model_config(
    model: str = "", config_file: str = "", weights: str = "", options: Sequence[str] = ()
) -> CfgNode:
    """Return a model's config for complexity analysis.

    For the arguments, see :func:`find_model`. The file in ``MODEL.WEIGHTS`` is not read.
    """
    found = find_model(model, config_file, weights, options=options)
    if weights:
        apply_file_geometry(found.cfg, _with_stated(found.cfg, found.source))
    return found.cfg


def build_to_count(cfg: CfgNode) -> nn.Module:
    """Build a model for complexity analysis, on the CPU and with all weights set to zero."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    with built_empty(), weights_follow():
        model = build_model(cfg)
    return fill_empty(model).eval()


def _timm_network(path: str) -> str:
    """Return the name of the timm network in the ``config.json`` next to a weight file.

    Returns:
        A name such as "timm/regnety_002". Empty if this project implements the network, or if there
        is no such file.
    """
    stated = read_timm_config(Path(path))
    if stated is None or own_model(stated.architecture.removeprefix("legacy_")) in list_models():
        return ""
    return TIMM_PREFIX + stated.architecture


def _check_mode(name: str, mode: str) -> None:
    if mode not in EVAL_MODES:
        raise UserError(
            f"{name} uses the evaluation mode {mode}; expected one of: {', '.join(EVAL_MODES)}. "
            "Use another network, or a config that specifies how images are resized."
        )


def _named(name: str, weights: str, family: str, choice: Choice) -> tuple[CfgNode, Source | None]:
    """Build the config of a classifier from a model name, a weight file or both.

    Returns:
        The config, and the contents of the weight file or None if no file is specified.
    """
    if name:
        model_entry(name)  # Reject an unknown name before reading a large file.
    source = None
    if not name and only_in_timm(weights):
        name = weights
    if is_timm(name):
        choice["network"] = name
    if weights:
        path, found = local_weights(weights, family or None)
        if not name and (network := _timm_network(path)):
            choice["network"] = network
        source = examine(path, found, **choice)
    name = name or (source.model_name if source else "")
    if not name:
        raise UserError(
            "No model is specified. Pass --model NAME (see senet_transfer.list_models()), "
            "--config-file, or --weights with a checkpoint that contains a model description."
        )
    preprocessing = (source.preprocessing if source else None) or model_entry(name).preprocessing
    _check_mode(name, preprocessing.mode)
    cfg = get_senet_config()
    cfg.MODEL.META_ARCHITECTURE = META_ARCHITECTURE
    cfg.MODEL.BACKBONE.NAME = "build_senet_backbone"
    cfg.MODEL.BACKBONE.ARCH = name
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.INPUT.FORMAT = preprocessing.format
    cfg.INPUT.CHANNELS = channels_of(preprocessing.format)
    cfg.MODEL.PIXEL_MEAN = list(preprocessing.mean)
    cfg.MODEL.PIXEL_STD = list(preprocessing.std)
    cfg.INPUT.CLASSIFICATION.TEST_RESIZE = preprocessing.resize
    cfg.INPUT.CLASSIFICATION.TEST_CROP = preprocessing.crop
    cfg.INPUT.CLASSIFICATION.INTERPOLATION = preprocessing.interpolation
    cfg.INPUT.CLASSIFICATION.TEST_MODE = preprocessing.mode
    cfg.INPUT.VALUE_RANGE = preprocessing.value_range
    cfg.INPUT.EXIF = "apply" if preprocessing.upright else "auto"
    if preprocessing.resize == SIDE:
        cfg.INPUT.CLASSIFICATION.AUGMENT = "pad_crop"  # Use the standard augmentation for CIFAR.
    if source and source.num_classes:
        cfg.MODEL.CLASSIFIER.NUM_CLASSES = source.num_classes
    for option, value in (source.options() if source else {}).items():
        cfg.merge_from_list([OPTION_KEYS[option], value])
    return cfg, source
