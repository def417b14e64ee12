"""Conversion of ONNX files to float16 or int8, and comparison with the float32 networks."""

import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnxruntime import InferenceSession
from onnxruntime.quantization import CalibrationDataReader, quant_pre_process, quantize_static
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel
from torch import Tensor

from senet_transfer.data.images.decode import BrokenImageError
from senet_transfer.data.images.file_types import is_image_name
from senet_transfer.data.images.listing import find_images
from senet_transfer.errors import UserError
from senet_transfer.export.onnx_file import open_session, write_onnx

# Number of images for calibrating the ranges of int8 activations.
_CALIBRATED = 512


@dataclass(frozen=True)
class CalibrationImages:
    """Folder of images for int8 calibration and for measuring the accuracy.

    Attributes:
        folder: The folder of images. Subfolders are included.
        transform: Function that converts an encoded image to the network's input, uint8
            ``(3, H, W)``, or to several crops, ``(crops, 3, H, W)``.
        classes: The class names. If every image is in a subfolder named after a class, the
            subfolders are used as labels.
    """

    folder: str
    transform: Callable[[bytes], Tensor]
    classes: Sequence[str] = ()

    def paths(self) -> list[Path]:
        """Return the sorted paths of all images in the folder.

        Raises:
            UserError: If the folder contains no images.
        """
        names = itertools.chain(*find_images(self.folder).values())
        found = sorted(Path(self.folder, name) for name in names if is_image_name(name))
        if not found:
            raise UserError(
                f"There are no images in the folder {self.folder}. Choose a folder that contains "
                "images, such as validation images."
            )
        return found

    def labels(self) -> np.ndarray | None:
        """Return the label of each image, or None if the subfolders are not named after classes."""
        label = {name: index for index, name in enumerate(self.classes)}
        names = [path.parent.relative_to(self.folder).as_posix() for path in self.paths()]
        return np.array([label[name] for name in names]) if label.keys() >= set(names) else None

    def batches(self, paths: Sequence[Path]) -> Iterator[np.ndarray]:
        """Yield the crops of each image, float32 ``(crops, 3, H, W)``."""
        for path in paths:
            try:
                image = self.transform(path.read_bytes()).numpy().astype(np.float32)
            except (OSError, BrokenImageError) as error:
                raise UserError(
                    f"{path} can't be read as an image: {error}. Remove it from {self.folder}."
                ) from error
            yield image.reshape(-1, *image.shape[-3:])


def convert_precision(path: str | Path, precision: str, images: CalibrationImages) -> str:
    """Convert a float32 network in an ONNX file to a lower precision, and compare the outputs.

    The network's inputs and outputs remain float32.

    Args:
        path: An ONNX file with a classifier or backbone. The file is replaced.
        precision: "float16", or "int8" for static quantisation of convolutions and linear layers
            with one scale per channel.
        images: The images for the comparison and for int8 calibration (activation ranges).

    Returns:
        Sentences that compare the outputs and, if the images have labels, the top-1 errors before
        and after the conversion.

    Raises:
        UserError: If there are no images, or if one of them can't be read.
    """
    paths = images.paths()
    with tempfile.TemporaryDirectory(dir=os.path.dirname(path) or ".") as folder:
        original, prepared, converted = (os.path.join(folder, f"{n}.onnx") for n in "abc")
        shutil.copyfile(path, original)
        model = onnx.load(original)
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        if precision == "float16":
            halved = OnnxModel(convert_float_to_float16(model, keep_io_types=True))
            halved.topological_sort()
            model = halved.model
        else:
            quant_pre_process(original, prepared)
            quantize_static(
                prepared,
                converted,
                _Reader(images.batches(paths[:: -(-len(paths) // _CALIBRATED)])),
                per_channel=True,
                op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            )
            model = onnx.load(converted)
        write_onnx(model, converted, metadata)
        before, after = open_session(original), open_session(converted)
        compared = _compare(before, after, images, precision)
        os.replace(converted, path)
    return compared


class _Reader(CalibrationDataReader):
    def __init__(self, batches: Iterator[np.ndarray]):
        self.batches = batches

    def get_next(self) -> dict[str, np.ndarray] | None:
        images = next(self.batches, None)
        return None if images is None else {"images": images}


def _compare(
    before: InferenceSession, after: InferenceSession, images: CalibrationImages, precision: str
) -> str:
    """Compare the outputs of the network before and after the conversion, and describe the result.

    For a classifier, the description also contains the share of equal predicted classes and, if the
    images have labels, the top-1 errors.
    """
    squares, differences, classes = 0.0, 0.0, []
    for batch in images.batches(images.paths()):
        pair = [session.run(None, {"images": batch}) for session in (before, after)]
        for expected, found in zip(*pair, strict=True):
            squares += float((expected**2).sum())
            differences += float(((found - expected) ** 2).sum())
        classes.append([outputs[0].mean(0).argmax() for outputs in pair])
    said = (
        f"{precision} compared with float32 on {len(classes)} images in {images.folder}: the root "
        f"mean square difference of the outputs is {(differences / squares) ** 0.5:.2%}"
    )
    if [output.name for output in before.get_outputs()] != ["logits"]:
        return f"{said}."
    predicted = np.array(classes)
    same = (predicted[:, 0] == predicted[:, 1]).mean()
    said += f", and {same:.1%} of the predicted classes are the same."
    labels = images.labels()
    if labels is not None:
        errors = (predicted != labels[:, None]).mean(0)
        said += f" The top-1 error is {errors[0]:.2%} before and {errors[1]:.2%} after."
    return said
