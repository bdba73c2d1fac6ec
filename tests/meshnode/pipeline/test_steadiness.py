"""A worker that comes and goes is counted on ever later, and is forgiven in the end."""

from __future__ import annotations

from meshnode.pipeline.steadiness import (
    FIRST_PAUSE_S,
    FORGIVEN_AFTER_S,
    LAST_PAUSE_S,
    LEFT_OUT_AFTER,
    SETTLE_S,
    Steadiness,
)
from tunnels import Identity

ONE, OTHER = Identity.generate().peer, Identity.generate().peer


def test_a_new_worker_is_counted_on_almost_at_once() -> None:
    steadiness = Steadiness()
    steadiness.observe([ONE], now=10)
    steadiness.observe([ONE, OTHER], now=20)
    assert steadiness.counted_on_at(ONE, now=20) == 10 + SETTLE_S
    assert steadiness.counted_on_at(OTHER, now=20) == 20 + SETTLE_S


def test_each_loss_doubles_the_pause_up_to_a_limit() -> None:
    steadiness = Steadiness()
    pauses = []
    for loss in range(12):
        steadiness.lost(ONE, now=loss)
        steadiness.observe([ONE], now=loss)
        pauses.append(steadiness.counted_on_at(ONE, now=loss) - loss)
    assert pauses[:3] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S]
    assert pauses[-1] == LAST_PAUSE_S
    assert steadiness.counted_on_at(OTHER, now=11) == 11 + SETTLE_S, "others are not blamed"


def test_a_worker_that_leaves_begins_anew() -> None:
    steadiness = Steadiness()
    steadiness.observe([ONE], now=0)
    steadiness.observe([], now=5)
    steadiness.observe([ONE], now=9)
    assert steadiness.counted_on_at(ONE, now=9) == 9 + SETTLE_S


def test_an_hour_without_loss_is_forgiven() -> None:
    steadiness = Steadiness()
    for _ in range(9):
        steadiness.lost(ONE, now=0)
    steadiness.observe([ONE], now=1)
    now = FORGIVEN_AFTER_S
    assert steadiness.counted_on_at(ONE, now) == 1 + SETTLE_S
    steadiness.lost(ONE, now)
    steadiness.observe([ONE], now)
    assert steadiness.counted_on_at(ONE, now) == now + FIRST_PAUSE_S


def test_who_was_lost_again_and_again_is_left_out_for_as_long_as_it_is_not_counted_on() -> None:
    steadiness = Steadiness()
    for now in range(LEFT_OUT_AFTER):
        assert not steadiness.is_left_out(ONE, now)
        steadiness.lost(ONE, now)
    last, pause_s = LEFT_OUT_AFTER - 1, FIRST_PAUSE_S * 2 ** (LEFT_OUT_AFTER - 1)
    assert steadiness.is_left_out(ONE, last + pause_s - 1)
    assert not steadiness.is_left_out(ONE, last + pause_s)
    assert not steadiness.is_left_out(OTHER, last)
