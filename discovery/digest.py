"""Sixteen bytes that stand for all that is known, and where two nodes know different things.

Each member known has a number; the pair is an entry. Entries lie in CELLS cells by the first byte
of the key: a hash for each, and one over all of them, the root. Sans-IO.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping

from blake3 import blake3

from tunnels.errors import BadFrame
from tunnels.peer import KEY_BYTES, PeerId

CELLS = 64
CELL_BYTES = 8
ROOT_BYTES = 16
MAX_NUMBER = 2**62
_ENTRY = struct.Struct(">32sQ")
_EMPTY = bytes(CELL_BYTES)


class Digest:
    """I stand for the entries put into me."""

    def __init__(self) -> None:
        self._numbers: list[dict[PeerId, int]] = [{} for _ in range(CELLS)]
        self._hashes: list[bytes | None] = [_EMPTY] * CELLS  # None: to be made anew

    def put(self, peer: PeerId, number: int) -> None:
        self._numbers[cell_of(peer)][peer] = number
        self._hashes[cell_of(peer)] = None

    def drop(self, peer: PeerId) -> None:
        self._numbers[cell_of(peer)].pop(peer, None)
        self._hashes[cell_of(peer)] = None

    def get(self, peer: PeerId) -> int | None:
        return self._numbers[cell_of(peer)].get(peer)

    def __len__(self) -> int:
        return sum(map(len, self._numbers))

    def root(self) -> bytes:
        return blake3(b"".join(self.cells())).digest(ROOT_BYTES)

    def cells(self) -> tuple[bytes, ...]:
        """The hash of each cell; of an empty one, zeros."""
        return tuple(self._hash(cell) for cell in range(CELLS))

    def entries(self, cells: Iterable[int]) -> dict[PeerId, int]:
        return {peer: n for cell in cells for peer, n in self._numbers[cell].items()}

    def size(self, cell: int) -> int:
        return len(self._numbers[cell])

    def _hash(self, cell: int) -> bytes:
        known = self._hashes[cell]
        if known is None:
            entries = self._numbers[cell]
            known = blake3(pack_entries(entries)).digest(CELL_BYTES) if entries else _EMPTY
            self._hashes[cell] = known
        return known


def cell_of(peer: PeerId) -> int:
    return peer.key[0] % CELLS


def pack_entries(entries: Mapping[PeerId, int]) -> bytes:
    return b"".join(_ENTRY.pack(peer.key, entries[peer]) for peer in sorted(entries))


def parse_entries_untrusted(data: object, limit: int) -> dict[PeerId, int]:
    """At most `limit` of them; raises `BadFrame` only."""
    if not isinstance(data, bytes) or len(data) % _ENTRY.size or len(data) > limit * _ENTRY.size:
        raise BadFrame("entries of an unknown shape, or too many")
    entries = {PeerId(key): number for key, number in _ENTRY.iter_unpack(data)}
    if any(number > MAX_NUMBER for number in entries.values()):
        raise BadFrame("an entry's number is out of range")
    return entries


def pack_keys(peers: Iterable[PeerId]) -> bytes:
    return b"".join(peer.key for peer in peers)


def parse_keys_untrusted(data: object, limit: int) -> list[PeerId]:
    """At most `limit` of them; raises `BadFrame` only."""
    if not isinstance(data, bytes) or len(data) % KEY_BYTES or len(data) > limit * KEY_BYTES:
        raise BadFrame("keys of an unknown shape, or too many")
    return [PeerId(data[at : at + KEY_BYTES]) for at in range(0, len(data), KEY_BYTES)]


def pack_cells(hashes: Iterable[bytes]) -> bytes:
    return b"".join(hashes)


def parse_cells_untrusted(data: object) -> tuple[bytes, ...]:
    """One hash a cell, or nothing at all; raises `BadFrame` only."""
    if not isinstance(data, bytes) or len(data) not in (0, CELLS * CELL_BYTES):
        raise BadFrame("cells of an unknown shape")
    return tuple(data[at : at + CELL_BYTES] for at in range(0, len(data), CELL_BYTES))


def pack_bits(cells: Iterable[int]) -> bytes:
    return sum(1 << cell for cell in cells).to_bytes(CELLS // 8, "big")


def parse_bits_untrusted(data: object) -> list[int]:
    """Which cells are meant; raises `BadFrame` only."""
    if not isinstance(data, bytes) or len(data) != CELLS // 8:
        raise BadFrame("a choice of cells of an unknown shape")
    bits = int.from_bytes(data, "big")
    return [cell for cell in range(CELLS) if bits >> cell & 1]
