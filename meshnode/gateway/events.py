"""Server-sent events on their way through: passed on whole, never rewritten.

WHATWG HTML, 9.2: an event ends with a blank line; until then a client does nothing with it. So
holding back the part of an event whose end has not come yet delays nobody, and when the server
dies in the middle of one, the client never sees a torn event before our error.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

EVENT_END = b"\n\n"
MAX_HELD_BYTES = 1 << 20
_TIMINGS = b'"timings":'
_TIMINGS_WINDOW_BYTES = 4096


@dataclass(frozen=True)
class Timings:
    """How long llama-server generated, from the `timings` object it puts in its answers."""

    tokens: int
    seconds: float


def find_timings(text: bytes) -> Timings | None:
    """The last `timings` object in a JSON text, found without parsing all of it.

    Quotes within JSON strings are escaped, so generated text cannot be mistaken for the key.
    """
    at = text.rfind(_TIMINGS)
    if at < 0:
        return None
    start = at + len(_TIMINGS)
    window = text[start : start + _TIMINGS_WINDOW_BYTES].decode("utf-8", "replace").lstrip()
    try:
        found, _ = json.JSONDecoder().raw_decode(window)
        tokens, milliseconds = found["predicted_n"], found["predicted_ms"]
        return Timings(int(tokens), float(milliseconds) / 1000)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None


class EventGate:
    """I let whole events through and remember the last that told timings."""

    def __init__(self) -> None:
        self._held = b""
        self._timed = b""
        self._last = b""

    def feed(self, chunk: bytes) -> bytes:
        """What can be passed on now: every event that is whole, and nothing of a torn one.

        An event beyond `MAX_HELD_BYTES` goes through in pieces.
        """
        text = self._held + chunk
        end = text.rfind(EVENT_END)
        cut = end + len(EVENT_END) if end >= 0 else 0
        if len(text) - cut > MAX_HELD_BYTES:
            cut = len(text)
        passed, self._held = text[:cut], text[cut:]
        if passed:
            self._last = passed
        if _TIMINGS in passed:
            self._timed = passed
        return passed

    def flush(self) -> bytes:
        """What was held back when the server ended the stream in good order."""
        held, self._held = self._held, b""
        return held

    def ended_with(self, mark: bytes) -> bool:
        """Whether the last event passed starts with `mark`, or tells an error of the server's."""
        last = self._last.removesuffix(EVENT_END).rpartition(EVENT_END)[2]
        return last.startswith((mark, b'data: {"error":', b"event: error"))

    def timings(self) -> Timings | None:
        return find_timings(self._timed)
