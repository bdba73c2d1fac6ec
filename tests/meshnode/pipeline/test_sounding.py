"""What a few bursts tell of a link, whatever its delay, and whatever disturbs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.pipeline.sounding import (
    BURST_LIMIT_S,
    BURSTS_BYTES,
    FRESH_S,
    LINK_BYTES_PER_S,
    LONG_S,
    MOST_BYTES,
    Sounding,
    Soundings,
)
from tunnels import PeerId

PIECE = 8192
PEER, OTHER = PeerId(bytes(range(32))), PeerId(bytes(32))


@dataclass
class Wire:
    """A link in one direction. late: what else a piece waits for, by its number."""

    bytes_per_s: float
    rtt_s: float = 0.0
    first_s: float = 0.0
    late: Callable[[int], float] = lambda _piece: 0.0

    def sound(self, *, limit_s: float = BURST_LIMIT_S) -> tuple[Sounding, int]:
        """The sounding, and how many bytes were asked for."""
        sounding, now, asked, pieces = Sounding(), 100.0, 0, 0
        while (size := sounding.next_bytes()) is not None:
            sounding.ask(size, now)
            asked += size
            free_s = now + self.rtt_s + (self.first_s if asked == size else 0.0)
            first_s = math.inf
            while left := sounding.missing_bytes():
                piece = min(left, PIECE)
                free_s += piece / self.bytes_per_s
                came_s = max(now, free_s + self.late(pieces))
                if came_s > first_s + limit_s:
                    break
                pieces += 1
                sounding.arrive(piece, came_s)
                first_s, now = min(first_s, came_s), came_s
        return sounding, asked

    def found(self) -> float:
        rate = self.sound()[0].bytes_per_s
        assert rate is not None
        return rate


@pytest.mark.parametrize("rtt_s", [0.0, 0.002, 0.06, 0.3])
@pytest.mark.parametrize("rate", [5e4, 1e6, 5e6, 12.5e6, 125e6, 1e9])
def test_a_rate_is_found_whatever_the_delay(rate: float, rtt_s: float) -> None:
    assert Wire(rate, rtt_s, first_s=0.2).found() == pytest.approx(rate, rel=0.02)


def test_a_sounding_is_bounded_in_bytes_and_a_slow_link_carries_few() -> None:
    assert Wire(1e9).sound()[1] == MOST_BYTES < 1 << 20
    assert Wire(5e4).sound()[1] == BURSTS_BYTES[0], "what did not come in time is the last"
    assert Wire(2.5e5).sound()[1] == 2 * BURSTS_BYTES[0]
    fast = Wire(BURSTS_BYTES[1] / LONG_S / 1.3)
    assert fast.sound()[1] == BURSTS_BYTES[0] + 2 * BURSTS_BYTES[1]


def test_a_reader_that_is_held_up_sees_a_link_no_faster_than_it_is() -> None:
    """What waits meanwhile comes all at once, and would look like a fast link."""

    def held_up(piece: int) -> float:
        return 0.02 if piece % 40 < 10 else 0.0

    assert Wire(5e6, 0.002, late=held_up).found() < 1.05 * 5e6
    once = Wire(5e6, 0.002, late=lambda piece: 0.03 if piece == 40 else 0.0)
    assert once.found() == pytest.approx(5e6, rel=0.1), "the better of two counts"


def test_nothing_is_known_of_a_link_on_which_nothing_came() -> None:
    sounding = Sounding()
    assert sounding.bytes_per_s is None
    sounding.ask(BURSTS_BYTES[0], 1.0)
    assert sounding.bytes_per_s is None
    sounding.arrive(1000, 1.1)
    assert sounding.next_bytes() is None
    assert sounding.bytes_per_s is None, "one piece has no duration"


@given(
    st.lists(st.tuples(st.integers(1, PIECE), st.floats(0, 1)), min_size=1, max_size=40),
    st.floats(0, 1e6),
)
def test_whatever_comes_the_rate_is_within_bounds(
    pieces: list[tuple[int, float]], now: float
) -> None:
    sounding = Sounding()
    for size, after_s in pieces:
        if (wanted := sounding.next_bytes()) is not None:
            sounding.ask(wanted, now)
        now += after_s
        sounding.arrive(min(size, sounding.missing_bytes()) or 1, now)
    rate = sounding.bytes_per_s
    assert rate is None or LINK_BYTES_PER_S[0] <= rate <= LINK_BYTES_PER_S[1]


def test_what_was_found_holds_for_its_link_and_for_a_while() -> None:
    found = Soundings()
    assert found.is_due(PEER, "tcp a", 5.0)
    assert found.find(PEER, "tcp a") is None
    found.keep(PEER, "tcp a", 1e6, 5.0)
    known = found.find(PEER, "tcp a")
    assert known is not None
    assert (known.bytes_per_s, known.at_s) == (1e6, 5.0)
    assert not found.is_due(PEER, "tcp a", 5.0 + FRESH_S - 1)
    assert found.is_due(PEER, "tcp a", 5.0 + FRESH_S)
    assert found.find(PEER, "quic b") is None, "another link has another rate"
    assert found.is_due(PEER, "quic b", 6.0)


@pytest.mark.parametrize("then", [1e4, 1e9])
def test_what_is_found_later_counts_alone_whether_it_fell_or_rose(then: float) -> None:
    found = Soundings()
    found.keep(PEER, "tcp a", 1e6, 5.0)
    found.keep(PEER, "tcp a", then, 50.0)
    known = found.find(PEER, "tcp a")
    assert known is not None
    assert known.bytes_per_s == then


def test_a_sounding_in_vain_leaves_what_is_known_and_is_not_repeated_at_once() -> None:
    found = Soundings()
    found.keep(PEER, "tcp a", 1e6, 5.0)
    found.keep(PEER, "tcp a", None, 50.0)
    known = found.find(PEER, "tcp a")
    assert known is not None
    assert known.at_s == 5.0
    assert not found.is_due(PEER, "tcp a", 51.0)
    found.keep(OTHER, "tcp b", 1e6, 50.0)
    found.forget_others([OTHER])
    assert found.find(PEER, "tcp a") is None
    assert found.find(OTHER, "tcp b") is not None
