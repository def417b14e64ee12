"""Reading a Caffe network definition (``.prototxt``): protobuf's text format."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from senet_transfer.errors import UserError
from senet_transfer.utils.text import shown
from senet_transfer.weights.formats.caffe.layers import CaffeLayer
from senet_transfer.weights.formats.caffe.schema import LAYER, V1_TYPES, Field, Schema

# The longest published definition, SENet-154's, has 150 kB.
_MAX_BYTES = 2**24
_MAX_NESTING = 32
_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\f\v]+|\#[^\n]*)
    |(?P<newline>\n)
    |(?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
    |(?P<word>[A-Za-z0-9_.+-]+)
    |(?P<mark>[{}<>\[\]:;,])""",
    re.VERBOSE,
)
_CLOSING = {"{": "}", "<": ">"}
_BOOLS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
_V1_NAMES = {old: name for _, old, name in V1_TYPES}


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    line: int


@dataclass(frozen=True)
class _Entry:
    """One ``name: value``. The value is a list of entries, a quoted string, or a bare word."""

    name: str
    value: "list[_Entry] | str"
    quoted: bool
    line: int


def read_prototxt(path: str | Path) -> list[CaffeLayer]:
    """Reads a network definition.

    Returns:
        Its layers in order, as :func:`read_caffemodel` returns them, without numbers. Inputs that
        are stated the old way (``input: "data"``) come as layers of type Input.

    Raises:
        UserError: the file can't be read, with the line where it is not as expected.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UserError(f"{path}: too large for a network definition (.prototxt).")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: can't be read as a network definition (.prototxt), a text file: {error}."
        ) from error
    entries = _Parser(path, text).parse()
    layers = [_layer(path, entry) for entry in entries if entry.name in ("layer", "layers")]
    if not layers:
        raise UserError(f"{path}: no layers inside; expected is a network definition (.prototxt).")
    return _old_inputs(path, entries) + layers


class _Parser:
    def __init__(self, path: Path, text: str) -> None:
        self._path = path
        self._tokens = self._tokenize(text)
        self._next: _Token | None = next(self._tokens, None)
        self._line = 1

    def parse(self) -> list[_Entry]:
        entries = self._entries(0)
        if self._next is not None:
            _fail(self._path, self._next.line, f"{self._next.text!r} without its opening bracket")
        return entries

    def _tokenize(self, text: str) -> Iterator[_Token]:
        line, place = 1, 0
        while place < len(text):
            match = _TOKEN.match(text, place)
            if match is None:
                _fail(self._path, line, f"unexpected {text[place : place + 20].splitlines()[0]!r}")
            place = match.end()
            if match.lastgroup == "newline":
                line += 1
            elif match.lastgroup != "space":
                yield _Token(match.lastgroup, match.group(), line)

    def _take(self) -> _Token:
        token = self._next
        if token is None:
            _fail(self._path, self._line, "the file ends in the middle of a layer")
        self._line = token.line
        self._next = next(self._tokens, None)
        return token

    def _sees(self, *marks: str) -> bool:
        return self._next is not None and self._next.kind == "mark" and self._next.text in marks

    def _entries(self, depth: int) -> list[_Entry]:
        if depth > _MAX_NESTING:
            _fail(self._path, self._line, "nested too deeply")
        entries: list[_Entry] = []
        while self._next is not None and not self._sees("}", ">"):
            name = self._take()
            if name.kind != "word":
                _fail(self._path, name.line, f"{name.text} where a name is expected")
            entries += self._values(name, depth)
            while self._sees(",", ";"):
                self._take()
        return entries

    def _values(self, name: _Token, depth: int) -> list[_Entry]:
        colon = self._sees(":")
        if colon:
            self._take()
        if not self._sees("["):
            return [self._value(name, depth, colon)]
        self._take()
        entries = []
        while not self._sees("]"):
            entries.append(self._value(name, depth, colon))
            if self._sees(","):
                self._take()
        self._take()
        return entries

    def _value(self, name: _Token, depth: int, colon: bool) -> _Entry:
        token = self._take()
        if token.text in _CLOSING:
            entries = self._entries(depth + 1)
            if not self._sees(_CLOSING[token.text]):
                _fail(self._path, token.line, f"{name.text} {token.text} is never closed")
            self._take()
            return _Entry(name.text, entries, quoted=False, line=token.line)
        if token.kind == "mark" or not colon:
            _fail(self._path, token.line, f"{token.text!r} after {name.text!r}, not a value")
        if token.kind == "word":
            return _Entry(name.text, token.text, quoted=False, line=token.line)
        text = _unquote(token.text)
        while self._next is not None and self._next.kind == "string":  # "a" "b" is "ab"
            text += _unquote(self._take().text)
        return _Entry(name.text, text, quoted=True, line=token.line)


def _unquote(token: str) -> str:
    return re.sub(r"\\(.)", r"\1", token[1:-1])


def _layer(path: Path, entry: _Entry) -> CaffeLayer:
    if not isinstance(entry.value, list):
        _fail(path, entry.line, f"{entry.name} has a value instead of {{ ... }}")
    parts: dict[str, list[str]] = {"name": [], "type": [], "bottom": [], "top": []}
    rest = []
    for item in entry.value:
        if item.name not in parts:
            rest.append(item)
        elif isinstance(item.value, list):
            _fail(path, item.line, f"{item.name} is not a text")
        else:
            parts[item.name].append(item.value)
    if not parts["type"]:
        _fail(path, entry.line, f"layer {''.join(parts['name'])!r} has no type")
    kind = parts["type"][-1]
    return CaffeLayer(
        name=parts["name"][-1] if parts["name"] else "",
        type=_V1_NAMES.get(kind, kind) if entry.name == "layers" else kind,
        bottoms=tuple(parts["bottom"]),
        tops=tuple(parts["top"]),
        params=_params(path, rest, LAYER),
    )


def _params(path: Path, entries: list[_Entry], schema: Schema) -> dict[str, Any]:
    fields = {field.name: field for field in schema.values()}
    params: dict[str, Any] = {}
    for entry in entries:
        field = fields.get(entry.name)
        value = _typed(path, entry, field) if field else _untyped(entry)
        if field is None:  # of a fork, or of no use here: a list where it is repeated
            _keep(params, entry.name, value)
        elif field.repeated:
            params.setdefault(field.name, []).append(value)
        elif field.name in params:
            _fail(path, entry.line, f"{field.name} is stated twice")
        else:
            params[field.name] = value
    return params


def _typed(path: Path, entry: _Entry, field: Field) -> Any:
    if isinstance(field.kind, dict):
        if not isinstance(entry.value, list):
            _fail(path, entry.line, f"{field.name} has a value instead of {{ ... }}")
        return _params(path, entry.value, field.kind)
    word = entry.value
    if isinstance(word, list) or (entry.quoted and field.kind is not str):
        _fail(path, entry.line, f"{field.name} is not {_expected(field)}")
    try:
        if field.kind is bool:
            return _BOOLS[word.lower()]
        if isinstance(field.kind, tuple):
            return field.kind[int(word)] if word.isdigit() else field.kind[field.kind.index(word)]
        if field.kind is float:
            return float(word.removesuffix("f"))
        return int(word, 0)
    except (ValueError, KeyError, IndexError):
        _fail(path, entry.line, f"{field.name} is {word!r}, not {_expected(field)}")


def _expected(field: Field) -> str:
    if isinstance(field.kind, tuple):
        return f"one of {', '.join(field.kind)}"
    return {int: "a whole number", float: "a number", bool: "true or false"}[field.kind]


def _untyped(entry: _Entry) -> Any:
    if not isinstance(entry.value, list):
        return entry.value
    values: dict[str, Any] = {}
    for item in entry.value:
        _keep(values, item.name, _untyped(item))
    return values


def _keep(values: dict[str, Any], name: str, value: Any) -> None:
    if name not in values:
        values[name] = value
    elif isinstance(values[name], list):
        values[name].append(value)
    else:
        values[name] = [values[name], value]


def _old_inputs(path: Path, entries: list[_Entry]) -> list[CaffeLayer]:
    """Inputs as NetParameter had them: their names, and four dimensions or a shape for each."""
    names = [entry.value for entry in entries if entry.name == "input"]
    schema = {1: Field("input_dim", int, repeated=True)}
    dims = _params(path, [e for e in entries if e.name == "input_dim"], schema)
    numbers = dims.get("input_dim", [])
    shapes = [{"dim": numbers[i : i + 4]} for i in range(0, len(numbers), 4)]
    stated = [e for e in entries if e.name == "input_shape"]
    shapes += [
        _typed(path, e, Field("input_shape", {1: Field("dim", int, repeated=True)})) for e in stated
    ]
    layers = []
    for index, name in enumerate(names):
        params = {"input_param": {"shape": [shapes[index]]}} if index < len(shapes) else {}
        layers.append(CaffeLayer(str(name), "Input", tops=(str(name),), params=params))
    return layers


def _fail(path: Path, line: int, what: str) -> NoReturn:
    raise UserError(
        f"{path}, line {line}: {shown(what, 200)}. Expected is a Caffe network definition "
        "(.prototxt)."
    )
