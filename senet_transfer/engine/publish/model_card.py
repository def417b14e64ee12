"""Model cards: the README.md of a model on the Hugging Face Hub."""

import html
from collections.abc import Iterable, Sequence
from typing import Any

from detectron2.config import CfgNode

from senet_transfer import __version__
from senet_transfer.config import is_classification
from senet_transfer.config.architectures import OBJECTS, predicts
from senet_transfer.engine.results import metric_texts
from senet_transfer.models.build import backbone_name
from senet_transfer.utils.text import first_of, shown
from senet_transfer.weights.hub.repositories import PREFIX

_CLASSES = 100


def model_card(
    name: str,
    cfg: CfgNode,
    metadata: dict[str, Any],
    results: dict[str, Any],
    *,
    family: str,
    licence: str = "",
    data: Sequence[str] = (),
) -> str:
    """Return the text of a model card. It contains nothing that these arguments do not state.

    Args:
        name: The name of the repository, "owner/name".
        cfg: The model's config.
        metadata: The model's metadata; see :func:`senet_transfer.weights.save.model_metadata`.
        results: The results of the model's evaluation, as in ``results.json``; may be empty.
        family: The family of the model's weight file, one of ``FAMILIES``.
        licence: The licence of the weights; empty if it is not stated.
        data: The names of the training data; empty if they are not stated.
    """
    from huggingface_hub import ModelCardData

    header = ModelCardData(
        library_name="senet_transfer",
        license=licence or None,
        datasets=list(data) or None,
        pipeline_tag=_task(cfg),
        tags=["senet_transfer", "detectron2", "pytorch"],
    )
    evaluation = {key: value for key, value in results.items() if key != "training"}
    parts = [
        f"---\n{header.to_yaml()}\n---\n\n# {name.partition('/')[2]}",
        f"This model card was written by `senet push` (senet_transfer {__version__}).",
        _table(("property", "value"), _properties(cfg, metadata, family, data)),
        "## Use",
        "```python\nimport senet_transfer\n\n"
        f'predictor = senet_transfer.load("{PREFIX}{name}")\nprint(predictor("photo.jpg"))\n```',
        f"```sh\nsenet predict --weights {PREFIX}{name} --input photo.jpg\n```",
    ]
    if rows := list(metric_texts(evaluation).items()):
        tested = first_of((_escaped(data) for data in cfg.DATASETS.TEST), 4)
        parts += [
            "## Results",
            f"Evaluation data: {tested or 'unknown'}.",
            _table(("metric", "value"), rows),
        ]
    if classes := [*cfg.DATASETS.CLASSES, *_stuff(cfg)]:
        parts += ["## Classes", f"{first_of(map(_escaped, classes), _CLASSES)}."]
    return "\n\n".join(parts) + "\n"


def _task(cfg: CfgNode) -> str:
    """Return the Hub's name for the model's task."""
    if is_classification(cfg):
        return "image-classification"
    if predicts(cfg) == {OBJECTS} and cfg.MODEL.KEYPOINT_ON:
        return "keypoint-detection"
    if predicts(cfg) == {OBJECTS} and not cfg.MODEL.MASK_ON:
        return "object-detection"
    return "image-segmentation"


def _properties(
    cfg: CfgNode, metadata: dict[str, Any], family: str, data: Sequence[str]
) -> Iterable[tuple[str, str]]:
    image = metadata["preprocessing"]
    yield "model", f"{cfg.MODEL.META_ARCHITECTURE} with the backbone {backbone_name(cfg)}"
    if data:
        yield "training data", first_of(map(_escaped, data))
    if origin := metadata["source"]:
        label = "initial weights" if family == "senet_transfer" else "converted from"
        yield label, f"{_escaped(origin['file'])} (family {_escaped(origin['family'])})"
    mean, std = (", ".join(f"{value:g}" for value in image[key]) for key in ("mean", "std"))
    yield "input", f"{image['format']}, mean {mean}, std {std} (pixels from 0 to 255)"
    if is_classification(cfg):
        yield (
            "resize",
            f"shorter side {image['resize']} ({image['interpolation']}), crop {image['crop']}",
        )
    else:
        limits = f"shorter side {cfg.INPUT.MIN_SIZE_TEST}, at most {cfg.INPUT.MAX_SIZE_TEST}"
        yield "resize", limits


def _stuff(cfg: CfgNode) -> list[str]:
    return [name for name in cfg.DATASETS.STUFF_CLASSES if name not in cfg.DATASETS.CLASSES]


def _table(header: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"| {one} | {two} |" for one, two in (header, ("---", "---"), *rows))


def _escaped(text: str) -> str:
    """Escape a name for Markdown, in which it has no effect on the layout."""
    words = html.escape(shown(text, 200), quote=False)
    return "".join(f"\\{c}" if c in "\\`*_[]|#" else c for c in words)
