"""The states of one side of a search for a direct path (probe.py). Sans-IO.

WAITING     until the agreed instant, or until the other side is heard
PROBING     pings go to every way known, at growing intervals
CHOOSING    a way works; for SETTLE_S a nearer one may still show itself (dialler)
NOMINATING  the nearest is nominated until the listener answers (dialler)
FOUND       both know the way: the listener by the nomination, the dialler by its answer.
            Questions are still answered, in case that answer was lost
FAILED      GIVE_UP_S over, with a reason
"""

from __future__ import annotations

from enum import Enum


class State(Enum):
    WAITING = "waiting for the agreed instant"
    PROBING = "probing"
    CHOOSING = "choosing among ways"
    NOMINATING = "nominating"
    FOUND = "found"
    FAILED = "failed"


class Event(Enum):
    START = "the instant has come, or the other side is heard"
    WORKS = "a way works"
    SETTLED = "nothing better came"
    MUTE = "the nominated way fell silent"
    AGREED = "the nomination came, or its answer"
    OVER = "the time is over"


TRANSITIONS = {
    (State.WAITING, Event.START): State.PROBING,
    (State.PROBING, Event.WORKS): State.CHOOSING,
    (State.CHOOSING, Event.SETTLED): State.NOMINATING,
    (State.NOMINATING, Event.MUTE): State.PROBING,
    (State.PROBING, Event.AGREED): State.FOUND,
    (State.NOMINATING, Event.AGREED): State.FOUND,
    (State.PROBING, Event.OVER): State.FAILED,
    (State.CHOOSING, Event.OVER): State.FAILED,
    (State.NOMINATING, Event.OVER): State.FAILED,
}
