"""Numerical settings of a run: precision, memory format and determinism.

Some keys accept "auto". On a GPU, "auto" enables the settings that speed up training; on a CPU, it
disables them. When a run starts, "auto" is replaced with True or False and the new value is saved,
so a resumed run has the same settings.
"""

import os

import torch
from detectron2.config import CfgNode
from torch import nn

from senet_transfer.config import AUTO_KEYS, config_value, is_classification, set_config_value


def resolve_auto(cfg: CfgNode, before: CfgNode | None = None) -> None:
    """Replace each "auto" value in the config with the setting for the device, in place.

    Args:
        cfg: The config. The device in ``MODEL.DEVICE`` must be available.
        before: The saved config of the run to resume, which contains the values to use. None for a
            new run.
    """
    on_gpu = cfg.MODEL.DEVICE.startswith("cuda")
    choices = {
        "SOLVER.AMP.ENABLED": on_gpu and torch.cuda.is_bf16_supported(including_emulation=False),
        "SOLVER.TF32": on_gpu,
        "MODEL.CHANNELS_LAST": on_gpu,
        "MODEL.CLASSIFIER.CHANNELS_LAST": on_gpu,
        # A detector's images vary in shape, and cuDNN would benchmark its kernels for each shape.
        "CUDNN_BENCHMARK": on_gpu and is_classification(cfg) and not cfg.DETERMINISTIC,
    }
    chooses_type = cfg.SOLVER.AMP.ENABLED == "auto" and not cfg.SOLVER.AMP.DTYPE
    for key, choice in choices.items():
        if config_value(cfg, key) == "auto":
            set_config_value(cfg, key, config_value(before, key) if before else choice)
    if chooses_type and cfg.SOLVER.AMP.ENABLED:
        # In contrast to float16, bfloat16 needs no gradient scaling.
        cfg.SOLVER.AMP.DTYPE = before.SOLVER.AMP.DTYPE if before else "bfloat16"


def settings(cfg: CfgNode) -> dict[str, object]:
    """Return a dictionary from config key to value for the settings that affect rounding."""
    keys = (*AUTO_KEYS, "SOLVER.AMP.DTYPE", "DETERMINISTIC")
    return {key: config_value(cfg, key) for key in keys}


def set_memory_format(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """Convert a detector's weights in place to the config's memory format; return the detector.

    A convolution whose weight is in the channels-last format returns a feature map in that format,
    so images don't have to be converted.
    """
    # Outside of runs, "auto" is not resolved, and the format is kept.
    if cfg.MODEL.CHANNELS_LAST is True and not is_classification(cfg):
        model.to(memory_format=torch.channels_last)
    return model


def apply_settings(cfg: CfgNode) -> None:
    """Set PyTorch's global options, such as TF32 and determinism, as specified in the config."""
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    if cfg.SOLVER.TF32 is not None:
        torch.backends.cuda.matmul.allow_tf32 = cfg.SOLVER.TF32
        torch.backends.cudnn.allow_tf32 = cfg.SOLVER.TF32
    # Runs on a CPU are deterministic anyway.
    if cfg.DETERMINISTIC and cfg.MODEL.DEVICE.startswith("cuda"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=True)
