"""How large datagrams may be is found on every path, and forgotten when the path is another one."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunnels.pmtu import (
    BASE_BYTES,
    BLACK_HOLE_LOSSES,
    BLACK_HOLE_TIMEOUTS,
    LARGEST_V4_BYTES,
    NARROW_BYTES,
    PROBES,
    RAISE_AFTER_S,
    SETTLE_S,
    PathMtu,
)


def search(mtu: PathMtu, carries: int, now: float = 0.0, loss: float = 0.0, seed: int = 0) -> int:
    """Answers every probe until there are no more now; how many that were."""
    dice = random.Random(seed)
    probes = 0
    while (size := mtu.probe(now)) is not None:
        probes += 1
        assert probes < 100
        if size <= carries and dice.random() >= loss:
            mtu.delivered(size, now)
        else:
            mtu.lost(size, now)
    return probes


def found(carries: int) -> PathMtu:
    mtu = PathMtu(LARGEST_V4_BYTES, 0.0)
    search(mtu, carries)
    return mtu


def test_a_path_like_most_takes_one_probe() -> None:
    mtu = PathMtu(LARGEST_V4_BYTES, 0.0)
    assert mtu.size == BASE_BYTES
    assert mtu.deadline() == 0
    assert search(mtu, 1500) == 1
    assert mtu.size == LARGEST_V4_BYTES
    assert mtu.probe(10_000) is None
    assert mtu.deadline() == math.inf


@given(carries=st.integers(BASE_BYTES, 1500))
def test_whatever_a_path_carries_is_found(carries: int) -> None:
    mtu = PathMtu(LARGEST_V4_BYTES, 0.0)
    probes = search(mtu, carries)
    wanted = min(carries, LARGEST_V4_BYTES)
    assert wanted - NARROW_BYTES < mtu.size <= wanted
    assert probes <= 1 + 6 * PROBES


@given(carries=st.integers(BASE_BYTES, 1500), loss=st.floats(0, 0.9), seed=st.integers(0, 1000))
def test_losses_of_other_causes_make_it_smaller_at_worst(
    carries: int, loss: float, seed: int
) -> None:
    mtu = PathMtu(LARGEST_V4_BYTES, 0.0)
    search(mtu, carries, loss=loss, seed=seed)
    assert BASE_BYTES <= mtu.size <= carries


def test_one_probe_at_a_time() -> None:
    mtu = PathMtu(LARGEST_V4_BYTES, 0.0)
    assert mtu.probe(0.0) == LARGEST_V4_BYTES
    assert mtu.probe(0.0) is None
    assert mtu.deadline() == math.inf


def test_a_path_that_became_wider_is_noticed_later() -> None:
    mtu = found(carries=1300)
    assert mtu.size < 1301
    assert search(mtu, 1500, now=RAISE_AFTER_S - 1) == 0
    assert mtu.deadline() == RAISE_AFTER_S
    search(mtu, 1500, now=RAISE_AFTER_S)
    assert mtu.size == LARGEST_V4_BYTES


def test_another_path_begins_anew_and_old_answers_do_not_count() -> None:
    mtu = PathMtu(LARGEST_V4_BYTES, 0.0)
    size = mtu.probe(0.0)
    assert size is not None
    mtu.restart(1452, 1.0)
    mtu.delivered(size, 1.0)
    mtu.lost(size, 1.0)
    assert mtu.size == BASE_BYTES
    assert mtu.probe(1.0) == 1452


def test_timeouts_in_a_row_are_a_black_hole() -> None:
    mtu = found(carries=1500)
    for _ in range(BLACK_HOLE_TIMEOUTS - 1):
        mtu.timed_out(50.0)
    mtu.answered()
    for _ in range(BLACK_HOLE_TIMEOUTS - 1):
        mtu.timed_out(50.0)
    assert mtu.size == LARGEST_V4_BYTES
    mtu.timed_out(50.0)
    assert mtu.size == BASE_BYTES
    assert mtu.probe(50.0) is None
    search(mtu, 1400, now=50.0 + SETTLE_S)
    assert 1400 - NARROW_BYTES < mtu.size <= 1400


def test_large_packets_that_all_get_lost_are_a_black_hole() -> None:
    mtu = found(carries=1500)
    assert not mtu.suspects
    for _ in range(BLACK_HOLE_LOSSES - 1):
        mtu.large_lost(50.0)
    assert mtu.suspects
    mtu.large_delivered()  # the network was full, no more
    for _ in range(BLACK_HOLE_LOSSES - 1):
        mtu.large_lost(50.0)
    assert mtu.size == LARGEST_V4_BYTES
    mtu.large_lost(50.0)
    assert mtu.size == BASE_BYTES


@pytest.mark.parametrize("count", [1, 10])
def test_silence_on_the_smallest_size_says_nothing_about_sizes(count: int) -> None:
    mtu = PathMtu(LARGEST_V4_BYTES, 0.0)
    assert mtu.probe(0.0) == LARGEST_V4_BYTES
    for _ in range(count):
        mtu.timed_out(1.0)
    mtu.delivered(LARGEST_V4_BYTES, 2.0)
    assert mtu.size == LARGEST_V4_BYTES
