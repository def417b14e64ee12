"""The protobuf wire format, read without a copy and without a schema."""

from collections.abc import Iterator
from typing import Any

import numpy as np

# Wire types: how the bytes of a field are laid out.
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


class Message:
    """The bytes of one protobuf message; reading it yields its fields."""

    def __init__(self, data: bytes, start: int = 0, end: int | None = None) -> None:
        self.data = data
        self.start = start
        self.end = len(data) if end is None else end

    def __len__(self) -> int:
        return self.end - self.start

    def fields(self) -> Iterator[tuple[int, int, Any]]:
        """Yields (number, wire type, value): an int, or the :class:`Message` of a field of bytes.

        Raises:
            ValueError: the bytes do not follow the wire format up to their end.
        """
        place = self.start
        while place < self.end:
            tag, place = self._varint(place)
            number, wire_type = tag >> 3, tag & 7
            if number == 0:
                raise ValueError("a field without a number")
            if wire_type == VARINT:
                value, place = self._varint(place)
            elif wire_type in (FIXED32, FIXED64, BYTES):
                length = {FIXED32: 4, FIXED64: 8}.get(wire_type)
                if length is None:
                    length, place = self._varint(place)
                if place + length > self.end:
                    raise ValueError(f"field {number} is longer than what is left of the file")
                value = Message(self.data, place, place + length)
                place += length
            else:
                raise ValueError(f"field {number} is of unknown wire type {wire_type}")
            yield number, wire_type, value

    def varints(self) -> list[int]:
        """The numbers of a packed field."""
        numbers, place = [], self.start
        while place < self.end:
            number, place = self._varint(place)
            numbers.append(number)
        return numbers

    def text(self) -> str:
        return self.data[self.start : self.end].decode("utf-8")

    def numbers(self, dtype: str) -> np.ndarray:
        """The bytes as little-endian numbers, without a copy."""
        count, rest = divmod(len(self), np.dtype(dtype).itemsize)
        if rest:
            raise ValueError("packed numbers that are cut short")
        return np.frombuffer(self.data, dtype, count, self.start)

    def _varint(self, place: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if place >= self.end:
                raise ValueError("a number is cut short")
            byte = self.data[place]
            place += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFFFFFFFFFFFFFF, place
        raise ValueError("a number of more than ten bytes")
