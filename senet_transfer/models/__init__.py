"""Backbones and classifiers, built by name or from configs.

Importing this package registers all models in the model registry and with Detectron2.
"""

from senet_transfer.layers.rotated_boxes import define_missing_operators
from senet_transfer.models import backbones, timm_backbone  # noqa: F401
from senet_transfer.models.classifier import Classifier, create_classifier
from senet_transfer.models.image_classifier import ImageClassifier
from senet_transfer.models.registry import create_backbone, list_models

__all__ = [
    "Classifier",
    "ImageClassifier",
    "create_backbone",
    "create_classifier",
    "list_models",
]

define_missing_operators()
