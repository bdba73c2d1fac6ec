"""How long a pull, or any reading, will go on. Sans-IO."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from meshnode.config import human_bytes, human_duration

OVER_S = 10.0
"""The speed is that of the last seconds: what a line gives now, not what it gave at first."""
STEP_S = 0.5
LEAST_S = 1.0
"""Before that nothing is said of a speed."""


@dataclass(frozen=True)
class Outlook:
    """How far it is. None: nothing can be said yet, or nothing comes at present."""

    done_bytes: int
    total_bytes: int
    bytes_per_s: float | None
    eta_s: float | None

    def __str__(self) -> str:
        text = f"{human_bytes(self.done_bytes)} of {human_bytes(self.total_bytes)}"
        if self.total_bytes:
            text += f" ({self.done_bytes * 100 // self.total_bytes} %)"
        if self.bytes_per_s is not None:
            text += f", {human_bytes(self.bytes_per_s)}/s"
        if self.eta_s:
            text += f", {human_duration(self.eta_s)} left"
        return text


class Forecast:
    """I look ahead from what came in the last seconds. Work that begins anew, as where bytes that
    came are read again, is looked at anew."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, int]] = deque()
        self._total_bytes = 0

    def take(self, done_bytes: int, total_bytes: int, now: float) -> Outlook:
        if self._steps and (done_bytes < self._steps[-1][1] or total_bytes != self._total_bytes):
            self._steps.clear()
        self._total_bytes = total_bytes
        if not self._steps or now - self._steps[-1][0] >= STEP_S:
            self._steps.append((now, done_bytes))
        while len(self._steps) > 1 and self._steps[1][0] <= now - OVER_S:
            self._steps.popleft()
        since_s, before_bytes = self._steps[0]
        speed = (done_bytes - before_bytes) / (now - since_s) if now - since_s >= LEAST_S else None
        left_bytes = max(0, total_bytes - done_bytes)
        eta_s = left_bytes / speed if speed else None
        return Outlook(done_bytes, total_bytes, speed, eta_s if left_bytes else 0.0)
