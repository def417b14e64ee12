"""Lossless rotation of images and annotations by multiples of 90 degrees.

Detectron2's `RandomRotation` does not support images with one channel. It also uses OpenCV, which
may hang in forked worker processes, because `fork` does not copy OpenCV's threads.
"""

import numpy as np
from detectron2.data import transforms as T


class RightAngleRotation(T.Transform):
    """Counter-clockwise rotation by a multiple of 90 degrees.

    Attributes:
        turns: Number of rotations by 90 degrees, 0 to 3.
        height: Height of the image before the rotation, in pixels.
        width: Width of the image before the rotation, in pixels.
    """

    def __init__(self, turns: int, height: int, width: int):
        super().__init__()
        self.turns, self.height, self.width = turns, height, width

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Rotate an image of shape `(H, W)` or `(H, W, C)`."""
        return np.rot90(img, self.turns)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Rotate points `(N, 2)`, given as x and y in pixels."""
        x, y = coords[:, 0], coords[:, 1]
        turned = [
            (x, y),
            (y, self.width - x),
            (self.width - x, self.height - y),
            (self.height - y, x),
        ]
        return np.stack(turned[self.turns], axis=1)

    def apply_rotated_box(self, boxes: np.ndarray) -> np.ndarray:
        """Rotate boxes `(N, 5)`, given as centre x and y, width, height and angle in degrees.

        Positive angles are counter-clockwise.
        """
        return np.concatenate(
            [self.apply_coords(boxes[:, :2]), boxes[:, 2:4], boxes[:, 4:] + 90 * self.turns], axis=1
        )

    def inverse(self) -> T.Transform:
        """Return the inverse rotation."""
        height, width = (self.height, self.width)[:: -1 if self.turns % 2 else 1]
        return RightAngleRotation(-self.turns % 4, height, width)


class RandomRightAngles(T.Augmentation):
    """Random rotation by 0, 90, 180 or 270 degrees, each with probability 1/4."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """Sample the angle, and return the transform."""
        return RightAngleRotation(int(np.random.randint(4)), *image.shape[:2])


def _flip_rotated_boxes(transform: T.VFlipTransform, boxes: np.ndarray) -> np.ndarray:
    boxes = boxes.copy()
    boxes[:, 1] = transform.height - boxes[:, 1]
    boxes[:, 4] = -boxes[:, 4]
    return boxes


# Detectron2 itself supports rotated boxes only for horizontal flips and resizing.
T.VFlipTransform.register_type("rotated_box", _flip_rotated_boxes)
T.BlendTransform.register_type("rotated_box", lambda transform, boxes: boxes)
