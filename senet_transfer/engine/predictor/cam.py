"""Class activation maps (Zhou et al. 2016) of classifiers with global average pooling."""

import io
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from senet_transfer.data.images.channels import as_rgb
from senet_transfer.engine.predictor.inputs import Photo
from senet_transfer.engine.predictor.predictor import ClassifierPredictor
from senet_transfer.errors import UserError
from senet_transfer.layers.squeeze_excitation import SqueezeExcitation
from senet_transfer.models.image_classifier import ImageClassifier


@dataclass(frozen=True, eq=False)
class ActivationMap:
    """Class activation map: the contribution of each position to the logit of a class.

    Attributes:
        view: The crop of the image that the classifier receives, uint8 RGB ``(H, W, 3)``.
        name: The class name.
        probability: The probability of the class.
        cam: The map ``(h, w)``. Its mean plus the bias of the class is the logit.
        plain: The map that would result if the last SE gate scaled all channels equally, by the
            mean of its values; None if the network has no SE blocks.
    """

    view: np.ndarray
    name: str
    probability: float
    cam: np.ndarray
    plain: np.ndarray | None

    @property
    def added(self) -> np.ndarray | None:
        """Change in the map that is due to the last SE gate: ``cam - plain``.

        None if the network has no SE blocks.
        """
        return None if self.plain is None else self.cam - self.plain

    def plot(self) -> Image.Image:
        """Return a figure that shows ``cam`` overlaid on the image.

        If the network has SE blocks, a second panel shows the effect of the last SE gate
        (``added``).
        """
        maps = [(self.cam, f"{self.name} {self.probability:.1%}")]
        if self.added is not None:
            maps.append((self.added, "added by the last SE gate"))
        figure = Figure(figsize=(4 * len(maps), 4.3), dpi=100, layout="tight")
        height, width = self.view.shape[:2]
        for index, (values, title) in enumerate(maps, start=1):
            axes = figure.add_subplot(1, len(maps), index)
            axes.imshow(self.view)
            largest = np.abs(values).max() or 1.0
            axes.imshow(values, cmap="coolwarm", vmin=-largest, vmax=largest, alpha=0.5,
                        interpolation="bicubic", extent=(0, width, height, 0))  # fmt: skip
            axes.set_title(title, parse_math=False)
            axes.set_axis_off()
        stored = io.BytesIO()
        figure.savefig(stored, format="png")
        return Image.open(stored).convert("RGB")


@torch.no_grad()
def class_activation_map(
    predictor: ClassifierPredictor, image: Any, label: int | None = None
) -> ActivationMap:
    """Return the class activation map of an image.

    Args:
        predictor: A predictor returned by :func:`senet_transfer.load`.
        image: An image; see :meth:`Predictor.__call__`. The central crop is used.
        label: The index of the class. If None, the most probable class is used.

    Raises:
        UserError: If the network has no global average pooling, or the model was loaded from an
            exported file.
    """
    model = predictor.run
    if not isinstance(model, ImageClassifier) or model.neck is not None:
        raise UserError(
            "Class activation maps require a classifier with global average pooling and a single "
            "linear layer, loaded from a checkpoint. Exported files, VGG-16 and detectors are not "
            "supported."
        )
    photo = replace(Photo.of(image), reading=predictor.reading)
    transform = predictor.transform
    if transform.mode == "ten_crop":
        transform = replace(transform, mode="short_side")
    if transform.reading.channels:
        view = transform.view_of_channels(photo.bands())
    else:
        view = transform.view(photo.pillow())
    images = model.normalise(view[None])
    features = model.backbone(images)[model.feature]
    probabilities = model.linear(features.mean((2, 3))).softmax(1)[0]
    label = int(probabilities.argmax()) if label is None else label

    def contributions(features: Tensor) -> np.ndarray:
        return torch.einsum("c,chw->hw", model.linear.weight[label], features[0]).cpu().numpy()

    gates = [module for module in model.modules() if isinstance(module, SqueezeExcitation)]
    plain = None
    if gates:
        with gates[-1].register_forward_hook(_scale_equally):
            plain = contributions(model.backbone(images)[model.feature])
    return ActivationMap(
        as_rgb(view.permute(1, 2, 0).numpy()),
        predictor.classes.things[label],
        float(probabilities[label]),
        contributions(features),
        plain,
    )


def _scale_equally(gate: SqueezeExcitation, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """Recompute an SE layer's output with its gate averaged over the channels (forward hook)."""
    x, shortcut, scale = (*inputs, None, 1.0)[:3]
    gated = scale * x * gate.gate(x).mean(1, keepdim=True)
    return gated if shortcut is None else gated + shortcut
