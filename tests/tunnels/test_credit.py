"""Windows: who may send how much, and when an ACK is worth its bytes."""

from __future__ import annotations

import pytest

from tunnels.credit import (
    ACK_EVERY_BYTES,
    INITIAL_WINDOW_BYTES,
    MAX_WINDOW_BYTES,
    Pool,
    ReceiveWindow,
    SendWindow,
)
from tunnels.errors import BadFrame


def test_a_stalled_reader_opens_nothing() -> None:
    window = ReceiveWindow(1000, 8000)
    window.check(1000)
    with pytest.raises(BadFrame):
        window.check(1001)
    assert not window.ack_due(1000)
    assert window.ack(1000) == 1000


def test_a_reader_that_keeps_up_gets_a_larger_window() -> None:
    window = ReceiveWindow(1000, 3000)
    window.consume(999)
    assert window.size_bytes == 1000
    window.consume(1)
    assert window.size_bytes == 2000
    window.consume(2000)
    assert window.size_bytes == 3000
    window.consume(3000)
    assert window.size_bytes == 3000
    assert window.ack(6000) == 9000


def test_an_ack_waits_until_a_quarter_of_the_window_can_be_opened() -> None:
    window = ReceiveWindow(1000, 1000)
    window.consume(249)
    assert not window.ack_due(249)
    window.consume(1)
    assert window.ack_due(250)
    assert window.ack(250) == 1250
    assert not window.ack_due(250)


def test_an_ack_is_due_when_the_sender_keeps_much() -> None:
    window = ReceiveWindow(1 << 22, 1 << 22)
    assert not window.ack_due(ACK_EVERY_BYTES - 1)
    assert window.ack_due(ACK_EVERY_BYTES)
    window.ack(ACK_EVERY_BYTES)
    assert not window.ack_due(ACK_EVERY_BYTES)


def test_the_limit_never_shrinks() -> None:
    window = ReceiveWindow(1000, 500)
    assert window.ack(0) == 1000
    assert window.limit == 1000


def test_the_sender_keeps_to_the_limit_and_believes_only_what_it_sent() -> None:
    window = SendWindow(10)
    window.spend(10)
    assert window.available_bytes == 0
    with pytest.raises(ValueError, match="window"):
        window.spend(1)
    window.on_ack(4, 14)
    assert (window.acked, window.available_bytes) == (4, 4)
    window.on_ack(2, 12)  # late
    assert (window.acked, window.available_bytes) == (4, 4)
    with pytest.raises(BadFrame):
        window.on_ack(11, 20)


def test_windows_of_one_session_grow_out_of_one_pool() -> None:
    pool = Pool(2500)
    one, two = ReceiveWindow(1000, 8000, pool), ReceiveWindow(1000, 8000, pool)
    one.consume(1000)
    two.consume(1000)
    assert (one.size_bytes, two.size_bytes, pool.free_bytes) == (2000, 2000, 500)
    one.consume(2000)
    assert (one.size_bytes, pool.free_bytes) == (2500, 0)
    one.release()
    one.release()
    assert pool.free_bytes == 1500
    two.consume(2000)
    assert two.size_bytes == 3500
    one.consume(9000)
    assert one.size_bytes == 2500, "a stream that is over grows no more"


def test_a_reader_that_allows_all_and_acknowledges_nothing_gets_little() -> None:
    window = SendWindow(2**63)
    assert window.available_bytes == INITIAL_WINDOW_BYTES
    window.spend(INITIAL_WINDOW_BYTES)
    window.on_ack(0, 2**63)
    assert window.available_bytes == 0
    assert ACK_EVERY_BYTES * 2 <= INITIAL_WINDOW_BYTES, "else both sides would wait for ever"


def test_a_reader_that_acknowledges_gets_more_as_far_as_the_pool_goes() -> None:
    pool = Pool(INITIAL_WINDOW_BYTES)
    window = SendWindow(2**63, pool)
    for expected in (1, 2, 2):
        assert window.available_bytes == expected * INITIAL_WINDOW_BYTES
        window.spend(window.available_bytes)
        window.on_ack(window.sent, 2**63)
    window.release()
    assert pool.free_bytes == INITIAL_WINDOW_BYTES
    assert MAX_WINDOW_BYTES > INITIAL_WINDOW_BYTES
