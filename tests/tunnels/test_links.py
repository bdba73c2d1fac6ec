"""Which of its links a session uses, as their round trips change."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import trio
import trio.testing

from tunnels import links as module
from tunnels.handshake import Role
from tunnels.link import ProvenLink
from tunnels.links import Links
from tunnels.paths import HOLD_S
from tunnels.peer import PeerId

US, THEM = PeerId(bytes(32)), PeerId(b"\1" * 32)


@dataclass(eq=False)
class _Link:
    """As far as links.py looks."""

    kind: str
    rank: int
    role: Role = Role.DIALLER
    remote: str = "192.0.2.1:9"
    closed: trio.Event = field(default_factory=trio.Event)


@dataclass
class _Beat:
    rtt_s: float | None = None
    suspected: bool = False


class _Session:
    """Links whose heartbeats say what a test wants."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "Heartbeat", lambda *_: _Beat())
        self.links = Links(US, THEM, lambda link: link.rank)

    def add(self, kind: str, rank: int, rtt_s: float | None = None) -> tuple[_Link, _Beat]:
        link = _Link(kind, rank)
        proven = cast(ProvenLink, type("Proven", (), {"link": link}))
        beat = cast(Any, self.links.add(proven, lambda: False))
        beat.rtt_s = rtt_s
        return link, beat

    @property
    def best(self) -> object:
        return self.links.best


async def test_a_better_kind_is_used_at_once_and_a_relay_only_where_nothing_leads_there_straight(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    session = _Session(monkeypatch)
    assert session.best is None
    relay, _ = session.add("relay", 50, rtt_s=0.01)
    assert session.best is relay
    quic, beat = session.add("quic", 20, rtt_s=0.2)
    assert session.best is quic
    beat.suspected = True
    assert session.best is relay
    beat.suspected = False
    assert session.best is quic


async def test_a_link_that_became_slow_is_left_after_a_while_and_taken_again(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    session = _Session(monkeypatch)
    quic, quics = session.add("quic", 20, rtt_s=0.02)
    tcp, _ = session.add("tcp", 30, rtt_s=0.02)
    assert session.best is quic
    quics.rtt_s = 0.5
    assert session.best is quic, "a moment is no reason"
    await trio.sleep(HOLD_S)
    assert session.best is tcp
    quics.rtt_s = 0.02
    assert session.best is tcp
    await trio.sleep(HOLD_S)
    assert session.best is quic


async def test_of_two_that_are_alike_both_ends_take_the_same_and_the_newest(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    session = _Session(monkeypatch)
    older, _ = session.add("quic", 20, rtt_s=0.02)
    newer, _ = session.add("quic", 20)
    assert session.best is newer
    newer.closed.set()
    assert session.best is older
