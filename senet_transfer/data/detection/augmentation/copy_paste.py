"""Copy-paste augmentation (Ghiasi et al. 2021, "Simple copy-paste is a strong data augmentation").

The source and target images are augmented before pasting, as in the paper. Objects keep their
position relative to the top left corner of the image. Their borders are not smoothed, because the
paper found that smoothing makes no difference. Pasted objects are cut off at the image border.
"""

import numpy as np
import torch
from detectron2.data import MapDataset
from detectron2.structures import BitMasks, Boxes, Instances
from torch import Tensor
from torch.utils.data import Dataset

from senet_transfer.data.detection.mapper import UnreadableImageError
from senet_transfer.errors import UserError


class CopyPaste(Dataset):
    """Dataset wrapper for copy-paste augmentation.

    With a given probability, objects from a random image are pasted onto an image. Random numbers
    are drawn from the global generators of NumPy and PyTorch.
    """

    def __init__(self, images: MapDataset, probability: float):
        """
        Args:
            images: Dataset of images with masks, as returned by the mapper. If an image can't be
                mapped, the dataset returns a UserError instead of the image.
            probability: Probability that objects are pasted onto an image.
        """
        self.images, self.probability = images, probability

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict | UserError:
        target = self.images[index]
        if isinstance(target, UserError) or np.random.random() >= self.probability:
            return target
        source = self.images[np.random.randint(len(self))]
        if isinstance(source, UnreadableImageError):
            return target  # The error is reported when the source image itself is loaded.
        return source if isinstance(source, UserError) else paste(target, source)


def paste(target: dict, source: dict) -> dict:
    """Paste each object of one image onto another image with probability 0.5.

    Covered pixels are removed from the masks of the target's objects. An object that is covered
    completely is removed. The box of an object whose mask has changed is fitted to the new mask.

    Args:
        target: Image with masks, as returned by the mapper. It is not changed.
        source: Image of any size with the objects to paste, as returned by the mapper.

    Returns:
        The target with the pasted objects.
    """
    objects = source["instances"]
    objects = objects[torch.rand(len(objects)) < 0.5]
    if not len(objects):
        return target
    size = target["instances"].image_size
    height, width = (min(sides) for sides in zip(size, objects.image_size, strict=True))
    inside = torch.zeros(objects.image_size, dtype=torch.bool)
    inside[:height, :width] = True
    pasted = _visible(objects, inside)
    masks = torch.zeros(len(pasted), *size, dtype=torch.bool)
    masks[:, :height, :width] = pasted.gt_masks.tensor[:, :height, :width]
    pasted = Instances(size, **{**pasted.get_fields(), "gt_masks": BitMasks(masks)})
    covered = masks.any(0)
    image = target["image"].clone()
    region = (slice(None), slice(height), slice(width))
    image[region] = torch.where(covered[region[1:]], source["image"][region], image[region])
    together = Instances.cat([_visible(target["instances"], ~covered), pasted])
    return {**target, "image": image, "instances": together}


def _visible(instances: Instances, visible: Tensor) -> Instances:
    """Limit masks to the visible pixels `(H, W)`, and remove objects without visible pixels."""
    masks = _bit_masks(instances)
    seen = masks & visible
    changed = (seen != masks).flatten(1).any(1)
    fitted = BitMasks(seen).get_bounding_boxes().tensor
    boxes = torch.where(changed[:, None], fitted, instances.gt_boxes.tensor)
    fields = {**instances.get_fields(), "gt_boxes": Boxes(boxes), "gt_masks": BitMasks(seen)}
    found = Instances(instances.image_size, **fields)
    return found[~changed | seen.flatten(1).any(1)]


def _bit_masks(instances: Instances) -> Tensor:
    """Return the masks as bool `(N, H, W)`, even for an image without the `gt_masks` field."""
    if not instances.has("gt_masks"):
        return torch.zeros(len(instances), *instances.image_size, dtype=torch.bool)
    masks = instances.gt_masks
    if not isinstance(masks, BitMasks):
        masks = BitMasks.from_polygon_masks(masks, *instances.image_size)
    return masks.tensor
