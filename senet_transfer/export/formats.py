"""Export of backbones and classifiers to ONNX, torch.export, AOTInductor or TorchScript."""

import copy
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from senet_transfer.data.images.decode import AS_STORED, Reading
from senet_transfer.errors import UserError
from senet_transfer.export.deploy import deploy
from senet_transfer.export.onnx_file import open_session, require_onnx, write_onnx
from senet_transfer.preprocessing import Preprocessing, channels_of, normalise
from senet_transfer.utils.atomic_io import atomic_path
from senet_transfer.utils.private_api import compile_program, open_compiled

FORMATS = {
    "onnx": ".onnx",
    "torch_export": ".pt2",
    "torchscript": ".ts",
    # A torch.export program compiled by AOTInductor for this machine's processor.
    "aot_inductor": ".pt2",
}

# The fields of Preprocessing in the metadata's "preprocessing". Other fields have separate entries.
_STORED = ("format", "mean", "std", "resize", "crop", "interpolation")

# Relative to the largest output. The outputs differ because float32 rounding depends on the order
# of operations.
TOLERANCE = 1e-3


class ImageModel(nn.Module):
    """Wrapper that normalises RGB images (0 to 255) and passes them to a backbone or classifier."""

    def __init__(self, network: nn.Module, preprocessing: Preprocessing):
        """
        Args:
            network: The network. It takes normalised images and returns a tensor or a dict of
                tensors.
            preprocessing: The channel order, mean and std that the network expects.
        """
        super().__init__()
        self.network = network
        self.format = preprocessing.format
        mean, std = preprocessing.channel_values()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the logits, or the feature maps from high to low resolution, as a tuple.

        Args:
            images: RGB images ``(N, 3, H, W)`` with values from 0 to 255. For a multispectral
                format such as "C5" (five channels), images ``(N, 5, H, W)``.
        """
        found = self.network(normalise(images, self.mean, self.std, self.format))
        return tuple(found.values()) if isinstance(found, dict) else (found,)


def export_network(
    network: nn.Module,
    path: str | Path,
    *,
    form: str,
    preprocessing: Preprocessing,
    size: tuple[int, int],
    classes: Sequence[str] = (),
    mode: str = "short_side",
    reading: Reading = AS_STORED,
) -> float:
    """Export a network with folded batch norms, and check the exported file's outputs.

    The batch size is dynamic. The height and width are fixed.

    Args:
        network: A classifier that returns logits, or a backbone that returns a dict of feature
            maps. It takes normalised images.
        path: The file to write.
        form: A key of :data:`FORMATS`.
        preprocessing: The preprocessing that the network expects. The normalisation becomes part
            of the exported network, and all settings are written to the file's metadata.
        size: The image height and width in pixels.
        classes: The class names, for the metadata.
        mode: The evaluation mode, for the metadata; see
            :class:`~senet_transfer.data.images.transforms.EvalTransform`. For a mode with several
            crops, the code that runs the exported file must average the logits of the crops.
        reading: The value range and EXIF setting for decoding images, for the metadata.

    Returns:
        The maximum difference from the eager network's outputs, relative to the largest output.

    Raises:
        UserError: If the format is unknown, if a required package is missing, or if the exported
            file's outputs differ from the network's outputs.
    """
    if form not in FORMATS:
        raise UserError(f"The format is {form!r}; expected one of: {', '.join(FORMATS)}.")
    names = ["logits"]
    # Copy the network, so the original's device and mode do not change.
    network = copy.deepcopy(network).cpu().eval()
    with torch.no_grad():
        found = network(torch.zeros(1, len(preprocessing.mean), *size))
    if isinstance(found, dict):
        names = list(found)
    model = ImageModel(deploy(network), preprocessing).eval()
    eager = ImageModel(network, preprocessing).eval()
    channels = channels_of(preprocessing.format) or 3
    example = 255 * torch.rand(2, channels, *size)
    metadata = {
        "preprocessing": json.dumps({key: getattr(preprocessing, key) for key in _STORED}),
        "classes": json.dumps(list(classes)),
        "mode": json.dumps(mode),
        "size": json.dumps(size),
        "value_range": json.dumps(reading.value_range),
        "upright": json.dumps(reading.upright),
        "task": json.dumps("classification" if names == ["logits"] else "features"),
    }
    write = {
        "onnx": _write_onnx,
        "torch_export": _write_exported,
        "torchscript": _write_traced,
        "aot_inductor": _write_compiled,
    }
    with written_if_valid(path) as partial, torch.no_grad(), quiet():
        run = write[form](model, example, partial, names, metadata)
        return _check(partial.name, eager, run, 255 * torch.rand(3, channels, *size))


@contextmanager
def written_if_valid(path: str | Path) -> Iterator[Path]:
    """Yield the path of a temporary file that atomically replaces ``path`` when the block ends.

    The block should write and check the file. If the block raises an exception, any existing file
    at ``path`` is left unchanged. The temporary file is in a temporary folder and has the same name
    as the final file, because some formats store or check the name.
    """
    path = Path(path)
    with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        partial = Path(folder, path.name)
        yield partial
        with atomic_path(path) as synced:
            os.replace(partial, synced)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings that the exporters raise about their own internals."""
    loggers = {logging.getLogger(name): 0 for name in ("torch.onnx", "torch.fx")}
    for logger in loggers:
        loggers[logger] = logger.level
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)


Run = Callable[[Tensor], Sequence[Tensor]]


def _write_onnx(
    model: nn.Module, example: Tensor, path: Path, names: list[str], metadata: dict[str, str]
) -> Run:
    require_onnx()
    program = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=names,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    write_onnx(program.model_proto, path, metadata)
    session = open_session(path)
    return lambda images: [
        torch.from_numpy(found) for found in session.run(None, {"images": images.numpy()})
    ]


def _write_exported(
    model: nn.Module, example: Tensor, path: Path, names: list[str], metadata: dict[str, str]
) -> Run:
    extra = {**metadata, "outputs": json.dumps(names)}
    torch.export.save(_program(model, example), path, extra_files=extra)
    return torch.export.load(path).module()


def _write_compiled(
    model: nn.Module, example: Tensor, path: Path, names: list[str], metadata: dict[str, str]
) -> Run:
    extra = {**metadata, "outputs": json.dumps(names)}
    try:
        compile_program(_program(model, example), str(path), extra)
    except FileNotFoundError as error:
        raise UserError(
            f"{path.name} can't be compiled without a C++ compiler. Install one, such as g++, or "
            "set the environment variable CXX to its path."
        ) from error
    return open_compiled(str(path))[0]


def _program(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (example,), dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # Stack traces contain this machine's paths.
    return program


def _write_traced(
    model: nn.Module, example: Tensor, path: Path, names: list[str], metadata: dict[str, str]
) -> Run:
    traced = torch.jit.trace(model, example, check_trace=False)
    extra = {**metadata, "outputs": json.dumps(names)}
    torch.jit.save(traced, str(path), _extra_files=extra)
    return torch.jit.load(str(path))


def _check(name: str, eager: nn.Module, run: Run, images: Tensor) -> float:
    expected, found = eager(images), run(images)
    worst = max(
        ((a - b).abs().max() / a.abs().max().clamp(min=1e-30)).item()
        for a, b in zip(expected, found, strict=True)
    )
    if not worst <= TOLERANCE:
        raise UserError(
            f"{name} does not give the same outputs as the network: the largest difference is "
            f"{worst:.1e} times the largest output; expected at most {TOLERANCE:.0e}. Use a "
            "different format."
        )
    return worst
