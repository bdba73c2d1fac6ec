"""How far a pull is, where no terminal shows a bar: in a log, a pipe, a service's journal."""

from __future__ import annotations

import pytest

from meshnode.cli.progress import Lines, shown_bytes

MIB = 1 << 20


class Log:
    """Lines, and the clock that they are written by."""

    def __init__(self) -> None:
        self.now = 0.0
        self.lines: list[str] = []
        self._lines = Lines("pulling", self.lines.append, lambda: self.now)

    def pull(self, rate: float, total: int, until_s: float) -> None:
        """At so many MiB a second of so many, told twice a second."""
        while self.now < until_s:
            self.now += 0.5
            self._lines.tell(min(int(self.now * rate * MIB), total * MIB), total * MIB)


def test_each_tenth_is_told_with_the_speed_and_the_time_left() -> None:
    log = Log()
    log.pull(10, 300, until_s=30)
    assert log.lines[0] == "pulling: 35.0 MiB of 300.0 MiB (11 %), 10.0 MiB/s, 26 s left"
    assert 8 <= len(log.lines) <= 10


def test_a_slow_pull_says_every_ten_seconds_that_it_goes_on() -> None:
    log = Log()
    log.pull(1, 10_000, until_s=60)
    assert len(log.lines) == 6
    assert log.lines[-1].endswith("1.0 MiB/s, 2 h 45 min left")


def test_a_pull_of_hours_fills_no_log() -> None:
    log = Log()
    log.pull(1, 100_000, until_s=4 * 3600)
    assert len(log.lines) < 4 * 60 + 60


def test_a_pull_that_nothing_comes_of_is_seen() -> None:
    log = Log()
    log.pull(0, 100, until_s=30)
    assert log.lines[-1] == "pulling: 0 B of 100.0 MiB (0 %), 0 B/s"


def test_what_is_soon_over_needs_no_lines() -> None:
    log = Log()
    log.pull(100, 100, until_s=1.5)
    assert log.lines == []


def test_who_wants_json_is_told_nothing_else(capfd: pytest.CaptureFixture[str]) -> None:
    with shown_bytes("pulling", quiet=True) as tell:
        assert tell is None
    with shown_bytes("pulling", quiet=False) as tell:
        assert tell is not None
        tell(1, 10)
    assert capfd.readouterr() == ("", "")
