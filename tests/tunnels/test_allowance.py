"""Rates, debts, and how long a link that makes work without carrying anything is not heard."""

from __future__ import annotations

import pytest

from tunnels.allowance import (
    EARNED_S_PER_BYTE,
    MAX_EARNED_S,
    MEMBER,
    SHARED,
    STRANGER,
    Bucket,
    Buckets,
    Budget,
    Rate,
    Share,
)


def test_a_bucket_gives_its_burst_then_its_rate() -> None:
    bucket = Bucket(Rate(per_s=2, burst=3), now=10.0)
    assert [bucket.take(10.0) for _ in range(4)] == [True, True, True, False]
    assert not bucket.take(10.4)
    assert bucket.take(10.5)
    assert not bucket.is_full(11.0)
    assert bucket.is_full(99.0)
    assert [bucket.take(99.0) for _ in range(4)] == [True, True, True, False]


def test_time_that_goes_back_gives_nothing() -> None:
    bucket = Bucket(Rate(per_s=1, burst=1), now=10.0)
    assert bucket.take(10.0)
    assert not bucket.take(5.0)


def test_a_debt_is_paid_at_the_rate() -> None:
    bucket = Bucket(Rate(per_s=2, burst=4), now=0.0)
    bucket.spend(0.0, 6)
    assert bucket.wait_s(0.0) == 1.0
    assert bucket.take_up_to(0.0, 5) == 0
    assert bucket.wait_s(1.0) == 0.0
    bucket.spend(1.0, 1e-12)
    assert bucket.wait_s(1.0) == 0.0, "no clock can wait for that"
    bucket.spend(1.0, -1e-12)
    assert bucket.take_up_to(2.0, 5) == 2
    assert bucket.take_up_to(4.0, 1) == 1


def test_keys_do_not_touch_one_another_and_full_ones_are_forgotten() -> None:
    buckets = Buckets(Rate(per_s=1, burst=2), limit=3)
    assert [buckets.take("a", 0.0) for _ in range(3)] == [True, True, False]
    assert buckets.take("b", 0.0)
    assert buckets.take("c", 9.0)
    assert len(buckets) == 1, "the two that are full again are nobody special"


def test_each_key_pays_its_own_debts() -> None:
    buckets = Buckets(Rate(per_s=2, burst=4), limit=3)
    assert buckets.spend("a", 0.0, 3) == 0
    assert buckets.spend("a", 0.0, 3) == 1.0
    assert buckets.spend("b", 0.0, 3) == 0
    assert buckets.spend("a", 2.0, 2) == 0


def test_a_thousand_keys_take_the_room_of_a_few() -> None:
    buckets = Buckets(Rate(per_s=1, burst=2), limit=3)
    for key in range(1000):
        assert buckets.take(key, 0.0)
        assert len(buckets) <= 3


def fresh() -> tuple[Share, Bucket]:
    budget = Budget(0.0)
    return budget.share("network"), budget.shared


def test_a_link_has_its_burst_then_the_shared_one_then_waits() -> None:
    share, shared = fresh()
    share.charge(STRANGER.burst, 0.0)
    assert share.wait_s(0.0) == 0
    share.charge(SHARED.burst, 0.0)
    assert share.wait_s(0.0) == 0
    assert shared.level(0.0) == pytest.approx(0)
    share.charge(0.001, 0.0)
    assert share.wait_s(0.0) == pytest.approx(0.001 / STRANGER.per_s)


def test_a_debt_is_paid_by_whatever_comes_first() -> None:
    share, _ = fresh()
    share.charge(STRANGER.burst + SHARED.burst + 0.001, 0.0)
    assert share.wait_s(0.0) > 0
    assert share.wait_s(0.001 / SHARED.per_s) == pytest.approx(0), "the shared rate"
    share.charge(0.001, 0.02)
    assert share.wait_s(0.02) > 0
    share.earn(int(0.001 / EARNED_S_PER_BYTE) + 1)
    assert share.wait_s(0.02) == 0, "its own bytes"


def test_who_carries_bytes_pays_with_them_first() -> None:
    share, shared = fresh()
    for _ in range(1000):
        share.earn(1 << 20)
        share.charge((1 << 20) * EARNED_S_PER_BYTE / 4, 0.0)
    assert share.wait_s(0.0) == 0
    assert shared.is_full(0.0)


def test_what_was_earned_cannot_be_hoarded() -> None:
    share, shared = fresh()
    share.earn(1 << 40)
    share.charge(MAX_EARNED_S + STRANGER.burst, 0.0)
    assert shared.level(0.0) == pytest.approx(SHARED.burst)
    share.charge(SHARED.burst / 2, 0.0)
    assert not shared.is_full(0.0)


def test_a_member_has_more_and_becomes_one_once() -> None:
    share, shared = fresh()
    share.charge(STRANGER.burst + SHARED.burst + 0.1, 0.0)
    share.welcome("peer")
    assert share.wait_s(0.0) == 0
    share.charge(MEMBER.burst, 0.0)
    share.welcome("peer")
    share.charge(0.003, 0.0)
    assert share.wait_s(0.0) == pytest.approx(0.003 / MEMBER.per_s)
    assert shared.level(0.0) == pytest.approx(0)


def test_a_new_link_is_no_new_allowance() -> None:
    budget = Budget(0.0)
    for welcomed, rate in ((False, STRANGER), (True, MEMBER)):
        spent_s = 0.0
        for _ in range(1000):
            share = budget.share("network")
            if welcomed:
                share.welcome("peer")
            if not share.wait_s(0.0):
                share.charge(0.001, 0.0)
                spent_s += 0.001
        assert spent_s <= rate.burst + SHARED.burst + 0.002
    assert budget.share("elsewhere").wait_s(0.0) == 0


def test_many_that_misbehave_leave_the_processor_to_the_others() -> None:
    """64 strangers and the shared rate, for ever: what they get in all."""
    budget = Budget(0.0)
    links = [budget.share(network) for network in range(64)]
    spent_s = [0.0, 0.0]
    for tick in range(2000):
        now = tick / 100
        for link in links:
            if not link.wait_s(now):
                link.charge(0.001, now)
                spent_s[tick >= 1000] += 0.001
    assert spent_s[1] / 10 <= 64 * STRANGER.per_s + SHARED.per_s + 0.01
