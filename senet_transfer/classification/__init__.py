"""Image classification on the trunks."""

from senet_transfer.classification.classifier import Classifier, create_classifier

__all__ = ["Classifier", "create_classifier"]
