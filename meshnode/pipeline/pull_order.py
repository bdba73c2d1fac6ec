"""What a worker is to have on its own disk before it grants a lease, and from where. Sans-IO.

It travels inside the request for the lease, as CBOR: version, reference, provisional identity (32
bytes), and the positions of the tensors among those that the request names, four bytes each,
little-endian, rising. The grant brings back the digest of each of them, in the same order: whoever
has the bytes says what they are.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import cbor2

from meshnode.cbor import BadCbor, loads_untrusted
from meshnode.errors import BadMessage
from meshnode.models.manifest import DIGEST_BYTES

MAX_REFERENCE_CHARS = 2048
_VERSION = 1


@dataclass(frozen=True)
class PullOrder:
    """`reference`: of the source, as a user writes it (`https://…`, `hf:…`). `provisional`: the
    identity (`meshnode.models.identity`) of what the orchestrator saw there. `needed`: positions,
    rising."""

    reference: str
    provisional: str
    needed: tuple[int, ...]


def to_wire(order: PullOrder) -> bytes:
    """What `from_wire_untrusted` reads."""
    needed = struct.pack(f"<{len(order.needed)}I", *order.needed)
    row = [_VERSION, order.reference, bytes.fromhex(order.provisional), needed]
    return cbor2.dumps(row)


def from_wire_untrusted(data: bytes, n_tensors: int) -> PullOrder:
    """Raises `BadMessage` and nothing else. n_tensors: how many the request names."""
    try:
        version, reference, provisional, needed = loads_untrusted(data)
    except (BadCbor, ValueError, TypeError) as error:
        raise _damaged() from error
    if version != _VERSION:
        raise BadMessage("the peer asks for a pull in a format this mesh does not know: update it")
    if not _is_text(reference, MAX_REFERENCE_CHARS):
        raise _damaged()
    if not isinstance(provisional, bytes) or len(provisional) != DIGEST_BYTES:
        raise _damaged()
    if not isinstance(needed, bytes) or len(needed) % 4 or len(needed) // 4 > n_tensors:
        raise _damaged()
    positions = struct.unpack(f"<{len(needed) // 4}I", needed)
    if any(one >= other for one, other in pairwise((*positions, n_tensors))):
        raise _damaged()
    return PullOrder(reference, provisional.hex(), positions)


def pack_digests(digests: Sequence[bytes]) -> bytes:
    """One after the other."""
    return b"".join(digests)


def unpack_digests_untrusted(data: bytes, count: int) -> tuple[bytes, ...]:
    """So many, or none where the worker tells none. Raises `BadMessage` and nothing else."""
    if len(data) not in (0, count * DIGEST_BYTES):
        raise BadMessage("the worker's digests are not of the tensors that it was to have")
    return tuple(data[at : at + DIGEST_BYTES] for at in range(0, len(data), DIGEST_BYTES))


def _is_text(value: Any, most_chars: int) -> bool:
    return isinstance(value, str) and 0 < len(value) <= most_chars and value.isprintable()


def _damaged() -> BadMessage:
    return BadMessage("the peer asks for a pull in words that make no sense")
