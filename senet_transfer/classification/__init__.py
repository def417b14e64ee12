"""Image classification on the trunks."""

from senet_transfer.classification.classifier import Classifier, create_classifier
from senet_transfer.classification.image_classifier import ImageClassifier

__all__ = ["Classifier", "ImageClassifier", "create_classifier"]
