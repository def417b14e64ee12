"""Loading of Caffe networks with OpenCV."""

from pathlib import Path

import cv2
import pytest


def opencv_network(prototxt: Path, caffemodel: Path) -> "cv2.dnn.Net":
    """Load a Caffe network, or skip the test if OpenCV has no Caffe importer."""
    if not hasattr(cv2.dnn, "readNetFromCaffe"):
        pytest.skip(f"OpenCV {cv2.__version__} has no Caffe importer; install OpenCV 4")
    return cv2.dnn.readNetFromCaffe(str(prototxt), str(caffemodel))
