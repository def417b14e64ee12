"""Checks of several models whose predictions are combined."""

from collections.abc import Sequence

from senet_transfer.config import is_classification
from senet_transfer.engine.model_from import ModelSource
from senet_transfer.errors import UserError


def check_same_classes(sources: Sequence[ModelSource]) -> None:
    """Check that the outputs of several models have the same classes in the same order.

    Args:
        sources: Sources after :meth:`~.model_from.ModelSource.examined`.

    Raises:
        UserError: If the number, the names or the order of the classes differ.
    """
    first = sources[0]
    for other in sources[1:]:
        files = f"{first.cfg.MODEL.WEIGHTS} and {other.cfg.MODEL.WEIGHTS}"
        counts = _class_count(first), _class_count(other)
        if counts[0] != counts[1]:
            raise UserError(
                f"{files} have {counts[0]} and {counts[1]} classes; expected the same classes. "
                "Combine only models that were trained on the same data."
            )
        names = list(first.cfg.DATASETS.CLASSES), list(other.cfg.DATASETS.CLASSES)
        if not all(names) or names[0] == names[1]:
            continue
        pairs = enumerate(zip(*names, strict=False))
        index = next((i for i, pair in pairs if pair[0] != pair[1]), 0)
        problem = "order of the classes" if set(names[0]) == set(names[1]) else "classes"
        raise UserError(
            f"The {problem} of {files} differ: class {index} is {names[0][index]} and "
            f"{names[1][index]}. Combine only models that were trained on the same classes in the "
            "same order."
        )


def _class_count(found: ModelSource) -> int:
    if not is_classification(found.cfg):
        return len(found.cfg.DATASETS.CLASSES)
    return (found.source and found.source.num_classes) or found.cfg.MODEL.CLASSIFIER.NUM_CLASSES
