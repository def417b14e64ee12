"""Why a pickle was refused, in words that say what to do."""

from pathlib import Path
from typing import NoReturn

from senet_transfer.errors import UserError

# Modules whose functions have no business in a file of weights: they act on the machine.
_SYSTEM = {"os", "posix", "nt", "sys", "subprocess", "pty", "socket", "shutil", "ctypes", "signal"}
_PYTHON = {
    "builtins",
    "__builtin__",
    "importlib",
    "runpy",
    "operator",
    "functools",
    "types",
    "code",
}
_FILES = {"io", "pathlib", "tempfile", "glob", "pickle", "marshal", "urllib", "webbrowser"}
_RUNS_CODE = _SYSTEM | _PYTHON | _FILES
_MODEL_CODE = ("torch.nn.", "torchvision.", "models.", "model.", "timm.", "pretrainedmodels.")


def refuse(path: Path, name: str) -> NoReturn:
    """Raises the error for a pickle that names the class or function ``name``."""
    start = f"{path}: refused, because loading it would call or create `{name}`"
    if name.split(".")[0] in _RUNS_CODE:
        raise UserError(
            f"{start}: code that runs on this machine. Weights hold tensors and plain containers "
            "only. Nothing was run. Do not load the file by other means; get the weights again, "
            "from their publisher."
        )
    if name.startswith(_MODEL_CODE):
        raise UserError(
            f"{start}: the file holds a whole model object instead of its tensors. Get the "
            "publisher's state_dict file; or, if you trust the file, load it where its code is "
            "installed and save `model.state_dict()`."
        )
    raise UserError(
        f"{start}, which is neither a tensor nor a plain container. If you trust the file, load it "
        "where that class is installed and save the model's tensors alone: "
        'torch.save({"state_dict": model.state_dict()}, "weights.pth").'
    )
