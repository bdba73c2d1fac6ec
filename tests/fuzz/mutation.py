"""How a valid input becomes a hostile one: at random, from a seed, the same in every run.

A `Format` says what the parts of an input are. `BytesFormat` knows bytes only; `JsonFormat` and
`CborFormat` change values, so that their damage lies behind the syntax; `SealedFormat` damages what
lies under a checksum or a length and puts the right one on again.
"""

from __future__ import annotations

import datetime
import json
import random
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any, Protocol

import cbor2

INTEGERS = (0, 1, 2, 7, 8, 15, 16, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, 1024, 4095, 4096)
POWERS = (8, 15, 16, 24, 31, 32, 33, 40, 53, 62, 63, 64, 65, 128)
MAX_DEPTH = 64
MAX_TEXT = 4 << 20  # inputs are cut at far less; what is repeated again and again ends here
INFLATED_BYTES = 32 * 1024


class Format(Protocol):
    def mutated(self, data: bytes, other: bytes, dice: random.Random) -> bytes:
        """`data` changed at one to four places, perhaps with a part of `other`."""


def integer(dice: random.Random) -> int:
    """A number that lies at some boundary."""
    if dice.random() < 0.4:
        return dice.choice(INTEGERS)
    return (1 << dice.choice(POWERS)) + dice.randint(-2, 1)


class BytesFormat:
    """Bit flips, cuts, repeats, splices, lies in number fields of every width."""

    def mutated(self, data: bytes, other: bytes, dice: random.Random) -> bytes:
        changed = bytearray(data)
        for _ in range(1 + int(dice.random() ** 2 * 4)):
            dice.choice(_BYTE_CHANGES)(changed, other, dice)
        return bytes(changed)


def _flip(data: bytearray, other: bytes, dice: random.Random) -> None:
    if data:
        data[int(dice.random() * len(data))] ^= 1 << int(dice.random() * 8)


def _set(data: bytearray, other: bytes, dice: random.Random) -> None:
    if data:
        data[int(dice.random() * len(data))] = int(dice.random() * 256)


def _write_number(data: bytearray, other: bytes, dice: random.Random) -> None:
    width = dice.choice((1, 2, 3, 4, 8))
    at = int(dice.random() * (len(data) + 1))
    number = integer(dice) & ((1 << 8 * width) - 1)
    data[at : at + width] = number.to_bytes(width, dice.choice(("big", "little")))


def _nudge(data: bytearray, other: bytes, dice: random.Random) -> None:
    if data:
        at = int(dice.random() * len(data))
        data[at] = (data[at] + dice.choice((-1, 1))) & 255


def _truncate(data: bytearray, other: bytes, dice: random.Random) -> None:
    del data[int(dice.random() * (len(data) + 1)) :]


def _cut_out(data: bytearray, other: bytes, dice: random.Random) -> None:
    at = int(dice.random() * (len(data) + 1))
    del data[at : at + 1 + int(dice.random() ** 3 * 64)]


def _repeat(data: bytearray, other: bytes, dice: random.Random) -> None:
    at = int(dice.random() * (len(data) + 1))
    piece = data[at : at + 1 + int(dice.random() ** 2 * 64)]
    times = 1 + int(dice.random() * 3)
    if dice.random() < 0.01 and piece:
        times = INFLATED_BYTES // len(piece)
    data[at:at] = piece * times


def _insert(data: bytearray, other: bytes, dice: random.Random) -> None:
    at = int(dice.random() * (len(data) + 1))
    data[at:at] = dice.randbytes(1 + int(dice.random() * 8))


def _splice(data: bytearray, other: bytes, dice: random.Random) -> None:
    start = int(dice.random() * (len(other) + 1))
    piece = other[start : start + 1 + int(dice.random() * 128)]
    at = int(dice.random() * (len(data) + 1))
    data[at : at + (len(piece) if dice.random() < 0.5 else 0)] = piece


_ByteChange = Callable[[bytearray, bytes, random.Random], None]
_BYTE_CHANGES: tuple[_ByteChange, ...] = (
    *(_flip, _flip, _set, _write_number, _write_number, _nudge),
    *(_truncate, _cut_out, _repeat, _insert, _splice),
)


class SealedFormat:
    """Inputs are bodies; `seal` makes the text or bytes that travel. Some are damaged after it."""

    def __init__(self, seal: Callable[[bytes], bytes], inner: Format | None = None) -> None:
        self._seal = seal
        self._inner = inner or BytesFormat()
        self._outer = BytesFormat()

    def mutated(self, data: bytes, other: bytes, dice: random.Random) -> bytes:
        if dice.random() < 0.2:
            return self._outer.mutated(self._seal(data), self._seal(other), dice)
        return self._seal(self._inner.mutated(data, other, dice))


class _TreeFormat:
    """Lists, maps and leaves: one node at a time is replaced, doubled, dropped, nested."""

    _leaves: Sequence[Any]

    def __init__(self) -> None:
        self._bytes = BytesFormat()
        self._known: dict[bytes, Any] = {}

    def mutated(self, data: bytes, other: bytes, dice: random.Random) -> bytes:
        if dice.random() < 0.2:
            return self._bytes.mutated(data, other, dice)
        try:
            value, spare = self._value(data), self._value(other)
            for _ in range(1 + int(dice.random() ** 2 * 3)):
                value = self._changed(value, spare, dice)
            return self._encode(value)
        except (ValueError, TypeError, OverflowError, RecursionError, cbor2.CBORError):
            return self._bytes.mutated(data, other, dice)

    def _value(self, data: bytes) -> Any:
        """Decoded once for each of the corpus; changes never alter it. One cut short may be large,
        and take a decoder as long as a whole one: it is not tried again either."""
        if data not in self._known:
            if len(self._known) > 4096:
                self._known.clear()
            self._known[data] = _UNREADABLE
            self._known[data] = self._decode(data)
        if self._known[data] is _UNREADABLE:
            raise ValueError("this was tried before")
        return self._known[data]

    def _changed(self, value: Any, spare: Any, dice: random.Random) -> Any:
        if isinstance(value, list | dict) and value and dice.random() < 0.85:
            return self._child_changed(value, spare, dice)
        if isinstance(value, int) and not isinstance(value, bool) and dice.random() < 0.3:
            return value + dice.choice((-1, 1))
        if isinstance(value, str | bytes) and dice.random() < 0.4:
            return self._text_changed(value, dice)
        roll = dice.random()
        if roll < 0.15:
            return _some_node(spare, dice)
        if roll < 0.25:
            return integer(dice) * dice.choice((1, 1, -1))
        if roll < 0.30:
            nested: Any = value
            for _ in range(dice.choice((1, 2, MAX_DEPTH))):
                nested = [nested] if dice.random() < 0.5 else {"a": nested}
            return nested
        return dice.choice(self._leaves)

    def _child_changed(self, value: Any, spare: Any, dice: random.Random) -> Any:
        copy = value.copy()
        key = dice.choice(range(len(copy)) if isinstance(copy, list) else list(copy))
        roll = dice.random()
        if roll < 0.08:
            del copy[key]
        elif roll < 0.16 and isinstance(copy, list):
            times = dice.choice((1, 1, 16, 17, 2000)) if dice.random() < 0.1 else 1
            copy[key:key] = [copy[key]] * times
        elif roll < 0.16:
            copy[dice.choice(list(copy))] = copy[key]
        elif roll < 0.18 and isinstance(copy, dict):
            copy[dice.choice(self._leaves[:4])] = copy.pop(key)
        else:
            copy[key] = self._changed(copy[key], spare, dice)
        return copy

    def _text_changed(self, value: str | bytes, dice: random.Random) -> str | bytes:
        at = int(dice.random() * (len(value) + 1))
        roll = dice.random()
        if roll < 0.3:
            return value[:at]
        if roll < 0.4:
            times = dice.choice((2, 9, 600))
            return value * (times if len(value) * times <= MAX_TEXT else 1)
        odd = dice.choice(_ODD_TEXTS)
        piece = odd if isinstance(value, str) else odd.encode("utf-8", "surrogatepass")
        return value[:at] + piece + value[at + 1 :]  # type: ignore[operator]

    def _decode(self, data: bytes) -> Any:
        raise NotImplementedError

    def _encode(self, value: Any) -> bytes:
        raise NotImplementedError


_UNREADABLE = object()


def _some_node(value: Any, dice: random.Random) -> Any:
    while isinstance(value, list | dict) and value and dice.random() < 0.8:
        value = dice.choice(value if isinstance(value, list) else list(value.values()))
    return value


_ODD_TEXTS = (
    "\0",
    "\n",
    "\x1b[2J",
    "\u202e",
    "%",
    "/",
    "..",
    "٣",
    "é",
    "\U0001f600",
    "\ud800",
    " ",
)
_PLAIN_LEAVES: tuple[Any, ...] = (
    *("", "a", "\0", "\ud800", "٣", "-1", "1e999", "x" * 600, "a" * 70_000),
    *(True, False, None, 0, -1, 1.5, -0.0, 1e308, float("inf"), float("-inf"), float("nan")),
    *(2**31, 2**53, 2**63, 2**64, -(2**63), 10**30, 10**400),
    *([], {}, [[]], [{}], {"": []}, [1, 2, 3]),
)


class JsonFormat(_TreeFormat):
    """JSON documents; a key may come twice (the bytes are damaged too)."""

    _leaves = _PLAIN_LEAVES

    def _decode(self, data: bytes) -> Any:
        return json.loads(data)

    def _encode(self, value: Any) -> bytes:
        return json.dumps(value).encode("utf-8", "surrogatepass")


class CborFormat(_TreeFormat):
    """CBOR with all that a decoder may make of it: tags, sets, decimals, dates, shared values."""

    _leaves = (
        *(leaf for leaf in _PLAIN_LEAVES if leaf not in ("\0", "\ud800")),
        *(b"", b"\0", b"\xff" * 31, b"\1" * 32, b"\2" * 33, b"x" * 5000),
        *(cbor2.undefined, cbor2.CBORSimpleValue(99), Decimal("1.5"), Decimal("NaN")),
        datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC),
        *(cbor2.CBORTag(tag, 1) for tag in (0, 1, 2, 4, 5, 25, 28, 29, 30, 35, 36, 37, 99)),
        cbor2.CBORTag(5, [10**5, 3]),
        cbor2.CBORTag(5, [-(10**18), 3]),
        cbor2.CBORTag(4, ["N", 1]),
        cbor2.CBORTag(30, [1, 0]),
        cbor2.CBORTag(35, "(a{1,60000}){1,60000}"),
        cbor2.CBORTag(258, [1, [2]]),
        cbor2.CBORTag(28, [cbor2.CBORTag(29, 0)]),  # a list that holds itself
    )

    def _decode(self, data: bytes) -> Any:
        return cbor2.loads(data)

    def _encode(self, value: Any) -> bytes:
        return cbor2.dumps(value)
