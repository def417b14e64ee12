"""Copy-paste augmentation (Ghiasi et al. 2021, "Simple copy-paste is a strong data augmentation").

The source and target images are augmented before pasting, as in the paper. Objects keep their
position relative to the top left corner of the image, and are clipped at the image border. The
edges of their masks are not blended, because the paper reports similar results without blending.
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
    are drawn from the global random generators of NumPy and PyTorch.
    """

    def __init__(self, images: MapDataset, probability: float):
        """
        Args:
            images: Dataset of the dataset mapper's outputs, with masks. An element may also be a
                UserError, if the mapper raised this error for the image.
            probability: Probability of pasting objects onto an image.
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
    """Paste objects of a source image onto a target image, each with probability 0.5.

    Covered pixels are removed from the masks of the target's objects, and completely covered
    objects are removed. If a mask changes, the object's box is recomputed from the new mask.

    Args:
        target: The dataset mapper's output for the target image, with masks; not modified.
        source: The dataset mapper's output for the source image, which may have a different size.

    Returns:
        The target image and its objects, with the pasted objects added.
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
    """Remove invisible pixels from the objects' masks, and fit the boxes to the changed masks.

    Objects that become invisible are removed. ``visible`` is a bool mask `(H, W)`.
    """
    masks = _bit_masks(instances)
    seen = masks & visible
    changed = (seen != masks).flatten(1).any(1)
    fitted = BitMasks(seen).get_bounding_boxes().tensor
    boxes = torch.where(changed[:, None], fitted, instances.gt_boxes.tensor)
    fields = {**instances.get_fields(), "gt_boxes": Boxes(boxes), "gt_masks": BitMasks(seen)}
    found = Instances(instances.image_size, **fields)
    return found[~changed | seen.flatten(1).any(1)]


def _bit_masks(instances: Instances) -> Tensor:
    """Return the masks as a bool tensor `(N, H, W)`; all False without a `gt_masks` field."""
    if not instances.has("gt_masks"):
        return torch.zeros(len(instances), *instances.image_size, dtype=torch.bool)
    masks = instances.gt_masks
    if not isinstance(masks, BitMasks):
        masks = BitMasks.from_polygon_masks(masks, *instances.image_size)
    return masks.tensor
