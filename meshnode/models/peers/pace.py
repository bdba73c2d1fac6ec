"""How fast bytes may leave, all together. Sans-IO."""

from __future__ import annotations

import math


class Pace:
    """I say when the next bytes may go. Nothing is saved up: after a rest it begins anew."""

    def __init__(self, bytes_per_s: float | None) -> None:
        """None: at once, always."""
        self._bytes_per_s = math.inf if bytes_per_s is None else bytes_per_s
        self._free_at_s = -math.inf

    def take(self, size_bytes: int, now: float) -> float:
        """When so many may go; from then on those after them are counted."""
        begins_s = max(now, self._free_at_s)
        self._free_at_s = begins_s + size_bytes / self._bytes_per_s
        return begins_s
