"""Conversion of weight files, with an optional check that the outputs stay the same."""

import logging
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import torch
from torch import nn

from senet_transfer.config.load import load_config
from senet_transfer.errors import UserError
from senet_transfer.export.detectron2_config import detectron2_config
from senet_transfer.models.classifier import build_classifier
from senet_transfer.models.registry import build_backbone, list_models, model_entry
from senet_transfer.utils.text import first_of
from senet_transfer.weights.choice import Choice
from senet_transfer.weights.convert import DETECTRON2, family_of, target_for, write_converted
from senet_transfer.weights.families.architecture import Architecture
from senet_transfer.weights.file_geometry import apply_file_geometry, local_weights
from senet_transfer.weights.load import load_source
from senet_transfer.weights.mapping.match import check_match, match
from senet_transfer.weights.mapping.source import Source, examine
from senet_transfer.weights.mapping.target import target_of
from senet_transfer.weights.save import written_whole

logger = logging.getLogger(__name__)

# Relative to the largest output. Equal weights should give equal outputs, regardless of the file
# format.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class FileDifference:
    """Difference between two weight files.

    Attributes:
        of: Name of the compared values: "logits" or a feature map such as "res5" (network outputs
            for random images), or "tensors" if the weights themselves are compared, as for
            detectors and unregistered models.
        absolute: Maximum absolute difference.
        relative: Maximum absolute difference divided by the maximum absolute value.
    """

    of: str
    absolute: float
    relative: float

    def __str__(self) -> str:
        return (
            f"largest difference in {self.of}: {self.absolute:.3g} "
            f"({self.relative:.3g} of the largest value)"
        )


def convert_file(
    weights: str,
    out: str | Path,
    *,
    to: str | None = None,
    family: str | None = None,
    force: bool = False,
    check: bool = False,
    backbone_only: bool = False,
    **choice: Unpack[Choice],
) -> FileDifference | None:
    """Convert a weight file from any supported project to the format of this or another project.

    If a detector from a training run is converted to Detectron2's format, a config with
    Detectron2's own keys is written next to ``out``, with the suffix ``.yaml``.

    Args:
        weights: The path of the file, or a name in the catalogue.
        out: The path of the new file. If ``to`` is None, the suffixes ``.pth`` and ``.safetensors``
            select this project's format, and ``.pkl`` selects Detectron2's format.
        to: The target format, one of ``senet_transfer.weights.convert.TARGETS``.
        family: The weight family of the file, such as "torchvision". Required only if several
            families use the same tensor names.
        force: If True, replace an existing file.
        check: If True, check that the network gives the same outputs with the original and with the
            converted weights, and write ``out`` only if the outputs are equal.
        backbone_only: If True, convert only the backbone of a classifier or detector.
        choice: Keyword arguments that select a network in the file: ``prefix``, ``ema`` and
            ``head``; see :func:`senet_transfer.load_weights`.

    Returns:
        The result of the comparison, or None if ``check`` is False.

    Raises:
        UserError: If the file can't be read or converted to the target format, or if ``check`` is
            True and the outputs differ.
    """
    out = Path(out)
    to = target_for(out, to)
    _check_new(out, force)
    path, family = local_weights(weights, family)
    logger.info("Reading %s (%s)", path, _size(path))
    source = examine(path, family, **choice)
    if backbone_only:
        source = source.backbone_only()
    _check_complete(source)
    logger.info("Detected as %s%s", source.detected_as, _network(source))
    config_out = out.with_suffix(".yaml")
    config = None
    if to == DETECTRON2 and source.detector:
        config = _config_for_detectron2(source, out)
        _check_new(config_out, force)
    if check:
        notes, comparison = _write_checked(source, out, to)
    else:
        notes, comparison = write_converted(source, out, to), None
    for note in notes:
        logger.info(note)
    logger.info("Wrote %s (%s) in the format of %s", out, _size(out), to)
    if config:
        with written_whole(config_out) as partial:
            partial.write_text(config)
        logger.info("Wrote %s, a config for unmodified Detectron2", config_out)
    return comparison


def _write_checked(source: Source, out: Path, to: str) -> tuple[list[str], FileDifference]:
    """Convert a weight file, and write ``out`` only if the network's outputs stay the same."""
    with tempfile.TemporaryDirectory() as folder:
        new = Path(folder, out.name)
        notes = write_converted(source, new, to)
        logger.info("Comparing the network outputs of the original and the converted weights")
        comparison = compare_files(source, examine(new, family_of(to)))
        if not comparison.relative <= TOLERANCE:
            raise UserError(
                f"The converted weights do not give the same outputs as {source.path}; "
                f"{comparison}. {out} was not written."
            )
        with written_whole(out) as partial:
            shutil.copyfile(new, partial)
    return notes, comparison


def _check_new(path: Path, force: bool) -> None:
    if path.exists() and not force:
        raise UserError(
            f"{path} already exists. Choose a different name, or replace it with --force."
        )


def _config_for_detectron2(source: Source, out: Path) -> str | None:
    """Return a detector's config for unmodified Detectron2, as YAML.

    Returns:
        The YAML text, or None if there is no ``config.yaml`` next to the weight file.
    """
    config_file = Path(source.path).with_name("config.yaml")
    if not config_file.is_file():
        logger.info(
            "No Detectron2 config is written, because there is no config.yaml next to %s.",
            source.path,
        )
        return None
    cfg = load_config(str(config_file))
    apply_file_geometry(cfg, source)
    return detectron2_config(cfg, str(out)).dump()


def _size(path: str | Path) -> str:
    return f"{Path(path).stat().st_size / 1e6:,.1f} MB"


def _network(source: Source) -> str:
    if source.architecture is None:
        return ""
    options = "".join(f", {name} {value}" for name, value in source.geometry.options().items())
    return f": {source.model_name}{options}"


def _registered(source: Source) -> Architecture | None:
    """Return the backbone architecture of a file, or None for detectors and unregistered models."""
    arch = source.architecture
    if arch is None or source.detector or source.model_name not in list_models():
        return None
    return arch


def _model(source: Source, architecture: Architecture) -> nn.Module:
    """Build the network in a weight file, with a classifier if the file contains one."""
    entry = model_entry(source.model_name)
    norm = "FrozenBN" if source.family.affine_norms else "BN"
    if architecture.classes:
        return build_classifier(entry, architecture.classes, source, norm=norm)
    return build_backbone(entry, source, norm=norm)


def _check_complete(source: Source) -> None:
    """Raise a UserError for missing or unexpected tensors in a registered model's file."""
    architecture = _registered(source)
    if architecture is not None:
        with torch.device("meta"):
            target = target_of(_model(source, architecture))
        check_match(match(source, target), source, target)


@torch.no_grad()
def compare_files(first: Source, second: Source) -> FileDifference:
    """Compare the outputs of the networks in two weight files for the same random images.

    If one of the networks is not a registered model, compare the weights instead.
    """
    known = [(source, arch) for source in (first, second) if (arch := _registered(source))]
    if len(known) < 2:
        return _difference("tensors", _comparable(first), _comparable(second))
    # Random images reveal differences in layer options even if all tensor shapes are equal.
    images = torch.randn(2, 3, 96, 160, generator=torch.Generator().manual_seed(0))
    outputs = []
    for source, architecture in known:
        model = _model(source, architecture)
        load_source(model, source)
        output = model.eval()(images)
        outputs.append(output if isinstance(output, dict) else {"logits": output})
    return _difference(next(iter(outputs[0])), *outputs)


def _comparable(source: Source) -> dict[str, torch.Tensor]:
    # Detectron2's files don't contain num_batches_tracked.
    return {k: v for k, v in source.tensors.items() if not k.endswith(".num_batches_tracked")}


def _difference(
    of: str, first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]
) -> FileDifference:
    if first.keys() != second.keys():
        only = first_of(sorted(first.keys() ^ second.keys()), 4)
        raise UserError(
            "The weight files can't be compared, because only one of them contains the tensors "
            f"{only}."
        )
    absolute = largest = 0.0
    for name, value in first.items():
        if value.numel():
            difference = (value.double() - second[name].double()).abs().max().item()
            # Once the difference is NaN, it remains NaN, so the caller's check fails.
            absolute = difference if not difference <= absolute else absolute
            largest = max(largest, value.double().abs().max().item())
    return FileDifference(of, absolute, absolute / largest if largest else absolute)
