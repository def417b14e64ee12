"""Benchmark ``inference``: eager, compiled and ONNX SE-ResNet-50, versus ResNet-50 and timm."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from benchmark.compare import Comparison, compare
from benchmark.networks import Options, trained
from benchmark.report import Row
from senet_transfer.export import deploy, export_network
from senet_transfer.models import create_classifier
from senet_transfer.preprocessing import Preprocessing
from senet_transfer.utils.private_api import inductor_freezing

if TYPE_CHECKING:
    import onnxruntime


def measure_inference(options: Options) -> Iterator[Row]:
    """Time inference of ResNet-50 and SE-ResNet-50: eager, compiled and (on a CPU) ONNX Runtime."""
    models, pairs = _models(options.device)
    for batch in (1, 8):
        images = torch.randn(batch, 3, 224, 224, device=options.device)
        ways = {name: inference(model, images) for name, model in models.items()}
        yield _compare(f"Inference, 224 px, batch {batch}, eager", ways, options, pairs)
    del models["SE deployed"]
    for batch in (1, 8):
        images = torch.randn(batch, 3, 224, 224, device=options.device)
        torch.compiler.reset()
        ways = {name: _compiled(model, images) for name, model in models.items()}
        yield _compare(
            f"Inference, 224 px, batch {batch}, deployed and compiled", ways, options, pairs
        )
        if options.device == "cpu":
            others = {
                "SE, compiled": ways["SE"],
                "SE, eager": inference(models["SE"], images),
            }
            yield _compare(
                f"Inference, 224 px, batch {batch}, ONNX Runtime",
                _in_onnx(models, batch) | others,
                options,
                pairs=[("SE, eager", "SE"), ("SE, compiled", "plain")],
            )


def _models(device: str) -> tuple[dict[str, nn.Module], list[tuple[str, str]]]:
    """Return the models by name, and the names of equivalent models from this project and timm.

    The list of name pairs is empty if timm is not installed.
    """
    gated = create_classifier("se_resnet50")
    models = {
        "plain": create_classifier("resnet50"),
        "plain again": create_classifier("resnet50"),
        "SE": gated,
        "SE deployed": deploy(gated),
    }
    pairs: list[tuple[str, str]] = []
    try:
        import timm
    except ImportError:  # timm is an optional package for development.
        pass
    else:
        # timm's legacy_seresnet50 has the same strides and pooling as the Caffe files.
        caffe = create_classifier("se_resnet50", stride_in_1x1=True, stem_pool="ceil")
        models["SE, Caffe's geometry"] = caffe
        models["timm seresnet50"] = timm.create_model("seresnet50")
        models["timm legacy_seresnet50"] = timm.create_model("legacy_seresnet50")
        pairs = [
            ("SE", "timm seresnet50"),
            ("SE, Caffe's geometry", "timm legacy_seresnet50"),
        ]
    return {name: trained(model, device).eval() for name, model in models.items()}, pairs


def _compiled(model: nn.Module, images: Tensor) -> Callable[[], None]:
    """Compile a model for the fastest inference: in channels_last, with the weights as constants.

    Users can set the environment variable ``TORCHINDUCTOR_FREEZING=1`` to compile the weights as
    constants.
    """
    last = torch.channels_last
    model = torch.compile(deploy(model).to(memory_format=last), dynamic=False)
    step = inference(model, images.to(memory_format=last))
    with inductor_freezing():
        step()
    return step


def _in_onnx(models: dict[str, nn.Module], batch: int) -> dict[str, Callable[[], object]]:
    images = {"images": torch.rand(batch, 3, 224, 224).numpy()}
    sessions = {name: _session(models[name]) for name in ("plain", "plain again", "SE")}
    return {name: partial(session.run, None, images) for name, session in sessions.items()}


def _compare(
    what: str,
    ways: Mapping[str, Callable[[], object]],
    options: Options,
    pairs: Sequence[tuple[str, str]] = (),
) -> Comparison:
    return compare(
        what,
        ways,
        baseline="plain",
        control="plain again",
        seconds=options.seconds,
        pairs=pairs,
        profile=options.profile,
    )


def inference(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """Return a function that runs a forward pass without gradients."""

    def step() -> None:
        with torch.inference_mode():
            model(x)

    return step


def _session(model: nn.Module) -> "onnxruntime.InferenceSession":
    """Export a model to ONNX, and create a session with the same number of threads as torch.

    Raises:
        UserError: If a package in the extra ``export`` is missing.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        preprocessing = Preprocessing()
        export_network(model, path, form="onnx", preprocessing=preprocessing, size=(224, 224))
        import onnxruntime  # Imported after the export, which reports a missing package.

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = torch.get_num_threads()
        return onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
