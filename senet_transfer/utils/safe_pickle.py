"""Safe reading of pickles: arrays and plain containers are loaded without executing code.

The reader is the standard library's unpickler with an allow-list: names in a pickle are looked up
in a table of stand-ins, never in a module. Names that are not in the table become a
:class:`Placeholder`. Functions and classes that can act on the machine, such as ``os.system``,
raise an error.

The base class is the standard library's Python implementation. The C implementation can be made to
exhaust memory before any name is looked up (eight bytes, ``LONG_BINPUT`` with a huge index, take 20
seconds and 4.7 GB), and its opcode handlers can't be overridden.
"""

import io
import math
import pickle
import re
import struct
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from senet_transfer.errors import UserError
from senet_transfer.utils.text import shown

MAX_DIMENSIONS = 16
# Maximum number of reads from the stream. A detector checkpoint with optimizer state takes about
# 100,000 reads.
_MAX_STEPS = 2_000_000

# Modules with functions that can act on the machine.
_RUNS_CODE = re.compile(
    r"(os|posix|nt|sys|_posixsubprocess|subprocess|pty|_?socket|shutil|_?ctypes|_?signal|builtins"
    r"|__builtin__|_?importlib|runpy|_?operator|_?functools|types|code|_?io|pathlib|tempfile|glob"
    r"|_?pickle|cPickle|marshal|urllib|webbrowser|commands|bdb|pdb|pydoc|timeit"
    r"|torch[.](hub|load|serialization[.]load))\b"
)
# Exceptions to these modules: classes for plain values, which training scripts often save with a
# model.
_HOLDS_VALUES = re.compile(
    r"pathlib[.](_local[.])?(Pure)?(Posix|Windows)?Path|types[.]SimpleNamespace|functools[.]partial"
    r"|_?io[.](Bytes|String)IO|_operator[.]getitem"  # the last name creates typing.Dict[str, int]
    r"|(builtins|__builtin__)[.](bool|bytearray|complex|float|long|object|slice|str|tuple|unicode"
    r"|x?range)"
)
# Prefixes of modules that usually define models.
_MODEL_CODE = ("torch.nn.", "torchvision.", "models.", "model.", "timm.", "pretrainedmodels.")


def _runs_code(name: str) -> bool:
    return bool(_RUNS_CODE.match(name)) and not _HOLDS_VALUES.fullmatch(name)


def check_sizes(sizes: Iterable[Any]) -> tuple[int, ...]:
    """Return a shape or strides as a tuple, or raise ValueError if they are invalid."""
    sizes = tuple(sizes)
    if len(sizes) > MAX_DIMENSIONS or any(type(n) is not int or not 0 <= n < 2**63 for n in sizes):
        raise ValueError("a shape or stride has negative, non-integer or too many values")
    return sizes


class _DType:
    """Stand-in for ``numpy.dtype``, whose byte order is set by a later ``BUILD`` instruction."""

    __hash__ = None  # type: ignore[assignment]  # can't be a dictionary key

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[<>|=]?[biufcSUO]\d{0,9}", code):
            raise ValueError("a dtype is neither numeric nor text")
        self.value = np.dtype(code)

    def build(self, state: tuple) -> None:
        _, byteorder, subdtype, names, fields, size, _, flags = state[:8]
        if subdtype is not None or names is not None or fields is not None:
            raise ValueError("a dtype is structured")
        if size not in (-1, self.value.itemsize) or (flags and self.value.kind in "biufc"):
            raise ValueError(f"dtype {self.value} has an unexpected size or flags")
        self.value = self.value.newbyteorder(byteorder)


def _array(raw: Any, dtype: Any, shape: Any, order: str, axes: Any = None) -> np.ndarray:
    """Create an array from bytes, as numpy's ``_frombuffer`` does, after checking the arguments."""
    raw, shape = raw.encode("latin-1") if isinstance(raw, str) else raw, check_sizes(shape)
    if not isinstance(dtype, _DType) or type(raw) is not bytes:
        raise ValueError("an array has no valid dtype or no bytes")
    if dtype.value.hasobject:
        raise ValueError(
            "an array contains Python objects (dtype object), which are unsafe to load"
        )
    if math.prod(shape) * dtype.value.itemsize != len(raw):
        raise ValueError(f"an array of shape {shape} ({dtype.value}) has {len(raw)} bytes of data")
    array = np.frombuffer(raw, dtype.value).reshape(shape, order="F" if order == "F" else "C")
    return array if axes is None else array.transpose(check_sizes(axes))


def _encode(text: str, codec: str = "latin1") -> bytes:
    # Protocols 0 to 2 store bytes as Latin-1 text.
    if codec not in ("latin1", "latin-1"):
        raise ValueError("bytes are encoded as text with a codec other than latin1")
    return text.encode("latin-1")


# Stand-ins by name, as spelled in Python 3 and numpy 2. None marks a name that a pickle may pass as
# an argument but not call.
PLAIN: Mapping[str, Any] = {
    **dict.fromkeys(("copyreg._reconstructor", "copy_reg._reconstructor"), lambda kind, *_: kind),
    "collections.OrderedDict": dict,
    "collections.Counter": dict,
    "collections.defaultdict": lambda _factory=None, items=(): dict(items),
    "builtins.set": set,
    "builtins.frozenset": set,
    "builtins.bytes": lambda: b"",  # protocols 0 to 2 encode b"" like this
    "_codecs.encode": _encode,
    "numpy._core.multiarray._reconstruct": lambda *_: np.empty(0, np.float32),
    "numpy._core.multiarray.scalar": lambda dtype, raw=b"": _array(raw, dtype, (), "C").item(),
    "numpy._core.numeric._frombuffer": _array,
    "numpy.dtype": _DType,
    **dict.fromkeys(("numpy.ndarray", "builtins.dict", "builtins.list", "builtins.int")),
}


@dataclass(eq=False)  # hashed by identity, so the value is never hashed
class Named:
    """Class or function named in a pickle, with the stand-in that is called instead."""

    value: Any

    def __call__(self, *arguments: Any) -> Any:
        return self.value(*arguments)


class Placeholder:
    """Inert stand-in for a class or function that is not on the allow-list, and for its results.

    It accepts arguments, items and attributes, but keeps only the name.
    """

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *_: Any) -> "Placeholder":
        return Placeholder(self.name)  # a new object, because enum members are distinct keys

    def __setitem__(self, *_: Any) -> None:
        """Ignore an item."""

    append = extend = add = __setitem__


class _Tuple(tuple):
    """Tuple that can be a dictionary key only if it is short and flat.

    Hashing a deeply nested tuple overflows the C stack.
    """

    __slots__ = ()

    def __hash__(self) -> int:
        if len(self) > MAX_DIMENSIONS or any(isinstance(part, tuple) for part in self):
            raise ValueError("a dictionary key is a long or nested tuple")
        return super().__hash__()


class _Instructions(dict):
    """Supported pickle instructions by opcode."""

    def __missing__(self, code: int) -> NoReturn:
        raise ValueError(f"byte {bytes([code])!r} is not a pickle instruction for plain data")


_Unpickler: Any = pickle._Unpickler  # typed as Any, because it is missing from the type stubs


class _PlainUnpickler(_Unpickler):
    """Unpickler with an allow-list; see :func:`load_plain` for its arguments."""

    dispatch = _Instructions(_Unpickler.dispatch)
    # Plain data does not need these instructions. They call an object without REDUCE, or fetch one
    # from a process-wide registry or from outside the pickle.
    for _code in (
        *(pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4),
        *(pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
    ):
        del dispatch[_code[0]]
    # Load bytes instead of a bytearray, which would be allocated before its length is checked.
    dispatch[pickle.BYTEARRAY8[0]] = dispatch[pickle.BINBYTES8[0]]

    def __init__(self, stream: io.BytesIO, path: str | Path, allowed: Mapping[str, Any]) -> None:
        counted = types.SimpleNamespace(read=self._counted_read, readline=stream.readline)
        super().__init__(counted, encoding="latin-1")
        self._stream, self._path, self._allowed = stream, path, allowed
        self._steps_left = _MAX_STEPS
        self._bytes_left = 4 * length_of(stream) + 2**20

    def find_class(self, module: str, name: str) -> Any:
        modern = re.sub(r"^__builtin__$", "builtins", module)
        modern = f"{re.sub(r'^numpy[.]core[.]', 'numpy._core.', modern)}.{name}"
        if modern in self._allowed:
            return Named(self._allowed[modern])
        self._charge((module, name))
        name = f"{module}.{name}"
        if not re.fullmatch(r"[\w.]{1,200}", name):
            raise ValueError(f"{shown(name)!r} is not a valid class name")
        if _runs_code(name):
            reject_class(self._path, name)
        return Placeholder(name)

    def _counted_read(self, size: int) -> bytes:
        self._spend(1)
        return self._stream.read(size)

    def _spend(self, steps: int) -> None:
        self._steps_left -= steps
        if self._steps_left < 0 or self._bytes_left < 0:
            raise ValueError(
                "the pickle requires far more time or memory than the file's size justifies"
            )

    def _charge(self, arguments: Any) -> None:
        # A memoised value can be passed as an argument many times, at a cost of only two bytes
        # each.
        if not isinstance(arguments, tuple):
            raise ValueError("the arguments of a call are not a tuple")
        for argument in arguments:
            if isinstance(argument, str | bytes):
                self._bytes_left -= len(argument)
            elif hasattr(argument, "__len__"):
                self._spend(len(argument))
        self._spend(3)  # a call takes as long as a few reads

    def load_frame(self) -> None:
        # Frames only serve to speed up reading, so only their size is checked here.
        (size,) = struct.unpack("<Q", self.read(8))
        if self._stream.tell() + size > length_of(self._stream):
            raise EOFError

    dispatch[pickle.FRAME[0]] = load_frame

    def load_frozenset(self) -> None:
        # Load frozensets as plain sets, so that sets can't be nested: comparing nested sets takes
        # exponential time.
        self.append(set(self.pop_mark()))

    dispatch[pickle.FROZENSET[0]] = load_frozenset

    def load_reduce(self) -> None:
        self._charge(self.stack[-1])
        super().load_reduce()

    dispatch[pickle.REDUCE[0]] = dispatch[pickle.NEWOBJ[0]] = load_reduce

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        # Drop attributes of an OrderedDict, such as a state_dict's _metadata.
        if type(target) in (dict, Placeholder):
            return
        self._charge(state)
        if type(target) is np.ndarray:
            _, shape, dtype, fortran, raw = state
            raw = raw.encode("latin-1") if isinstance(raw, str) else raw
            checked = _array(raw, dtype, shape, "C")
            # numpy references the bytes of a large array instead of copying them.
            numpy_state: Any = (1, checked.shape, checked.dtype, bool(fortran), raw)
            target.__setstate__(numpy_state)
            target.flags.writeable = False
        elif hasattr(type(target), "build"):
            target.build(state)
        else:
            raise ValueError(f"the pickle sets attributes of a {type(target).__name__}")

    dispatch[pickle.BUILD[0]] = load_build


def _make_hash_safe(load: Callable) -> Callable:
    def load_tuple(unpickler: _PlainUnpickler) -> None:
        load(unpickler)
        unpickler.stack[-1] = _Tuple(unpickler.stack[-1])

    return load_tuple


for _code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
    _PlainUnpickler.dispatch[_code[0]] = _make_hash_safe(_PlainUnpickler.dispatch[_code[0]])


def load_plain(
    stream: io.BytesIO,
    path: str | Path,
    allowed: Mapping[str, Any] = PLAIN,
    persistent_load: Callable[[Any], Any] | None = None,
) -> Any:
    """Load the next pickle from a stream. All protocols of Python 2 and 3 are supported.

    Python 2 strings are decoded as latin1. Some types are replaced: an ``OrderedDict`` becomes a
    dict, a numpy scalar becomes a number, and a bytearray becomes bytes. Arrays are read-only.
    Objects of any other class become a :class:`Placeholder`.

    Args:
        stream: In-memory content of the file, so a wrong length can't cause a large allocation.
        path: Path of the file, for error messages.
        allowed: Stand-in to call for each name that a pickle may contain. If the returned object
            has a ``build`` method, this method is called with the pickled state.
        persistent_load: Function that returns the object for a persistent id, such as a storage in
            a torch file; None rejects persistent ids.

    Raises:
        UserError: If the pickle references a class or function that can act on the machine.
        ValueError: If the data is damaged or not a pickle. The unpickler may also raise other
            exceptions.
    """
    unpickler = _PlainUnpickler(stream, path, allowed)
    if persistent_load is not None:
        unpickler.persistent_load = persistent_load
    try:
        return unpickler.load()
    except EOFError as error:
        raise ValueError("the file ends in the middle of the pickle") from error


def length_of(stream: io.BytesIO) -> int:
    """Return the number of bytes in a stream, without copying them as ``getbuffer`` does."""
    position = stream.tell()
    length = stream.seek(0, io.SEEK_END)
    stream.seek(position)
    return length


def reject_class(path: str | Path, name: str) -> NoReturn:
    """Raise UserError for a class or function that a file references."""
    start = f"{path} was rejected, because loading it would call or create `{name}`"
    if _runs_code(name):
        raise UserError(
            f"{start}, which can run code on this machine. Expected only tensors, arrays and plain "
            "containers. No code was run. Do not load the file with other tools; download it again "
            "from its publisher."
        )
    if name.startswith(_MODEL_CODE):
        raise UserError(
            f"{start}. The file contains a whole model object instead of its tensors. Get the "
            "publisher's state_dict file. If you trust this file, load it where the model's code "
            "is installed and save `model.state_dict()`."
        )
    raise UserError(
        f"{start}, which is neither a tensor nor a plain container. If you trust the file, load it "
        "where that class is installed and save only the model's tensors: "
        'torch.save({"state_dict": model.state_dict()}, "weights.pth").'
    )
