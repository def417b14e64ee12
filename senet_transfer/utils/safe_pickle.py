"""Safe reading of pickles: arrays and plain containers are loaded without executing code.

The reader is the standard library's unpickler with an allow-list. Classes and functions named in a
pickle are never imported, but replaced by safe stand-ins from a table. Names that are not in the
table become a :class:`Placeholder`. Names of functions and classes that can affect the system, such
as ``os.system``, raise an error.

The base class is the standard library's Python implementation. The C implementation is
not used, because its opcode handlers can't be overridden, and because a pickle can make it exhaust
the memory before any name is looked up. For example, an eight-byte pickle (``LONG_BINPUT`` with a
huge index) takes 20 seconds and 4.7 GB.
"""

import functools
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
# Name of the placeholder for an array of objects, dates, structures or long floats.
UNREAD_ARRAY = "numpy.ndarray with a dtype other than text or numbers of up to 64 bits"
# Maximum number of reads from the stream. A detector checkpoint with optimizer state takes about
# 100,000 reads.
_MAX_STEPS = 2_000_000
_MAX_NAME = 200
# Maximum size of an integer in bytes. A larger integer takes long to hash whenever it is a key.
_MAX_INTEGER = 1024

# Modules with functions that can affect the system.
_RUNS_CODE = re.compile(
    r"(os|posix|nt|sys|_posixsubprocess|subprocess|pty|_?socket|shutil|_?ctypes|_?signal|builtins"
    r"|__builtin__|_?importlib|runpy|_?operator|_?functools|types|_?io|pathlib|tempfile|glob"
    r"|_?pickle|cPickle|marshal|urllib|webbrowser|bdb|pdb|pydoc|timeit"
    r"|code[.](interact|compile_command|Interactive\w+)|commands[.]get\w+"
    r"|torch[.](hub|load|serialization[.]load))\b"
)
# Exceptions to these modules: classes for plain values and functions without side effects, which
# training scripts often save with a model.
_HOLDS_VALUES = re.compile(
    r"pathlib[.](_local[.])?(Pure)?(Posix|Windows)?Path|functools[.]partial|_?io[.](Bytes|String)IO"
    r"|types[.](SimpleNamespace|GenericAlias|UnionType|MappingProxyType|NoneType|EllipsisType)"
    r"|_?signal[.](Signals|Handlers|Sigmasks)|urllib[.]parse[.]\w+"
    r"|(os|posix|nt)[.](\w+_result|terminal_size)|sys[.](\w+_info|flags)"
    r"|_?operator[.](?!_|attrgetter|methodcaller|call\b)\w+"
    # Functions, classes and exceptions, and methods of classes such as str.lower
    r"|(builtins|__builtin__)[.](?!_|(apply|breakpoint|compile|delattr|eval|exec|execfile|exit|file"
    r"|getattr|globals|hasattr|help|input|locals|open|quit|raw_input|reduce|reload|setattr|vars)\b)"
    r"\w+([.](?!_|format)\w+)?"
)
# Attributes through which a pickle could reach any function.
_GIVES_ACCESS = frozenset(
    {
        *("__builtins__", "__class__", "__code__", "__dict__", "__getattribute__", "__globals__"),
        *("__import__", "__loader__", "__self__", "__spec__", "__subclasses__"),
    }
)
# Modules that can affect the system and that another module imports, such as logging.os.
_IMPORTED = frozenset(
    {
        *("__builtin__", "builtins", "ctypes", "importlib", "nt", "os", "posix", "shutil"),
        *("socket", "subprocess", "sys"),
    }
)
# Prefixes of modules that usually define models.
_MODEL_CODE = ("torch.nn.", "torchvision.", "models.", "model.", "timm.", "pretrainedmodels.")


def _runs_code(name: str) -> bool:
    parts = name.split(".")
    if not (_GIVES_ACCESS.isdisjoint(parts) and _IMPORTED.isdisjoint(parts[1:-1])):
        return True
    return bool(_RUNS_CODE.match(name)) and not _HOLDS_VALUES.fullmatch(name)


def check_sizes(sizes: Iterable[Any]) -> tuple[int, ...]:
    """Check a shape or strides, and return them as a tuple.

    Raises:
        ValueError: If there are too many values, or if one is negative or not an integer.
    """
    sizes = tuple(sizes)
    if len(sizes) > MAX_DIMENSIONS or any(type(n) is not int or not 0 <= n < 2**63 for n in sizes):
        raise ValueError(
            f"a shape or stride is invalid; expected at most {MAX_DIMENSIONS} non-negative integers"
        )
    return sizes


# An array of another dtype becomes an empty array of this dtype.
_UNREAD_DTYPE = np.dtype("V1")


class _DType:
    """Stand-in for ``numpy.dtype``. The ``BUILD`` opcode sets its byte order after its creation."""

    def __init__(self, code: str) -> None:
        self.value = np.dtype(code)

    def build(self, state: tuple) -> None:
        _, byteorder, subdtype, names, fields, size, _, flags = state[:8]
        if subdtype is not None or names is not None or fields is not None:
            raise ValueError("a dtype has unexpected fields or an unexpected subarray")
        if size not in (-1, self.value.itemsize) or (flags and self.value.kind in "biufc"):
            raise ValueError(f"dtype {self.value} has an unexpected size or flags")
        self.value = self.value.newbyteorder(byteorder)


def _dtype(code: Any, *_: Any) -> "_DType | Placeholder":
    """Return the dtype for a type code, or a placeholder for types other than numbers and text."""
    if isinstance(code, str) and re.fullmatch(r"[<>|=]?[biufcSU]\d{0,9}", code):
        return _DType(code)
    return Placeholder("numpy.dtype")


def _array(
    raw: Any, dtype: Any, shape: Any, order: str, axes: Any = None
) -> "np.ndarray | Placeholder":
    """Create an array from bytes, as numpy's ``_frombuffer`` does, after checking the arguments.

    An array with an unsupported dtype becomes a placeholder.
    """
    if isinstance(dtype, Placeholder):
        return Placeholder(UNREAD_ARRAY)
    raw, shape = raw.encode("latin-1") if isinstance(raw, str) else raw, check_sizes(shape)
    if not isinstance(dtype, _DType) or type(raw) is not bytes:
        raise ValueError("an array has an invalid dtype, or its data are not bytes")
    if math.prod(shape) * dtype.value.itemsize != len(raw):
        raise ValueError(
            f"an array has {len(raw)} bytes of data, which does not match its shape {shape} and "
            f"its dtype {dtype.value}"
        )
    array = np.frombuffer(raw, dtype.value).reshape(shape, order="F" if order == "F" else "C")
    return array if axes is None else array.transpose(check_sizes(axes))


def _scalar(dtype: Any, raw: Any = b"") -> Any:
    array = _array(raw, dtype, (), "C")
    return array.item() if isinstance(array, np.ndarray) else array


def _encode(text: str, codec: str = "latin1") -> bytes:
    # Protocols 0 to 2 store bytes as Latin-1 text.
    if codec not in ("latin1", "latin-1"):
        raise ValueError("bytes are encoded as text with a codec other than latin1")
    return text.encode("latin-1")


def _reconstructed(kind: Any, _base: Any = None, state: Any = None) -> Any:
    """Create an object in place of ``copyreg._reconstructor``, used by pickle protocols 0 and 1.

    If the object is a dictionary, ``state`` contains its items.
    """
    if not isinstance(kind, Placeholder):
        return kind
    created = kind()
    for key, value in state.items() if isinstance(state, dict) else ():
        created[key] = value
    return created


# Stand-ins by name, as spelled in Python 3 and numpy 2. None marks a name that a pickle may pass as
# an argument but not call.
PLAIN: Mapping[str, Any] = {
    **dict.fromkeys(("copyreg._reconstructor", "copy_reg._reconstructor"), _reconstructed),
    "collections.OrderedDict": dict,
    "collections.Counter": dict,
    "collections.defaultdict": lambda _factory=None, items=(): dict(items),
    "builtins.set": set,
    "builtins.frozenset": lambda items=(): _FrozenSet(items),
    "builtins.bytes": lambda: b"",  # protocols 0 to 2 encode b"" like this
    "_codecs.encode": _encode,
    "numpy._core.multiarray._reconstruct": lambda *_: np.empty(0, np.float32),
    "numpy._core.multiarray.scalar": _scalar,
    "numpy._core.numeric._frombuffer": _array,
    "numpy.dtype": _dtype,
    **dict.fromkeys(("numpy.ndarray", "builtins.dict", "builtins.list", "builtins.int")),
}


@dataclass(eq=False)  # hashed by identity, so the value is never hashed
class Named:
    """Class or function named in a pickle, with the stand-in that is called instead."""

    value: Any

    def __call__(self, *arguments: Any) -> Any:
        return self.value(*arguments)


# Classes whose items or attributes are options, such as a training script's arguments.
_NAMESPACE = re.compile(r"[\w.]+[.]((Simple)?Namespace|(Attr|Attribute|Easy)Dict)")


class Placeholder:
    """Inert stand-in for a class or function that is not on the allow-list, and for its results.

    It can be called, and items can be added to it, but it stores only the name of the class or
    function. If the class is a namespace, such as ``SimpleNamespace``, its attributes and items
    with plain values are stored as well.
    """

    __slots__ = ("name", "values")

    def __init__(self, name: str) -> None:
        self.name = name
        self.values: dict[Any, Any] = {}

    def __call__(self, *_: Any) -> "Placeholder":
        return Placeholder(self.name)  # a new object, because enum members are distinct keys

    def __setitem__(self, key: Any, value: Any) -> None:
        plain = isinstance(key, str) and isinstance(value, _NAMESPACE_VALUES)
        if plain and _NAMESPACE.fullmatch(self.name):
            self.values[key] = value

    def append(self, *_: Any) -> None:
        """Discard the items that a pickle adds to a list or set of an unknown class."""

    extend = add = append


_NAMESPACE_VALUES = (str, int, float, list, tuple, dict, types.NoneType, Placeholder)


class _Tuple(tuple):
    """Tuple that is hashed by identity if it is long or nested.

    Hashing a deeply nested tuple overflows the C stack. A malicious pickle can also make Python
    hash a long tuple many times, which would take excessive time.
    """

    __slots__ = ()

    def __hash__(self) -> int:
        if len(self) > MAX_DIMENSIONS or any(isinstance(part, tuple) for part in self):
            return id(self)
        return super().__hash__()


class _FrozenSet(set):
    """Frozen set compared by identity, because comparing nested sets takes exponential time."""

    __slots__ = ()
    __eq__ = object.__eq__
    __hash__ = object.__hash__  # type: ignore[assignment]


class _Instructions(dict):
    """Mapping from the opcode of each supported pickle instruction to its handler."""

    def __missing__(self, code: int) -> NoReturn:
        raise ValueError(f"byte {bytes([code])!r} is not a supported pickle opcode")


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
        if modern == "builtins.getattr":
            return Named(self._attribute)
        self._charge((module, name))
        name = f"{module}.{name}"
        if len(name) > _MAX_NAME or not re.fullmatch(r"[\w.]+", name):
            raise ValueError(f"{shown(name)!r} is not a valid class name")
        if re.fullmatch(r"(_?functools|builtins|__builtin__)[.]reduce", name):
            return Named(functools.partial(self._union, name))
        if _runs_code(name):
            reject_class(self._path, name)
        return Placeholder(name)

    def _attribute(self, *arguments: Any) -> Placeholder:
        """Return a placeholder for an attribute, such as a nested class or a method.

        Pickle protocols before 4 store the attribute as a call to ``getattr``. The call is not
        executed.
        """
        owner, attribute = arguments if len(arguments) == 2 else (None, None)
        if not (isinstance(attribute, str) and attribute.isidentifier()):
            reject_class(self._path, "builtins.getattr")
        start = owner.name if isinstance(owner, Placeholder) else type(owner).__name__
        name = f"{start}.{attribute}"
        if _runs_code(name) or len(name) > _MAX_NAME:
            reject_class(self._path, shown(name))
        return Placeholder(name)

    def _union(self, name: str, *arguments: Any) -> Placeholder:
        """Return a placeholder for a type such as ``int | None``.

        The type is stored as a call to ``functools.reduce``, or in pickle protocols before 3 to
        ``__builtin__.reduce``. The call is not executed.

        Args:
            name: Name of the called function in the pickle.
            arguments: Arguments of the call.
        """
        function = arguments[0] if len(arguments) == 2 else None
        if not (isinstance(function, Placeholder) and function.name.endswith("operator.or_")):
            reject_class(self._path, name)
        return Placeholder("types.UnionType")

    def _counted_read(self, size: int) -> bytes:
        self._spend(1)
        return self._stream.read(size)

    def _spend(self, steps: int) -> None:
        self._steps_left -= steps
        if self._steps_left < 0 or self._bytes_left < 0:
            raise ValueError(
                "the pickle requires far more time or memory than expected for the size of the file"
            )

    def _charge(self, arguments: Any) -> None:
        # A memoised value can be passed as an argument many times, at a cost of only two bytes
        # each.
        if not isinstance(arguments, tuple):
            raise ValueError("the arguments of a call are not a tuple")
        for argument in arguments:
            if isinstance(argument, str | bytes):
                self._bytes_left -= len(argument)
            elif isinstance(argument, np.ndarray):
                self._spend(argument.size)
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
        items = self.pop_mark()  # also restores self.append
        self.append(_FrozenSet(items))

    dispatch[pickle.FROZENSET[0]] = load_frozenset

    def load_reduce(self) -> None:
        self._charge(self.stack[-1])
        super().load_reduce()

    dispatch[pickle.REDUCE[0]] = dispatch[pickle.NEWOBJ[0]] = load_reduce

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        # Drop attributes of an OrderedDict, such as a state_dict's _metadata.
        if type(target) is dict:
            return
        if isinstance(target, Placeholder):
            self._spend(len(state) if isinstance(state, dict) else 0)
            for key, value in state.items() if isinstance(state, dict) else ():
                target[key] = value
            return
        self._charge(state)
        if type(target) is np.ndarray:
            _, shape, dtype, fortran, raw = state
            if isinstance(dtype, Placeholder):
                empty: Any = (1, (0,), _UNREAD_DTYPE, False, b"")
                target.__setstate__(empty)
                return
            raw = raw.encode("latin-1") if isinstance(raw, str) else raw
            checked: Any = _array(raw, dtype, shape, "C")
            # numpy references the bytes of a large array instead of copying them.
            numpy_state: Any = (1, checked.shape, checked.dtype, bool(fortran), raw)
            target.__setstate__(numpy_state)
            target.flags.writeable = False
        elif hasattr(type(target), "build"):
            target.build(state)
        else:
            raise ValueError(
                f"the pickle sets attributes of an object of type {type(target).__name__}, which "
                "is not supported"
            )

    dispatch[pickle.BUILD[0]] = load_build


def _make_hash_safe(load: Callable) -> Callable:
    def load_tuple(unpickler: _PlainUnpickler) -> None:
        load(unpickler)
        unpickler.stack[-1] = _Tuple(unpickler.stack[-1])

    return load_tuple


for _code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
    _PlainUnpickler.dispatch[_code[0]] = _make_hash_safe(_PlainUnpickler.dispatch[_code[0]])


def _limit_size(load: Callable) -> Callable:
    def load_integer(unpickler: _PlainUnpickler) -> None:
        load(unpickler)
        if unpickler.stack[-1].bit_length() > 8 * _MAX_INTEGER:
            raise ValueError(f"an integer has more than {_MAX_INTEGER} bytes")

    return load_integer


for _code in (pickle.INT, pickle.LONG, pickle.LONG4):  # the other integers have up to 255 bytes
    _PlainUnpickler.dispatch[_code[0]] = _limit_size(_PlainUnpickler.dispatch[_code[0]])


def load_plain(
    stream: io.BytesIO,
    path: str | Path,
    allowed: Mapping[str, Any] = PLAIN,
    persistent_load: Callable[[Any], Any] | None = None,
) -> Any:
    """Load the next pickle from a stream. All protocols of Python 2 and 3 are supported.

    Python 2 strings are decoded as latin1. Some types are replaced: an ``OrderedDict`` becomes a
    dict, a numpy scalar becomes a number, and a bytearray becomes bytes. Arrays are read-only.
    Objects of any other class become a :class:`Placeholder`. An array of objects, dates or
    structures becomes a placeholder or an empty array of dtype void.

    Args:
        stream: In-memory copy of the file, so that an invalid length in the pickle can't cause a
            large allocation.
        path: Path of the file, for error messages.
        allowed: Functions that are called in place of classes and functions in the pickle, keyed
            by the full name of the replaced class or function. If the returned object has a
            ``build`` method, this method is called with the pickled state.
        persistent_load: Function that returns the object for a persistent id, such as a storage in
            a torch file; None rejects persistent ids.

    Raises:
        UserError: If the pickle references a class or function that can affect the system.
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
    """Return the number of bytes in a stream without copying the data.

    ``BytesIO.getbuffer`` copies the data if the buffer is shared with a bytes object.
    """
    position = stream.tell()
    length = stream.seek(0, io.SEEK_END)
    stream.seek(position)
    return length


# Advice for tensors that are not dense, by the names of the functions that create them.
_TENSORS = (
    (
        r"torch[.]_utils[.]_rebuild_qtensor|torch[.]qu?int\w+",
        "The file contains quantized tensors, which are not supported. Use the weights of the "
        "network before its quantization.",
    ),
    (
        r"torch[.]_utils[.]_rebuild_(sparse|nested)\w*",
        "The file contains sparse or nested tensors, which are not supported. Save dense tensors: "
        'torch.save({name: x.to_dense() for name, x in state_dict.items()}, "weights.pth").',
    ),
    (
        r"torch[.]_utils[.]_rebuild_meta\w*",
        "The file contains tensors of the meta device, which have no values. Save the model again "
        "after its weights have been loaded.",
    ),
)


def reject_class(path: str | Path, name: str) -> NoReturn:
    """Raise a UserError that explains why a class or function used by a file is rejected."""
    start = f"{path} was rejected, because loading it would call or create `{name}`"
    if _runs_code(name):
        raise UserError(
            f"{start}, which can run code on this machine. Expected only tensors, arrays and plain "
            "containers. No code was run. Do not load the file with other tools; download it again "
            "from its publisher."
        )
    for pattern, advice in _TENSORS:
        if re.fullmatch(pattern, name):
            raise UserError(f"{start}. {advice}")
    if name.startswith(_MODEL_CODE):
        raise UserError(
            f"{start}. The file contains a whole model object instead of its tensors. Get the "
            "publisher's state_dict file. If you trust this file, load it in an environment in "
            "which the model's code is installed, and save `model.state_dict()`."
        )
    raise UserError(
        f"{start}, which is neither a tensor nor a plain container. If you trust the file, load it "
        f"in an environment in which `{name}` is available, and save only the model's tensors: "
        'torch.save({"state_dict": model.state_dict()}, "weights.pth").'
    )
