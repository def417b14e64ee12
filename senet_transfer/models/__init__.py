"""Image classification on the trunks."""

from senet_transfer.models.classifier import Classifier, create_classifier
from senet_transfer.models.image_classifier import ImageClassifier

__all__ = ["Classifier", "ImageClassifier", "create_classifier"]
