"""How far away the other end of a link is, and how steadily. Sans-IO."""

from __future__ import annotations

from collections import deque

SAMPLES = 5
SMOOTHING = 1 / 8  # RFC 6298, section 2
JITTER_SMOOTHING = 1 / 16  # RFC 3550, section 6.4.1


class RoundTrips:
    """I take round trips as they are measured, in seconds. None: nothing was measured yet."""

    def __init__(self) -> None:
        self.smoothed_s: float | None = None
        self.jitter_s: float | None = None
        self._last: deque[float] = deque(maxlen=SAMPLES)

    @property
    def least_s(self) -> float | None:
        """The least of the last SAMPLES: queues make an answer late, never early."""
        return min(self._last, default=None)

    def add(self, took_s: float) -> None:
        """jitter_s is the smoothed difference between neighbours, which a steady queue leaves at
        nothing."""
        if self.smoothed_s is None:
            self.smoothed_s = took_s
        else:
            self.smoothed_s += (took_s - self.smoothed_s) * SMOOTHING
            differs_s, before_s = abs(took_s - self._last[-1]), self.jitter_s
            smoothing = 1 if before_s is None else JITTER_SMOOTHING
            self.jitter_s = (before_s or 0.0) + (differs_s - (before_s or 0.0)) * smoothing
        self._last.append(took_s)
