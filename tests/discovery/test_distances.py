"""Distances are coarse, hold still, and name nobody to a stranger."""

from __future__ import annotations

import pytest

from discovery.distances import STEPS, TAG_BYTES, at_most_s, step_of, tag
from tunnels.peer import PeerId

ANN, BEN = PeerId(b"a" * 32), PeerId(b"b" * 32)


@pytest.mark.parametrize(
    ("rtt_ms", "step"), [(0, 0), (1, 0), (1.1, 1), (20, 5), (300, 9), (4000, 12), (99_000, 13)]
)
def test_a_round_trip_has_a_step(rtt_ms: float, step: int) -> None:
    assert step_of(rtt_ms / 1000) == step
    assert rtt_ms / 1000 <= at_most_s(step)


def test_what_wavers_about_a_steps_end_stays_where_it_was() -> None:
    assert step_of(0.033) == 6
    assert step_of(0.033, before=5) == 5
    assert step_of(0.031, before=6) == 6
    assert step_of(0.0008, before=0) == 0


def test_what_is_clearly_farther_or_nearer_moves() -> None:
    assert step_of(0.1, before=5) == 7
    assert step_of(0.004, before=5) == 2
    assert step_of(0.003, before=0) == 2


def test_the_last_step_has_no_end() -> None:
    assert at_most_s(STEPS - 1) == float("inf")
    assert at_most_s(0) == 0.001


def test_a_tag_is_another_one_in_another_mesh() -> None:
    tags = {tag(mesh, peer) for mesh in (b"m" * 32, b"n" * 32) for peer in (ANN, BEN)}
    assert len(tags) == 4
    assert {len(one) for one in tags} == {TAG_BYTES}
