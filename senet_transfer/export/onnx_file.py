"""Functions that write and open ONNX files."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from google.protobuf.message import Message

from senet_transfer.errors import UserError

if TYPE_CHECKING:
    from onnx import ModelProto
    from onnxruntime import InferenceSession


def require_onnx() -> None:
    """Raise a UserError if a package that ONNX export requires is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"ONNX export requires the package {error.name}, which is not installed. Run pip "
            "install 'senet_transfer[export]'."
        ) from error


def write_onnx(model: "ModelProto", path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write an ONNX model with metadata to a file, and validate the file.

    The doc strings and metadata added by the exporters are removed first, because they contain
    stack traces with local paths.

    Args:
        model: The model. It is modified.
        path: The file to write.
        metadata: The metadata to store in the file.
    """
    import onnx

    _remove_notes(model)
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.save(model, str(path))
    onnx.checker.check_model(str(path), full_check=True)


def _remove_notes(message: Message) -> None:
    for field, value in message.ListFields():
        if field.name in ("doc_string", "metadata_props"):
            message.ClearField(field.name)
        elif field.message_type:
            for child in [value] if isinstance(value, Message) else value:
                _remove_notes(child)


def open_session(path: str | Path) -> "InferenceSession":
    """Open an ONNX file with ONNX Runtime on the CPU."""
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
