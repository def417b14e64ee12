"""Why a file was refused, in words that say what to do."""

import re
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


def shown(text: object, limit: int = 80) -> str:
    """What a file says, fit for a message: short, on one line, and no control characters."""
    words = "".join(c if c.isprintable() else " " for c in str(text)[: 4 * limit]).split()
    line = " ".join(words)
    return line if len(line) <= limit else line[: limit - 3] + "..."


def refuse(path: Path, name: str) -> NoReturn:
    """Raises the error for a pickle that names the class or function ``name``.

    Raises:
        UserError: the file asks for something that is not admitted.
        ValueError: the name is none, so that the file is damaged.
    """
    if not re.fullmatch(r"[\w.]{1,200}", name):
        raise ValueError(f"{shown(name)!r} where the name of a class is expected")
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
