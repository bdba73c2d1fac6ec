"""When a connection gives so little that it is not waited for. Sans-IO.

A byte now and then keeps any limit for silence from running out, for days. The least is less than
the slowest line that a model is worth pulling over: at a kibibyte a second a gigabyte takes
twelve days.
"""

from __future__ import annotations

from meshnode.config import human_bytes

LEAST_BYTES_PER_S = 1024


class TooLittle(TimeoutError):
    """Something came, and not enough."""


class Patience:
    """I count what came of one answer while it was waited for: what a disk takes is not waiting."""

    def __init__(self, over_s: float) -> None:
        self._over_s = over_s
        self._came_bytes = 0
        self._waited_s = 0.0

    def note(self, size_bytes: int, waited_s: float) -> None:
        """Raises `TooLittle`."""
        self._came_bytes += size_bytes
        self._waited_s += waited_s
        if self._waited_s < self._over_s:
            return
        if self._came_bytes < LEAST_BYTES_PER_S * self._waited_s:
            least = human_bytes(LEAST_BYTES_PER_S)
            raise TooLittle(f"less than {least} a second came for {self._over_s:g} s")
        self._came_bytes, self._waited_s = 0, 0.0
