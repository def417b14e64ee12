"""Writers of old file formats: Python 2 pickles and the checkpoint formats of early PyTorch."""

import argparse
import collections
import datetime
import decimal
import enum
import functools
import io
import operator
import os
import pathlib
import pickle
import signal
import struct
import tarfile
import types
import typing
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import omegaconf
import torch
import yacs.config


class Mode(enum.Enum):
    """Enum with members that a training script may save in a checkpoint."""

    TRAIN = "train"
    TEST = "test"


class Trainer:
    """Class that a training script may save in a checkpoint, with methods and a nested class."""

    class Mode(enum.Enum):
        """Enum that is defined inside a class."""

        TRAIN = "train"

    @staticmethod
    def schedule(step: int) -> int:
        """Return the learning rate factor for a step."""
        return step

    @classmethod
    def create(cls) -> "Trainer":
        """Return a new trainer."""
        return cls()


class EasyDict(dict):
    """Subclass of dict that a training script may save in a checkpoint."""


def _optimizer() -> torch.optim.Optimizer:
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return optimizer


# Functions that create objects like those that training scripts save next to a model.
NEXT_TO_A_MODEL: dict[str, Callable[[], Any]] = {
    "Namespace": lambda: argparse.Namespace(lr=0.1, out=pathlib.PosixPath("runs/1")),
    "PosixPath": lambda: pathlib.PosixPath("runs/1"),
    "PurePath": lambda: pathlib.PureWindowsPath("runs/1"),
    "datetime": datetime.datetime.now,
    "timezone": lambda: datetime.datetime.now(datetime.UTC),
    "timedelta": lambda: datetime.timedelta(seconds=3),
    "complex": lambda: 1 + 2j,
    "slice": lambda: slice(1, 2),
    "range": lambda: range(3),
    "float": lambda: float,
    "SimpleNamespace": lambda: types.SimpleNamespace(a=1),
    "partial": lambda: functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "Decimal": lambda: decimal.Decimal("1.5"),
    "UUID": lambda: uuid.UUID(int=3),
    "deque": lambda: collections.deque([1.0, 2.0], maxlen=20),
    "defaultdict": lambda: [collections.defaultdict(EasyDict, a=1), EasyDict()],
    "enum": lambda: [Mode.TRAIN, {Mode.TRAIN: 1, Mode.TEST: 2}],
    "dict subclass": lambda: EasyDict(a=1, b=EasyDict(c=[1])),
    "generic": lambda: typing.Dict[str, int],  # noqa: UP006 - list[int] is another class
    "CfgNode": lambda: yacs.config.CfgNode({"MODEL": {"NAME": "x"}, "LR": 0.1}),
    "DictConfig": lambda: omegaconf.OmegaConf.create({"model": {"name": "x", "sizes": [1, 2]}}),
    "RandomState": lambda: np.random.RandomState(0),
    "Generator": lambda: np.random.default_rng(0),
    "module": lambda: torch.nn.CrossEntropyLoss(),
    # Protocols before 4 store nested classes and methods as calls to getattr.
    "attributes": lambda: [
        *(torch.optim.lr_scheduler.OneCycleLR._annealing_cos, Trainer.Mode, Trainer.Mode.TRAIN),
        *(Trainer.schedule, Trainer.create, Trainer().create, {}.get, str.lower),
    ],
    "types": lambda: [
        *(type(None), typing.Optional[int], int | None, list[int], ..., NotImplemented),  # noqa: UP045
        *(int, ValueError("x"), os.stat_result(range(10))),
    ],
    "functions": lambda: [
        *(max, operator.lt, operator.itemgetter(1), functools.partial(print), len),
        *(iter([1]), reversed([1]), enumerate([1]), signal.SIGTERM),
    ],
    "arrays of other dtypes": lambda: [
        *(np.array([{}, 1], dtype=object), np.array(None), np.datetime64("2026-01-01")),
        *(np.array(["2026-01-01"], "M8[D]"), np.timedelta64(3, "s"), np.zeros(1, np.longdouble)),
        *(np.zeros(2, [("a", "f4")]), np.zeros(2, [("a", "f4")])[0], np.dtype([("a", "f4")])),
        *(np.rec.array([(1, 2.0)]), np.dtype(("f4", (3,))), np.ma.masked_array([1], [True])),
    ],
    "keys": lambda: [
        {frozenset({1}): 1, ((1, 2), 3): 1, tuple(range(20)): 1, np.dtype("f4"): 1},
        {frozenset({frozenset({1})}), (1, frozenset({2}))},
    ],
    "0-d array as an argument": lambda: slice(np.array(1.0), 2),
}
# Plain values in these objects, which loading must keep.
VALUES_NEXT_TO_A_MODEL: dict[str, dict[str, Any]] = {
    "Namespace": {"lr": 0.1},
    "SimpleNamespace": {"a": 1},
    "dict subclass": {"a": 1, "b": {"c": [1]}},
}
# The objects above, and objects with tensors, which only torch.save can write.
NEXT_TO_A_TORCH_MODEL: dict[str, Callable[[], Any]] = {
    **NEXT_TO_A_MODEL,
    "model": lambda: torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm2d(2)),
    "Optimizer": _optimizer,
    "scheduler": lambda: torch.optim.lr_scheduler.StepLR(_optimizer(), 3),
}


class Python2Pickler(pickle._Pickler):
    """Pickler that writes both str and bytes as Python 2's string type."""

    def __init__(self, file: Any, protocol: int = 2, **_: Any):
        super().__init__(file, protocol)

    def save_text(self, text: str) -> None:
        self._save_string(text.encode("latin-1"), text)

    def save_raw(self, raw: bytes) -> None:
        self._save_string(raw, raw)

    def _save_string(self, raw: bytes, memo_key: Any) -> None:
        if not self.bin:
            self.write(b"S" + repr(raw)[1:].encode("ascii") + b"\n")
        elif len(raw) < 256:
            self.write(b"U" + bytes([len(raw)]) + raw)
        else:
            self.write(b"T" + struct.pack("<i", len(raw)) + raw)
        self.memoize(memo_key)

    dispatch = {  # noqa: RUF012 - mutable, as in the base class
        **pickle._Pickler.dispatch,
        str: save_text,
        bytes: save_raw,
    }


def python2_pickle(value: Any, protocol: int = 2) -> bytes:
    """Return a pickle as written by Python 2 and NumPy 1."""
    file = io.BytesIO()
    Python2Pickler(file, protocol).dump(value)
    return file.getvalue().replace(b"cnumpy._core.", b"cnumpy.core.")


def python2_torch_file(value: Any, path: Path) -> None:
    """Write a file in the legacy format of ``torch.save``, with Python 2 strings."""
    module = types.SimpleNamespace(
        Pickler=Python2Pickler,
        dump=lambda obj, file, protocol=2: file.write(python2_pickle(obj, protocol)),
        __name__="pickle",
    )
    with path.open("wb") as file:
        torch.save(value, file, pickle_module=module, _use_new_zipfile_serialization=False)


def tar_torch_file(tensors: dict[str, torch.Tensor], path: Path, **besides: Any) -> None:
    """Write a file in the format of PyTorch before 0.1.12, with one storage per tensor.

    The format follows the code of ``torch.load``, which also reads these files in the tests.
    """
    storages, views = io.BytesIO(), io.BytesIO()
    storages.write(python2_pickle(len(tensors)))
    views.write(python2_pickle(len(tensors)))
    for number, tensor in enumerate(tensors.values()):
        kind = tensor.type().removeprefix("torch.").removesuffix("Tensor")
        _write_triple(storages, 100 + number, "cpu", f"torch\n{kind}Storage")
        storages.write(struct.pack("<q", tensor.numel()) + tensor.contiguous().numpy().tobytes())
        _write_triple(views, 200 + number, 100 + number, f"torch\n{kind}Tensor")
        views.write(struct.pack("<ii", tensor.dim(), 0))
        strides = tensor.contiguous().stride()
        views.write(struct.pack(f"<{2 * tensor.dim() + 1}q", *tensor.shape, *strides, 0))
    storages.write(python2_pickle([]))

    class Reference:
        def __init__(self, number: int):
            self.number = number

    class TarPickler(Python2Pickler):
        def persistent_id(self, obj: Any) -> int | None:
            return obj.number if isinstance(obj, Reference) else None

    body = io.BytesIO()
    names = {name: Reference(200 + i) for i, name in enumerate(tensors)}
    TarPickler(body).dump({"state_dict": names, **besides} if besides else names)
    with tarfile.open(path, "w:") as tar:
        for name, part in (("storages", storages), ("tensors", views), ("pickle", body)):
            info = tarfile.TarInfo(name)
            info.size = len(part.getvalue())
            tar.addfile(info, io.BytesIO(part.getvalue()))


def _write_triple(file: io.BytesIO, key: int, other: Any, global_name: str) -> None:
    where = python2_pickle(other)[2:-1] if isinstance(other, int) else b"U\x03cpu"
    file.write(b"\x80\x02" + b"J" + struct.pack("<i", key) + where)
    file.write(b"c" + global_name.encode() + b"\n" + b"\x87.")
