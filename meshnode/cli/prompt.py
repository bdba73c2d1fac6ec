"""The terminal of a running node: where a reply code may be pasted."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Awaitable, Callable

import trio

from discovery.reply import MAX_TEXT_CHARS, PREFIX

DEFAULT_ACCEPT_WAIT_S = 600


def is_at_terminal() -> bool:
    """Whether a person reads what we print, and can type."""
    streams = (sys.stdin, sys.stdout)
    return all(stream is not None and stream.isatty() for stream in streams)


async def follow_pasted_codes(accept: Callable[[str], Awaitable[None]]) -> None:
    """Hands over each line that begins as a reply code does, until cancelled. All other lines are
    somebody's stray key strokes."""
    if is_at_terminal() and hasattr(signal, "SIGTTIN"):
        # A node in the background must not be stopped for looking: its read fails instead.
        signal.signal(signal.SIGTTIN, signal.SIG_IGN)
        await _follow_lines(sys.stdin.fileno(), accept)
    await trio.sleep_forever()


async def _follow_lines(terminal: int, accept: Callable[[str], Awaitable[None]]) -> None:
    """Returns at the end of input. Not by a thread: one that reads could not be ended."""
    pending = b""
    while True:
        await trio.lowlevel.wait_readable(terminal)
        try:
            data = os.read(terminal, MAX_TEXT_CHARS)
        except OSError:
            return
        if not data:
            return
        *lines, pending = (pending + data).split(b"\n")
        pending = pending[-MAX_TEXT_CHARS:]
        for line in lines:
            pasted = line.decode("ascii", "replace").strip().removeprefix("mesh accept ")
            if pasted.lower().startswith(PREFIX):
                await accept(pasted)
