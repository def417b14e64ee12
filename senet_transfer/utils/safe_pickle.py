"""Reading pickles as data: tensors, arrays and plain containers come out, nothing is executed.

A pickle is a small program. ``pickle.Unpickler`` with a strict ``find_class`` stops it from calling
what it likes, but not from exhausting the machine: eight bytes (``LONG_BINPUT`` with a huge index)
cost it 20 seconds and 4.7 GB before any class is looked up. So the instructions, which the standard
library's ``pickletools`` parses, are followed here: a callable is only ever a key of a short table
of this project's own functions, and the work and memory a file may cause are bounded by its size.
"""

import codecs
import io
import pickle
import pickletools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from senet_transfer.utils.plain_values import (
    PLAIN_FUNCTIONS,
    PLAIN_NAMES,
    Global,
    make_dict,
    make_set,
    plain_key,
)

# A detector's checkpoint with its optimizer takes some 50 thousand steps.
MAX_STEPS = 1_000_000


def _read_string(stream: io.BytesIO) -> str:
    # pickletools takes protocol 0's strings for ASCII; Python 2's arrays are not.
    return codecs.escape_decode(stream.readline().strip()[1:-1])[0].decode("latin-1")


# By byte: the instruction's name, and what reads its argument.
_OPCODES = {
    op.code.encode("latin-1"): (op.name, op.arg.reader if op.arg else None)
    for op in pickletools.opcodes
}
_OPCODES[b"S"] = ("STRING", _read_string)
_TEXTS = {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE"}
_TEXTS |= {"SHORT_BINUNICODE", "BINUNICODE8"}
_BYTES = {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
_NUMBERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
_PUSHES_ITS_ARGUMENT = _TEXTS | _BYTES | _NUMBERS
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


class PlainUnpickler:
    """Follows the instructions of one pickle after another in a stream.

    Args:
        stream: the file's bytes, in memory: a length that lies then reads no more than there is.
        path: for error messages.
        functions: what the pickle may call, by name, in Python 3's and numpy 2's spelling.
        names: what it may name besides, without calling it.
        persistent_load: resolves a persistent id (torch's storages); None refuses them.
    """

    def __init__(
        self,
        stream: io.BytesIO,
        path: Path,
        *,
        functions: Mapping[str, Callable[..., Any]] = PLAIN_FUNCTIONS,
        names: frozenset[str] = PLAIN_NAMES,
        persistent_load: Callable[[Any], Any] | None = None,
    ) -> None:
        self._stream = stream
        self._path = path
        self._functions = functions
        self._names = names
        self._persistent_load = persistent_load
        self._steps_left = MAX_STEPS
        self._bytes_left = 4 * length_of(stream) + 2**20

    def load(self) -> Any:
        """Returns the next object of the stream.

        Raises:
            UserError: the pickle asks for something else than plain data, which is named.
            ValueError, and other errors of reading: the bytes are not a pickle, or damaged.
        """
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        while byte := self._stream.read(1):
            self._spend(1)
            opcode = _OPCODES.get(byte)
            if opcode is None:
                raise ValueError(f"byte {byte!r} is not a pickle instruction")
            name, read_argument = opcode
            argument = read_argument(self._stream) if read_argument else None
            if name == "STOP":
                return self._stack.pop()
            if name in _PUSHES_ITS_ARGUMENT:
                self._stack.append(argument)
            elif name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name])
            else:
                operation = getattr(self, f"_op_{name.lower()}", None)
                if operation is None:
                    raise ValueError(f"the pickle instruction {name}, which weights do not need")
                operation(argument)
        raise ValueError("the pickle has no end")

    def _spend(self, steps: int) -> None:
        self._steps_left -= steps
        if self._steps_left < 0:
            raise ValueError(f"the pickle takes more than {MAX_STEPS:,} steps")

    def _charge(self, arguments: tuple) -> None:
        # A memoised value can be handed to a function any number of times by two bytes each.
        for argument in arguments:
            if isinstance(argument, str | bytes | bytearray):
                self._bytes_left -= len(argument)
            elif isinstance(argument, list | tuple | dict | set):
                self._spend(len(argument))
        if self._bytes_left < 0:
            raise ValueError("the pickle asks for far more memory than the file's size")

    def _since_mark(self) -> list[Any]:
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        self._spend(len(items))
        return items

    def _top(self, kind: type) -> Any:
        if type(self._stack[-1]) is not kind:
            raise ValueError(f"items for a {kind.__name__} that is not there")
        return self._stack[-1]

    # The operations, by the names that pickletools gives the instructions.

    def _op_proto(self, protocol: int) -> None:
        if protocol > pickle.HIGHEST_PROTOCOL:
            raise ValueError(f"pickle protocol {protocol} is not known")

    def _op_frame(self, length: int) -> None:
        if self._stream.tell() + length > length_of(self._stream):
            raise ValueError("the file ends in the middle of the pickle")

    def _op_mark(self, _: Any) -> None:
        self._marks.append(len(self._stack))

    def _op_pop(self, _: Any) -> None:
        # Protocol 0 and 1 pop a mark in this way as well.
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._stack.pop()

    def _op_pop_mark(self, _: Any) -> None:
        self._since_mark()

    def _op_dup(self, _: Any) -> None:
        self._stack.append(self._stack[-1])

    def _op_put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    _op_binput = _op_long_binput = _op_put

    def _op_memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _op_get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    _op_binget = _op_long_binget = _op_get

    def _op_empty_list(self, _: Any) -> None:
        self._stack.append([])

    def _op_empty_dict(self, _: Any) -> None:
        self._stack.append({})

    def _op_empty_set(self, _: Any) -> None:
        self._stack.append(set())

    def _op_list(self, _: Any) -> None:
        self._stack.append(self._since_mark())

    def _op_tuple(self, _: Any) -> None:
        self._stack.append(tuple(self._since_mark()))

    def _op_tuple1(self, _: Any) -> None:
        self._stack[-1:] = [(self._stack[-1],)]

    def _op_tuple2(self, _: Any) -> None:
        self._stack[-2:] = [(self._stack[-2], self._stack[-1])]

    def _op_tuple3(self, _: Any) -> None:
        self._stack[-3:] = [(self._stack[-3], self._stack[-2], self._stack[-1])]

    def _op_frozenset(self, _: Any) -> None:
        self._stack.append(make_set(self._since_mark()))

    def _op_dict(self, _: Any) -> None:
        items = self._since_mark()
        self._stack.append(make_dict(zip(items[::2], items[1::2], strict=True)))

    def _op_append(self, _: Any) -> None:
        item = self._stack.pop()
        self._top(list).append(item)

    def _op_appends(self, _: Any) -> None:
        items = self._since_mark()
        self._top(list).extend(items)

    def _op_setitem(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._top(dict)[plain_key(key)] = value

    def _op_setitems(self, _: Any) -> None:
        items = self._since_mark()
        self._top(dict).update(make_dict(zip(items[::2], items[1::2], strict=True)))

    def _op_additems(self, _: Any) -> None:
        items = self._since_mark()
        self._top(set).update(make_set(items))

    def _op_global(self, argument: str) -> None:
        self._push_global(*argument.split(" ", 1))

    def _op_stack_global(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._push_global(module, name)

    def _op_inst(self, argument: str) -> None:
        self._push_global(*argument.split(" ", 1))
        raise ValueError("the pickle instruction INST, which weights do not need")

    def _push_global(self, module: str, name: str) -> None:
        modern = re.sub(r"^__builtin__$", "builtins", module)
        modern = f"{re.sub(r'^numpy[.]core[.]', 'numpy._core.', modern)}.{name}"
        if modern not in self._functions and modern not in self._names:
            from senet_transfer.weights.formats.refusal import refuse

            refuse(self._path, f"{module}.{name}")
        self._stack.append(Global(modern))

    def _op_reduce(self, _: Any) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(function, Global) or type(arguments) is not tuple:
            raise ValueError("a call of something that is not a function")
        if function.name not in self._functions:
            raise ValueError(f"a call of {function.name}, which weights do not need")
        self._charge(arguments)
        self._stack.append(self._functions[function.name](*arguments))

    def _op_newobj(self, argument: Any) -> None:
        self._op_reduce(argument)

    def _op_build(self, _: Any) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if hasattr(target, "build"):
            self._charge(state)
            target.build(state)
        elif type(target) is not dict:  # a dict's attributes (state_dict's _metadata) are dropped
            raise ValueError(f"attributes for a {type(target).__name__}")

    def _op_binpersid(self, _: Any) -> None:
        self._op_persid(self._stack.pop())

    def _op_persid(self, identity: Any) -> None:
        if self._persistent_load is None:
            raise ValueError("a reference to data outside the pickle")
        self._stack.append(self._persistent_load(identity))


def length_of(stream: io.BytesIO) -> int:
    """The bytes in a stream. (``getbuffer`` would copy all of them first.)"""
    place = stream.tell()
    length = stream.seek(0, io.SEEK_END)
    stream.seek(place)
    return length
