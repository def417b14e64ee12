"""Reproducible random damage to files, for fuzz tests."""

import struct
from collections.abc import Callable

import numpy as np

# Lengths, counts and indices that readers may not handle correctly.
_EXTREMES = (0, 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1)
_EDGE = 256


def _position(rng: np.random.Generator, data: bytes) -> int:
    """Return a random position in a file; half of the positions are near its start or end."""
    edge = min(_EDGE, len(data))
    where = rng.integers(4)
    if where == 0:
        return int(rng.integers(edge))
    if where == 1:
        return len(data) - 1 - int(rng.integers(edge))
    return int(rng.integers(len(data)))


def _span(rng: np.random.Generator, data: bytes) -> tuple[int, int]:
    start = _position(rng, data)
    return start, min(len(data), start + int(rng.integers(1, 40)))


def _flip_bits(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    damaged = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        damaged[_position(rng, data)] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def _set_bytes(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    start, end = _span(rng, data)
    filler = [b"\0", b"\xff", rng.bytes(1)][rng.integers(3)]
    return data[:start] + filler * (end - start) + data[end:]


def _cut(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    return data[: _position(rng, data)]


def _cut_head(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    return data[_position(rng, data) :]


def _delete(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    start, end = _span(rng, data)
    return data[:start] + data[end:]


def _insert(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    place = _position(rng, data)
    return data[:place] + rng.bytes(int(rng.integers(1, 20))) + data[place:]


def _repeat(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    start, end = _span(rng, data)
    return data[:end] + data[start:end] * int(rng.integers(1, 50)) + data[end:]


def _exchange(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    (a, b), (c, d) = sorted((_span(rng, data), _span(rng, data)))
    return data if b > c else data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def _extreme(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    value = _EXTREMES[rng.integers(len(_EXTREMES))]
    size = int(rng.choice([1, 2, 4, 8]))
    raw = struct.pack("<Q", value)[:size]
    place = _position(rng, data)
    return data[:place] + raw + data[place + size :]


def _graft(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    start, end = _span(rng, data)
    place = int(rng.integers(len(other)))
    return data[:start] + other[place : place + int(rng.integers(1, 60))] + data[end:]


MUTATIONS: tuple[Callable[[np.random.Generator, bytes, bytes], bytes], ...] = (
    _flip_bits,
    _flip_bits,
    _flip_bits,
    _set_bytes,
    _cut,
    _cut_head,
    _delete,
    _insert,
    _repeat,
    _exchange,
    _extreme,
    _extreme,
    _extreme,
    _graft,
)


def mutate(data: bytes, other: bytes, seed: int) -> tuple[str, bytes]:
    """Damage a file once or twice.

    Args:
        data: Content of the file.
        other: Content of another file, parts of which may be inserted.
        seed: Seed that determines the damage.

    Returns:
        A description of the damage for failure messages, and the damaged content.
    """
    rng = np.random.default_rng(seed)
    done = []
    for _ in range(int(rng.integers(1, 3))):
        mutation = MUTATIONS[rng.integers(len(MUTATIONS))]
        if data:
            done.append(mutation.__name__.strip("_"))
            data = mutation(rng, data, other)
    return " then ".join(done), data
