"""CBOR from outside: maps, lists, texts, bytes, numbers, and nothing else that CBOR can say.

Tags are refused: a decimal of 64 KiB keeps a core busy for a second and one of 16 MiB for days
(its digits are made one from another), and shared values can hold themselves. So are keys that are
no text or bytes (their hashes can be made to collide) and a map that says a key twice. Of values
there are so many at most that what is made of a message is not many times as large as it.
"""

from __future__ import annotations

from typing import Any, NoReturn

import cbor2

MAX_DEPTH = 32
MAX_VALUES = 1 << 18
"""In all, keys too: nine for each tensor of a model, of which the largest have some thousands."""
_ARGUMENT_BYTES = {24: 1, 25: 2, 26: 4, 27: 8}  # RFC 8949 section 3
_BYTES, _TEXT = 2, 3
_KNOWN_TAGS = 65536  # all that cbor2 has a decoder for are below


class BadCbor(Exception):
    """Bytes that are no CBOR, or CBOR that this mesh does not speak."""


def loads_untrusted(data: bytes, max_values: int = MAX_VALUES) -> Any:
    """The value in `data`; raises `BadCbor` and nothing else."""
    if len(data) > max_values:
        _count_values(data, max_values)
    try:
        return cbor2.loads(
            data,
            tag_hook=_refuse,
            semantic_decoders=_NO_TAGS,
            max_depth=MAX_DEPTH,
            allow_indefinite=False,
            allow_duplicate_keys=False,
            strict_hashable_types=True,
        )
    except (cbor2.CBORError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        raise BadCbor("not CBOR, or not of the kind that is spoken here") from error


def _count_values(data: bytes, max_values: int) -> None:
    """Raises `BadCbor` for too many. Looks at heads alone; what is damaged is left to cbor2."""
    place = 0
    for _ in range(max_values):
        if place >= len(data):
            return
        kind, argument = data[place] >> 5, data[place] & 31
        place += 1
        if width := _ARGUMENT_BYTES.get(argument, 0):
            argument = int.from_bytes(data[place : place + width], "big")
            place += width
        if kind in (_BYTES, _TEXT):
            place += argument
    if place < len(data):
        raise BadCbor("too many values in one message")


def _refuse(*_: object) -> NoReturn:
    raise cbor2.CBORDecodeError("a tag")


_NO_TAGS = dict.fromkeys(range(_KNOWN_TAGS), _refuse)
