"""How long a silence is: nobody is told of a short one."""

from __future__ import annotations

from typing import cast

import trio
import trio.testing

from meshnode.pipeline.silence import HELD_AFTER_S, long_silence
from tunnels import Session

Clock = trio.testing.MockClock


class Flaky:
    """A session whose peer falls silent at 5 s, is heard at `heard_s`, and is gone at 100 s."""

    def __init__(self, heard_s: float) -> None:
        self.closed = trio.Event()
        self._began_s = trio.current_time()
        self._heard_s = heard_s

    @property
    def _now_s(self) -> float:
        return trio.current_time() - self._began_s

    @property
    def suspected(self) -> bool:
        return 5 <= self._now_s < self._heard_s

    @property
    def silence_s(self) -> float:
        return self._now_s - 5 if self.suspected else 0.0

    async def wait_links_changed(self) -> None:
        await trio.sleep((5 if self._now_s < 5 else 100) - self._now_s)
        if self._now_s >= 100:
            self.closed.set()

    async def wait_heard(self) -> None:
        await trio.sleep(max(0.0, self._heard_s - self._now_s))


async def test_a_short_silence_is_not_told(autojump_clock: Clock) -> None:
    assert not await long_silence(cast(Session, Flaky(heard_s=5 + HELD_AFTER_S - 1)))


async def test_a_long_one_is_told_when_it_is_long(autojump_clock: Clock) -> None:
    began_s = trio.current_time()
    assert await long_silence(cast(Session, Flaky(heard_s=60)))
    assert trio.current_time() - began_s == 5 + HELD_AFTER_S
