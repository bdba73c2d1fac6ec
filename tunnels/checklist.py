"""The ways to one peer, and when each is asked: the checklist of RFC 8445. Sans-IO."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tunnels.probe_wire import Way

PING_TIMES_S = (0.0, 0.1, 0.3, 0.7, 1.5, 3.0)  # since a way is known
PATIENT_PAUSE_S = 4.0  # some NATs forget after five
TRIGGER_PAUSE_S = 0.02  # between a question and the one that the other side's triggers
MAX_WAYS = 32


@dataclass
class _Check:
    """Of one way."""

    ask_at_s: list[float]
    asked_at_s: float = -math.inf


class Checklist:
    """I know the ways of one search. allows: whether anything may be sent to a host."""

    def __init__(self, allows: Callable[[str], bool]) -> None:
        self._allows = allows
        self._checks: dict[Way, _Check] = {}

    def learn(self, way: Way, now: float) -> None:
        """One more, if there is room and it is allowed."""
        if way not in self._checks and len(self._checks) < MAX_WAYS and self._allows(way.to[0]):
            self._checks[way] = _Check([now + after_s for after_s in PING_TIMES_S])

    def trigger(self, way: Way, now: float) -> None:
        """The other side has asked over it: it is asked back, now."""
        check = self._checks.get(way)
        if check is not None and now - check.asked_at_s >= TRIGGER_PAUSE_S:
            check.ask_at_s = [now, *(at_s for at_s in check.ask_at_s if at_s > now)]

    def answered(self, way: Way) -> None:
        """It is asked no more."""
        if way in self._checks:
            self._checks[way].ask_at_s = []

    def next_at_s(self) -> float:
        """When one is due; math.inf when none will be."""
        due = (check.ask_at_s[0] for check in self._checks.values() if check.ask_at_s)
        return min(due, default=math.inf)

    def due(self, now: float, *, patient: bool) -> list[tuple[Way, bool]]:
        """Those to ask now. patient: a way whose PING_TIMES_S are over is asked on, every
        PATIENT_PAUSE_S, and returned with True."""
        found = []
        for way, check in self._checks.items():
            if check.ask_at_s and check.ask_at_s[0] <= now:
                check.ask_at_s = [at_s for at_s in check.ask_at_s if at_s > now]
                check.asked_at_s = now
                waits = patient and not check.ask_at_s
                if waits:
                    check.ask_at_s = [now + PATIENT_PAUSE_S]
                found.append((way, waits))
        return found
