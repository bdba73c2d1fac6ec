"""Windows: who may send how much, and when an ACK is worth its bytes."""

from __future__ import annotations

import pytest

from tunnels.credit import ACK_EVERY_BYTES, ReceiveWindow, SendWindow
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
