"""Deployment: batch norm folding, and export to ONNX, torch.export, AOTInductor or TorchScript."""

from senet_transfer.export.deploy import deploy
from senet_transfer.export.detectors import export_detector
from senet_transfer.export.formats import FORMATS, ImageModel, export_network
from senet_transfer.export.onnx_detectors import export_detector_to_onnx

__all__ = [
    "FORMATS",
    "ImageModel",
    "deploy",
    "export_detector",
    "export_detector_to_onnx",
    "export_network",
]
