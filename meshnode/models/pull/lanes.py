"""What a pull knows of its connections, and of the bytes that wait for one. Sans-IO."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from meshnode.models.spans import Span

SPEED_OVER_S = 10.0
TAKEN_OVER_AFTER_S = 5.0
TAKEN_OVER_LEFT_S = 10.0
TAKEN_OVER_FACTOR = 4.0


@dataclass(frozen=True, order=True)
class Queued:
    span: Span
    tries: int = 0
    not_before: float = -math.inf
    only: int | None = field(default=None, compare=False)
    """The one supplier to ask."""


@dataclass
class Lane:
    supplier: int
    bytes_per_s: float | None = None
    """Of its last request."""
    failures: int = 0
    since_failure_bytes: int = 0
    not_before: float = -math.inf
    is_retired: bool = False


@dataclass
class Open:
    tries: int
    only: int | None
    since_s: float
    received_bytes: int = 0
    received_at_s: float = -math.inf

    @property
    def bytes_per_s(self) -> float:
        return self.received_bytes / max(self.received_at_s - self.since_s, 1e-3)

    def is_late(self, size_bytes: int, bytes_per_s: float, now: float) -> bool:
        """Whether one of that speed would have the rest of so many long before."""
        waited_s, left_bytes = now - self.since_s, size_bytes - self.received_bytes
        if waited_s < TAKEN_OVER_AFTER_S:
            return False
        left_s = left_bytes * waited_s / self.received_bytes if self.received_bytes else math.inf
        return left_s > max(TAKEN_OVER_LEFT_S, TAKEN_OVER_FACTOR * left_bytes / bytes_per_s)


class Speed:
    """Bytes a second over the last SPEED_OVER_S, in steps."""

    def __init__(self, now: float) -> None:
        self._began = now
        self._steps: deque[tuple[float, int]] = deque()

    def add(self, size_bytes: int, now: float) -> None:
        if self._steps and now - self._steps[-1][0] < SPEED_OVER_S / 20:
            at, so_far = self._steps.pop()
            self._steps.append((at, so_far + size_bytes))
        else:
            self._steps.append((now, size_bytes))
        self._forget(now)

    def bytes_per_s(self, now: float) -> float | None:
        self._forget(now)
        over_s = min(now - self._began, SPEED_OVER_S)
        if over_s <= 0:
            return None
        return sum(size for _, size in self._steps) / over_s

    def _forget(self, now: float) -> None:
        while self._steps and self._steps[0][0] < now - SPEED_OVER_S:
            self._steps.popleft()
