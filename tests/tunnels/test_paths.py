"""The better path: at once where that is plain, late where it might be weather."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunnels.paths import HOLD_S, Choice, Path, choose
from tunnels.roundtrips import SAMPLES, RoundTrips

LAN = Path("lan", 10, rtt_s=0.001)
QUIC = Path("quic", 20, rtt_s=0.030)
QUIC6 = Path("quic6", 20, rtt_s=0.030)
TCP = Path("tcp", 30, rtt_s=0.030)
RELAY = Path("relay", 50, relayed=True, rtt_s=0.010)


def moved(path: Path[str], rtt_s: float | None) -> Path[str]:
    return Path(path.key, path.rank, path.relayed, rtt_s, path.suspected)


def silent(path: Path[str]) -> Path[str]:
    return Path(path.key, path.rank, path.relayed, path.rtt_s, suspected=True)


class Story:
    """Choices, a second apart."""

    def __init__(self) -> None:
        self.choice: Choice[str] = Choice()
        self.now = 0.0
        self.changes: list[tuple[float, str | None]] = []

    def go(self, *paths: Path[str], seconds: float = 0) -> str | None:
        until_s = self.now + seconds
        while True:
            before = self.choice.key
            self.choice = choose(self.choice, paths, self.now)
            if self.choice.key != before:
                self.changes.append((self.now, self.choice.key))
            if self.now >= until_s:
                return self.choice.key
            self.now += 1


def test_without_a_path_there_is_no_choice() -> None:
    story = Story()
    assert story.go() is None
    assert story.go(QUIC) == "quic"
    assert story.go() is None


def test_the_first_one_is_of_the_best_kind() -> None:
    assert Story().go(RELAY, TCP, QUIC, LAN) == "lan"
    assert Story().go(RELAY, TCP, QUIC) == "quic"
    assert Story().go(TCP, RELAY) == "tcp"


@pytest.mark.parametrize(("first", "better"), [(RELAY, TCP), (TCP, QUIC), (QUIC, LAN)])
def test_a_new_path_of_a_better_kind_is_taken_at_once(first: Path[str], better: Path[str]) -> None:
    story = Story()
    story.go(first, seconds=100)
    assert story.go(first, moved(better, None)) == better.key


def test_a_relay_is_not_preferred_for_its_speed() -> None:
    story = Story()
    assert story.go(moved(QUIC, 0.5), RELAY, seconds=100) == "quic"


def test_a_silent_path_is_left_at_once_even_for_a_relay() -> None:
    story = Story()
    story.go(LAN, RELAY, seconds=100)
    assert story.go(silent(LAN), RELAY) == "relay"
    assert story.go(silent(LAN), silent(RELAY)) == "lan", "of two silent ones, the better kind"


def test_a_path_that_has_become_far_slower_is_left_and_taken_again_when_it_recovers() -> None:
    story = Story()
    assert story.go(LAN, QUIC, seconds=30) == "lan"
    assert story.go(moved(LAN, 0.3), QUIC, seconds=HOLD_S - 1) == "lan", "it may be weather"
    assert story.go(moved(LAN, 0.3), QUIC, seconds=2) == "quic"
    assert story.go(moved(LAN, 0.05), QUIC, seconds=100) == "quic", "better, and not yet good"
    assert story.go(LAN, QUIC, seconds=HOLD_S - 1) == "quic"
    assert story.go(LAN, QUIC, seconds=2) == "lan"
    assert len(story.changes) == 3


def test_a_path_that_was_slow_and_came_anew_is_new() -> None:
    story = Story()
    story.go(LAN, QUIC)
    story.go(moved(LAN, 0.3), QUIC, seconds=HOLD_S + 1)
    assert story.go(QUIC) == "quic"
    assert story.go(LAN, QUIC) == "lan"


def test_of_two_of_one_kind_the_clearly_faster_one_is_taken_in_time() -> None:
    story = Story()
    story.go(QUIC, QUIC6)
    assert story.go(QUIC, moved(QUIC6, 0.026), seconds=100) == "quic"
    assert story.go(QUIC, moved(QUIC6, 0.010), seconds=HOLD_S - 1) == "quic"
    assert story.go(QUIC, moved(QUIC6, 0.010), seconds=2) == "quic6"


def test_a_rival_must_be_better_all_the_time_and_not_now_and_then() -> None:
    story = Story()
    story.go(QUIC, QUIC6)
    for _ in range(20):
        story.go(QUIC, moved(QUIC6, 0.010), seconds=HOLD_S - 2)
        assert story.go(QUIC, QUIC6, seconds=1) == "quic"


def test_what_was_not_measured_counts_neither_way() -> None:
    story = Story()
    story.go(QUIC, moved(QUIC6, None), moved(TCP, None))
    assert story.go(QUIC, moved(QUIC6, None), moved(TCP, None), seconds=100) == "quic"


@settings(max_examples=20)
@given(st.integers(0, 1000))
def test_noise_moves_nothing(seed: int) -> None:
    """A tenth of jitter on all paths, for ten minutes."""
    dice = random.Random(seed)
    story = Story()
    for _ in range(600):
        story.go(*(moved(one, (one.rtt_s or 0) * dice.uniform(0.9, 1.1)) for one in (QUIC, QUIC6)))
        story.now += 1
    assert len(story.changes) == 1


rtts = st.one_of(st.none(), st.floats(0.0001, 2))


@given(
    st.lists(
        st.lists(
            st.builds(
                Path, st.integers(0, 4), st.integers(1, 5), st.booleans(), rtts, st.booleans()
            ),
            unique_by=lambda path: path.key,
            max_size=5,
        ),
        max_size=40,
    )
)
def test_whatever_comes_the_choice_is_there_and_in_the_best_tier(
    steps: list[list[Path[int]]],
) -> None:
    choice: Choice[int] = Choice()
    for now, paths in enumerate(steps):
        choice = choose(choice, paths, float(now))
        chosen = [path for path in paths if path.key == choice.key]
        assert bool(chosen) == bool(paths)
        assert all(path.tier == min(one.tier for one in paths) for path in chosen)
        assert choice.left <= {path.key for path in paths} - {choice.key}


def test_measured_round_trips_rise_as_well_as_fall() -> None:
    """With what measures them in the house."""
    trips, story = RoundTrips(), Story()
    for took_s in [0.001] * 50 + [0.4] * (SAMPLES + int(HOLD_S) + 2):
        trips.add(took_s)
        story.go(moved(LAN, trips.least_s), QUIC)
        story.now += 1
    assert story.choice.key == "quic"
    for _ in range(SAMPLES + int(HOLD_S) + 2):
        trips.add(0.001)
        story.go(moved(LAN, trips.least_s), QUIC)
        story.now += 1
    assert story.choice.key == "lan"
