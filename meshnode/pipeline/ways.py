"""What a node tells of its links: how far other members are, and how much comes from them. Sans-IO.

Each measures what comes in, by its own clock, and tells whoever plans: of two nodes' words together
both directions are known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from meshnode.errors import BadMessage
from meshnode.pipeline.sounding import LINK_BYTES_PER_S
from meshnode.pipeline.speeds import ASSUMED_LINK, Link
from tunnels.peer import KEY_BYTES, PeerId

MAX_WAYS = 64
MAX_RTT_US = 60_000_000
MAX_AGE_S = 366 * 24 * 3600
Row = list[bytes | int | None]


@dataclass(frozen=True)
class Way:
    """From a peer to the node that tells of it. `rtt_s`: there and back; `bytes_per_s`: of what
    comes from there, measured `age_s` ago."""

    peer: PeerId
    rtt_s: float | None = None
    bytes_per_s: float | None = None
    age_s: float = 0.0

    def to_row(self) -> Row:
        """Nothing but whole numbers: what is no number cannot be said."""
        rtt_us = None if self.rtt_s is None else min(round(self.rtt_s * 1e6), MAX_RTT_US)
        rate = None if self.bytes_per_s is None else round(self.bytes_per_s)
        return [self.peer.key, rtt_us, rate, min(round(self.age_s), MAX_AGE_S)]


def read_ways(rows: object) -> tuple[Way, ...]:
    """What a peer tells. A figure that cannot be is not known. Raises `BadMessage`."""
    if not isinstance(rows, list) or len(rows) > MAX_WAYS:
        raise BadMessage("the peer tells of its links in an unknown shape")
    return tuple(map(_way, rows))


def _way(row: object) -> Way:
    if not isinstance(row, list) or len(row) < 4:
        raise BadMessage("the peer tells of its links in an unknown shape")
    key, rtt_us, rate, age_s = row[:4]
    if not isinstance(key, bytes) or len(key) != KEY_BYTES:
        raise BadMessage("the peer tells of a link to nobody")
    rtt = _within(rtt_us, 0, MAX_RTT_US)
    return Way(
        PeerId(key),
        None if rtt is None else rtt / 1e6,
        _within(rate, *LINK_BYTES_PER_S),
        _within(age_s, 0, MAX_AGE_S) or 0.0,
    )


def _within(value: object, least: float, most: float) -> float | None:
    return float(value) if type(value) is int and least <= value <= most else None


def links_of_ways(
    names: Mapping[PeerId, str], told: Iterable[tuple[str, Sequence[Way]]], home: str
) -> dict[tuple[str, str], Link]:
    """By (from, to), what all together say. names: of those that are planned with; told: by whom.
    Of round trips, `home` believes itself first."""
    incoming = {
        (names[way.peer], teller): way
        for teller, ways in told
        for way in ways
        if way.peer in names and names[way.peer] != teller
    }
    links = {}
    for start, end in {*incoming, *((end, start) for start, end in incoming)}:
        way, back = incoming.get((start, end)), incoming.get((end, start))
        words = {start: back, end: way}
        heard = [words[home]] if words.get(home) else list(words.values())
        rtts = [one.rtt_s for one in heard if one is not None and one.rtt_s is not None]
        if not rtts:
            continue
        rate = way.bytes_per_s if way else None
        links[start, end] = Link(
            min(rtts),
            rate or ASSUMED_LINK.bytes_per_s,
            is_measured=rate is not None,
            age_s=way.age_s if way and rate else 0.0,
        )
    return links
