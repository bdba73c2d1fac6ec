"""CBOR from outside: maps, lists, texts, bytes, numbers, and nothing else that CBOR can say.

Tags are refused: a decimal of 64 KiB keeps a core busy for a second and one of 16 MiB for days
(its digits are made one from another), and shared values can hold themselves. So are keys that are
no text or bytes (their hashes can be made to collide) and a map that says a key twice.
"""

from __future__ import annotations

from typing import Any, NoReturn

import cbor2

MAX_DEPTH = 32
_KNOWN_TAGS = 65536  # all that cbor2 has a decoder for are below


class BadCbor(Exception):
    """Bytes that are no CBOR, or CBOR that this mesh does not speak."""


def loads_untrusted(data: bytes) -> Any:
    """The value in `data`; raises `BadCbor` and nothing else."""
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


def _refuse(*_: object) -> NoReturn:
    raise cbor2.CBORDecodeError("a tag")


_NO_TAGS = dict.fromkeys(range(_KNOWN_TAGS), _refuse)
