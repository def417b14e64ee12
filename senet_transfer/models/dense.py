"""Dense evaluation: a classifier is applied to whole images as a fully convolutional network."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from senet_transfer.errors import UserError
from senet_transfer.models.image_classifier import ImageClassifier


class DenseClassifier(nn.Module):
    """Classifier whose logits are averaged over all positions of the last feature map.

    This class implements the dense evaluation in section 3.2 of Simonyan and Zisserman 2015. For a
    network with global average pooling, the mean of the logits over all positions equals the logits
    of the averaged features. SE blocks compute their gates from the whole image.
    """

    def __init__(self, model: ImageClassifier):
        """
        Args:
            model: The classifier.

        Raises:
            UserError: If the layers after the feature map can't be applied to larger feature maps.
        """
        super().__init__()
        self.model = model
        if model.neck is not None and not hasattr(model.neck, "side"):
            raise UserError(
                f"Dense evaluation does not support {type(model.neck).__name__}, which does not "
                "specify the side length of its input (attribute side). Evaluate crops instead."
            )

    @property
    def device(self) -> torch.device:
        """Return the device of the model."""
        return self.model.device

    @property
    def num_classes(self) -> int:
        """Return the number of classes."""
        return self.model.num_classes

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Return logits ``(N, num_classes)``, averaged over all scales of each image.

        Args:
            batch: A batch from the loader with ``image`` and ``shapes``, as returned by
                :func:`~senet_transfer.data.images.multi_scale.pack`.
        """
        shapes = [(row, shape) for row, views in enumerate(batch["shapes"]) for shape in views]
        pixels = batch["image"].split([c * h * w for _, (c, h, w) in shapes])
        groups = defaultdict(list)
        for (row, shape), view in zip(shapes, pixels, strict=True):
            groups[shape].append((row, view.view(shape)))
        total = torch.zeros(len(batch["shapes"]), self.num_classes, device=self.device)
        for group in groups.values():
            rows, views = zip(*group, strict=True)
            logits = self._classify(self.model.normalise(torch.stack(views)))
            total.index_add_(0, torch.tensor(rows, device=self.device), logits.float())
        return total / len(batch["shapes"][0])

    def _classify(self, images: Tensor) -> Tensor:
        neck = self.model.neck
        if neck is None:
            return self.model(images)
        features = self.model.backbone(images)[self.model.feature]
        side = neck.side
        if min(features.shape[-2:]) < side:
            height, width = images.shape[-2:]
            raise UserError(
                f"The feature map of an image of {width}x{height} pixels is smaller than "
                f"{side}x{side}, the input of the fully connected layers. Use larger --scales."
            )
        windows = features.unfold(2, side, 1).unfold(3, side, 1)
        count, _, rows, columns = windows.shape[:4]
        windows = windows.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
        logits = self.model.linear(neck(windows))
        return logits.unflatten(0, (count, rows * columns)).mean(1)
