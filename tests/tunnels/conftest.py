"""What a tunnel promises holds over every kind of link: each test that says nothing else runs over
each of them."""

from __future__ import annotations

import pytest
import trio.testing

from tests.lab import nodes

KINDS = ("quic", "tcp")
through_a_relay_too = pytest.mark.parametrize("link_kind", [*KINDS, "relay"], indirect=True)
over_every_kind = pytest.mark.parametrize(
    "link_kind", [*KINDS, nodes.REAL_KIND], indirect=True, ids=str
)
"""Over those too that no world made of memory can carry: in real time, on loopback."""
over_quic = pytest.mark.parametrize("link_kind", ["quic"], indirect=True)
over_tcp = pytest.mark.parametrize("link_kind", ["tcp"], indirect=True)
over_a_relay = pytest.mark.parametrize("link_kind", ["relay"], indirect=True)


@pytest.fixture
def autojump_clock(request: pytest.FixtureRequest) -> trio.abc.Clock | None:
    if "link_kind" in request.fixturenames:
        kind = request.getfixturevalue("link_kind")
        if kind == nodes.REAL_KIND:
            return None  # its stack runs in a thread of its own, by the clock on the wall
    return trio.testing.MockClock(autojump_threshold=0)


@pytest.fixture
def clock(autojump_clock: trio.abc.Clock | None) -> trio.abc.Clock | None:
    """For a test that needs it, and does not read it."""
    return autojump_clock


@pytest.fixture(params=KINDS)
def link_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kind of the links between `two_nodes`."""
    kind = str(request.param)
    monkeypatch.setattr(nodes, "KINDS", (kind,))
    return kind
