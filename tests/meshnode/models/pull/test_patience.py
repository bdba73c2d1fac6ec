"""A connection that gives a byte now and then, and one that is slow and honest."""

from __future__ import annotations

import pytest

from meshnode.models.pull.patience import LEAST_BYTES_PER_S, Patience, TooLittle


def test_a_byte_now_and_then_is_not_waited_for() -> None:
    patience = Patience(30.0)
    for _ in range(2):
        patience.note(1, 14.0)
    with pytest.raises(TooLittle, match=r"less than 1\.0 KiB a second came for 30 s"):
        patience.note(1, 14.0)


def test_a_slow_line_is_waited_for() -> None:
    patience = Patience(30.0)
    for _ in range(1000):
        patience.note(2 * LEAST_BYTES_PER_S, 1.0)


def test_a_server_that_thinks_for_a_while_and_then_gives_is_waited_for() -> None:
    patience = Patience(30.0)
    for _ in range(10):
        patience.note(1 << 20, 29.0)


def test_what_came_in_the_beginning_does_not_count_for_ever() -> None:
    patience = Patience(30.0)
    patience.note(1 << 30, 30.0)
    with pytest.raises(TooLittle):
        patience.note(1, 31.0)


def test_the_time_that_a_disk_takes_is_not_waited() -> None:
    patience = Patience(30.0)
    for _ in range(1000):
        patience.note(1, 0.0)
