"""Pickles read as data: arrays and plain containers, without executing anything.

The standard library's unpickler with an allow-list: a name in a pickle is looked up in a table of
stand-ins and never in a module. It is the library's implementation in Python, because the one in C
can be made to exhaust the machine before any name is looked up (eight bytes, ``LONG_BINPUT`` with a
huge index, cost it 20 seconds and 4.7 GB; a dictionary key of nested tuples overflows its stack)
and leaves no place to check a dictionary's keys or what ``BUILD`` sets on an object.
"""

import io
import math
import pickle
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from senet_transfer.errors import UserError
from senet_transfer.utils.text import shown

# A detector's checkpoint with its optimizer takes about 50 thousand steps.
MAX_STEPS = 1_000_000
MAX_DIMENSIONS = 16
_KEY_TYPES = (str, bytes, int, float, type(None))

# Modules whose functions act on the machine, and those where people define their models.
_RUNS_CODE = re.compile(
    r"(os|posix|nt|sys|subprocess|pty|socket|shutil|ctypes|signal|builtins|__builtin__|importlib"
    r"|runpy|operator|functools|types|code|io|pathlib|tempfile|glob|pickle|marshal|urllib"
    r"|webbrowser)[.]"
)
_MODEL_CODE = ("torch.nn.", "torchvision.", "models.", "model.", "timm.", "pretrainedmodels.")


# Stand-ins for the functions that pickles of arrays and containers call, with their arguments.


def _brief(value: Any) -> str:
    # The repr of a container can be of any length, whatever the size of the pickle.
    return shown(repr(value)) if isinstance(value, str | int | float) else type(value).__name__


class _DType:
    """Stand-in for ``numpy.dtype``, whose byte order follows in a ``BUILD`` instruction."""

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[<>|=]?[biufcSUO]\d{0,9}", code):
            raise ValueError(f"dtype {_brief(code)} is not one of numbers or text")
        self.value = np.dtype(code)

    def build(self, state: tuple) -> None:
        _, byteorder, subdtype, names, fields, size, _, flags = state[:8]
        if subdtype is not None or names is not None or fields is not None:
            raise ValueError("a structured dtype is not supported")
        if size not in (-1, self.value.itemsize) or (flags and self.value.kind in "biufc"):
            raise ValueError(f"dtype {self.value} of another size, or with flags")
        self.value = self.value.newbyteorder(byteorder)


def check_sizes(sizes: Iterable[Any]) -> tuple[int, ...]:
    """Return a shape, strides or an offset as a tuple, or raise ValueError if it is invalid."""
    sizes = tuple(sizes)
    if len(sizes) > MAX_DIMENSIONS or any(type(n) is not int or not 0 <= n < 2**63 for n in sizes):
        raise ValueError(f"invalid sizes ({', '.join(map(_brief, sizes[: MAX_DIMENSIONS + 1]))})")
    return sizes


def _array(raw: Any, dtype: Any, shape: Any, order: str, axes: Any = None) -> np.ndarray:
    if not isinstance(dtype, _DType):
        raise ValueError("an array without a dtype")
    if dtype.value.hasobject:
        raise ValueError("an array of Python objects (dtype object), which can hide anything")
    raw = raw.encode("latin-1") if isinstance(raw, str) else raw
    shape = check_sizes(shape)
    if type(raw) is not bytes or math.prod(shape) * dtype.value.itemsize != len(raw):
        raise ValueError(f"an array of shape {shape} ({dtype.value}) does not fit its data")
    array = np.frombuffer(raw, dtype.value).reshape(shape, order="F" if order == "F" else "C")
    return array if axes is None else array.transpose(check_sizes(axes))


def _set_array_state(array: np.ndarray, state: tuple) -> None:
    _, shape, dtype, fortran, raw = state
    raw = raw.encode("latin-1") if isinstance(raw, str) else raw
    checked = _array(raw, dtype, shape, "C")
    state = (1, checked.shape, checked.dtype, bool(fortran), raw)
    array.__setstate__(state)  # type: ignore[arg-type]  # a Python bool, as numpy itself writes it


def _encode(text: str, codec: str = "latin1") -> bytes:
    # Protocols 0 to 2 write bytes as text encoded in latin1.
    if codec not in ("latin1", "latin-1"):
        raise ValueError(f"text encoded as {_brief(codec)}, expected latin1")
    return text.encode("latin-1")


def _check_key(key: Any) -> None:
    # Hashing a deeply nested tuple overflows the C stack: one level is allowed.
    if not all(isinstance(part, _KEY_TYPES) for part in (key if type(key) is tuple else (key,))):
        raise ValueError(f"a dictionary key of type {type(key).__name__}")


def _dict(items: Any = ()) -> dict:
    pairs = list(items.items() if isinstance(items, dict) else items)
    for key, _ in pairs:
        _check_key(key)
    return dict(pairs)


def _set(items: Any = ()) -> set:
    items = list(items)
    for item in items:
        _check_key(item)
    return set(items)


# By name, in the spelling of Python 3 and numpy 2: a stand-in, or an inert object for a name that a
# pickle may pass on and may not call.
PLAIN: Mapping[str, Any] = {
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "collections.defaultdict": lambda _factory=None, items=(): _dict(items),
    "builtins.set": _set,
    "builtins.frozenset": _set,
    "builtins.bytes": lambda: b"",  # protocols 0 to 2 write b"" so
    "_codecs.encode": _encode,
    "numpy._core.multiarray._reconstruct": lambda *_: np.empty(0, np.float32),
    "numpy._core.multiarray.scalar": lambda dtype, raw=b"": _array(raw, dtype, (), "C").item(),
    "numpy._core.numeric._frombuffer": _array,
    "numpy.dtype": _DType,
    **dict.fromkeys(("numpy.ndarray", "builtins.dict", "builtins.list", "builtins.int"), object()),
}


class _Instructions(dict):
    """Pickle instructions that are followed, by code, and the steps left to follow them."""

    def __init__(self, table: Mapping[int, Callable]) -> None:
        super().__init__(table)
        self._left = MAX_STEPS

    def __getitem__(self, code: int) -> Callable:
        self.spend(1)
        return super().__getitem__(code)

    def __missing__(self, code: int) -> NoReturn:
        raise ValueError(f"byte {bytes([code])!r} is not a pickle instruction for plain data")

    def spend(self, steps: int) -> None:
        self._left -= steps
        if self._left < 0:
            raise ValueError(f"the pickle takes more than {MAX_STEPS:,} steps")


# Typed as Any: it is in no type stub. The instructions refused are of no use to plain data: some
# call an object, some take one from a registry of the process or from outside the pickle.
_Unpickler: Any = pickle._Unpickler
_REFUSED = (
    *(pickle.OBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4),
    *(pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
)


class _PlainUnpickler(_Unpickler):
    """Unpickler with an allow-list; :func:`load_plain` describes its arguments."""

    dispatch: dict[int, Callable] = {  # noqa: RUF012 - the base class's own convention
        code: load for code, load in _Unpickler.dispatch.items() if bytes([code]) not in _REFUSED
    }
    # Bytes in place of a bytearray, which would be allocated before its length is checked.
    dispatch[pickle.BYTEARRAY8[0]] = dispatch[pickle.BINBYTES8[0]]

    def __init__(self, stream: io.BytesIO, path: str | Path, allowed: Mapping[str, Any]) -> None:
        super().__init__(stream, encoding="latin-1")
        self._stream, self._path, self._allowed = stream, path, allowed
        self._bytes_left = 4 * length_of(stream) + 2**20
        self.dispatch = self._steps = _Instructions(self.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        modern = re.sub(r"^__builtin__$", "builtins", module)
        modern = f"{re.sub(r'^numpy[.]core[.]', 'numpy._core.', modern)}.{name}"
        if modern not in self._allowed:
            _reject(self._path, f"{module}.{name}")
        return self._allowed[modern]

    def _charge(self, arguments: Any) -> None:
        # A memoised value can be an argument any number of times, at two bytes each.
        if type(arguments) is not tuple:
            raise ValueError("arguments that are not a tuple")
        for argument in arguments:
            if isinstance(argument, str | bytes):
                self._bytes_left -= len(argument)
            elif hasattr(argument, "__len__"):
                self._steps.spend(len(argument))
        if self._bytes_left < 0:
            raise ValueError("the pickle asks for far more memory than the file's size")

    def load_frame(self) -> None:
        # Frames divide the stream for faster reading; here they are only checked.
        (size,) = struct.unpack("<Q", self.read(8))
        if self._stream.tell() + size > length_of(self._stream):
            raise ValueError("the file ends in the middle of the pickle")

    dispatch[pickle.FRAME[0]] = load_frame

    def load_inst(self) -> None:
        self.load_global()
        raise ValueError("the pickle instruction INST is not supported")

    dispatch[pickle.INST[0]] = load_inst

    def load_reduce(self) -> None:
        self._charge(self.stack[-1])
        super().load_reduce()

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_reduce

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is dict:  # an OrderedDict's attributes, such as a state_dict's _metadata
            return
        self._charge(state)
        if type(target) is np.ndarray:
            _set_array_state(target, state)
        elif hasattr(type(target), "build"):
            target.build(state)
        else:
            raise ValueError(f"attributes for a {type(target).__name__}")

    dispatch[pickle.BUILD[0]] = load_build

    def _check_keys(self, target: Any, kind: type, keys: list) -> None:
        if type(target) is not kind:
            raise ValueError(f"items of a {kind.__name__} for a {type(target).__name__}")
        for key in keys:
            _check_key(key)
            self._steps.spend(len(key) if type(key) is tuple else 0)

    def load_setitem(self) -> None:
        target, key, _ = self.stack[-3:]
        self._check_keys(target, dict, [key])
        super().load_setitem()

    dispatch[pickle.SETITEM[0]] = load_setitem

    def load_setitems(self) -> None:
        self._check_keys(self.metastack[-1][-1], dict, self.stack[::2])
        super().load_setitems()

    dispatch[pickle.SETITEMS[0]] = load_setitems

    def load_dict(self) -> None:
        self._check_keys({}, dict, self.stack[::2])
        super().load_dict()

    dispatch[pickle.DICT[0]] = load_dict

    def load_additems(self) -> None:
        self._check_keys(self.metastack[-1][-1], set, self.stack)
        super().load_additems()

    dispatch[pickle.ADDITEMS[0]] = load_additems

    def load_frozenset(self) -> None:
        self._check_keys(set(), set, self.stack)
        super().load_frozenset()

    dispatch[pickle.FROZENSET[0]] = load_frozenset


def load_plain(
    stream: io.BytesIO,
    path: str | Path,
    allowed: Mapping[str, Any] = PLAIN,
    persistent_load: Callable[[Any], Any] | None = None,
) -> Any:
    """Return the next object of a stream of pickles, of any protocol and of Python 2 or 3.

    Python 2's strings are decoded as latin1. Classes of containers become the plain ones: a
    dictionary for an ``OrderedDict``, a number for a numpy scalar, bytes for a bytearray.

    Args:
        stream: the file's content, in memory: reading a length that lies returns what there is.
        path: for error messages.
        allowed: what a pickle may name, by name. What is callable may also be called; what has a
            method ``build`` takes its state from the pickle.
        persistent_load: returns the object of a persistent id (torch's storages); None rejects it.

    Raises:
        UserError: the pickle names a class or function that is not allowed.
        ValueError, and other errors of reading: the bytes are not a pickle, or damaged.
    """
    unpickler = _PlainUnpickler(stream, path, allowed)
    if persistent_load is not None:
        unpickler.persistent_load = persistent_load
    try:
        return unpickler.load()
    except EOFError as error:
        raise ValueError("the file ends in the middle of the pickle") from error


def length_of(stream: io.BytesIO) -> int:
    """Return the number of bytes in a stream, without the copy that ``getbuffer`` makes."""
    place = stream.tell()
    length = stream.seek(0, io.SEEK_END)
    stream.seek(place)
    return length


def _reject(path: str | Path, name: str) -> NoReturn:
    if not re.fullmatch(r"[\w.]{1,200}", name):
        raise ValueError(f"{shown(name)!r}, expected the name of a class")
    start = f"{path}: rejected, because loading it would call or create `{name}`"
    if _RUNS_CODE.match(name):
        raise UserError(
            f"{start}, code that runs on this machine. Expected are tensors, arrays and plain "
            "containers. Nothing was run. Do not load the file by other means; get it again from "
            "its publisher."
        )
    if name.startswith(_MODEL_CODE):
        raise UserError(
            f"{start}: the file holds a whole model object instead of its tensors. Get the "
            "publisher's state_dict file; or, if you trust the file, load it where its code is "
            "installed and save `model.state_dict()`."
        )
    raise UserError(
        f"{start}, which is neither a tensor nor a plain container. If you trust the file, load it "
        "where that class is installed and save only the model's tensors: "
        'torch.save({"state_dict": model.state_dict()}, "weights.pth").'
    )
