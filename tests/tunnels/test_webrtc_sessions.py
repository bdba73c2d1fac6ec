"""Sessions of nodes that link over WebRTC alone, and what such links cost who has none."""

from __future__ import annotations

import subprocess
import sys

import pytest
import trio

from tests.lab import nodes
from tests.lab.nodes import anyone, echo, exchange, identity, two_nodes
from tunnels import Endpoint, TunnelError, session
from tunnels.webrtc import WebRtcLink

LOOPBACK = "127.0.0.1"


@pytest.fixture
def over_webrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "KINDS", (nodes.REAL_KIND,))


async def test_streams_wait_for_the_webrtc_link_and_no_other_is_left(over_webrtc: None) -> None:
    data = bytes(range(256)) * 4096
    async with two_nodes() as pair:
        pair.bob.endpoint.serve("echo", echo)
        bob = pair.bob.endpoint
        met = await pair.alice.endpoint.connect(bob.peer, bob.candidates())
        assert met.stats.link_kind != "webrtc"
        stream = await met.open("echo")
        assert [one.link.kind for one in met._links if one.link.kind == "webrtc"]
        introduced_bytes = met.stats.bytes_out
        assert await exchange(stream, data) == data
        assert met.stats.link_kind == "webrtc"
        assert introduced_bytes < 64 << 10


async def test_links_of_other_kinds_are_not_taken_back() -> None:
    async with trio.open_nursery() as nursery:
        alice = Endpoint(identity("alice"), authorize=anyone, transports=("webrtc",))
        bob = Endpoint(identity("bob"), authorize=anyone, transports=("tcp", "webrtc"))
        bob.serve("echo", echo)
        await nursery.start(alice.run, LOOPBACK, 0)
        await nursery.start(bob.run, LOOPBACK, 0)
        met = await alice.connect(bob.peer, bob.candidates())
        assert await exchange(await met.open("echo"), b"over webrtc") == b"over webrtc"
        [place] = [one for one in alice.candidates() if one.transport == "tcp"]
        proven = await bob._attempt(alice.peer, place)
        bob._sessions.adopt(proven)
        with trio.fail_after(5):
            await proven.link.closed.wait()
        assert proven.link.closure is not None
        assert proven.link.closure.reason == "the other side uses other kinds of links"
        assert [one.link.kind for one in met._links] == ["webrtc"]
        assert await exchange(await met.open("echo"), b"still") == b"still"
        nursery.cancel_scope.cancel()


async def test_a_peer_that_makes_no_webrtc_links_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session, "INTRODUCTION_S", 1.0)
    async with trio.open_nursery() as nursery:
        alice = Endpoint(identity("alice"), authorize=anyone, transports=("webrtc",))
        bob = Endpoint(identity("bob"), authorize=anyone, transports=("tcp",))
        await nursery.start(alice.run, LOOPBACK, 0)
        await nursery.start(bob.run, LOOPBACK, 0)
        met = await alice.connect(bob.peer, bob.candidates())
        with trio.fail_after(20), pytest.raises(TunnelError, match="allow other kinds"):
            await met.open("echo")
        nursery.cancel_scope.cancel()


async def test_a_link_that_falls_silent_is_given_up(over_webrtc: None) -> None:
    async with two_nodes(dead_after_s=4.0) as pair:
        met = await pair.connect()
        [proven] = met._links
        assert isinstance(proven.link, WebRtcLink)
        proven.link.stack.deaf_until_s = float("inf")
        with trio.fail_after(12):
            await proven.link.closed.wait()


IDLE = """
import sys, trio
from tests.lab.nodes import anyone, identity
from tunnels import Endpoint

async def main():
    async with trio.open_nursery() as nursery:
        node = Endpoint(identity("idle"), authorize=anyone)
        await nursery.start(node.run, "127.0.0.1", 0)
        nursery.cancel_scope.cancel()

trio.run(main)
print([name for name in ("aiortc", "aioice", "av") if name in sys.modules])
"""


def test_a_node_without_webrtc_links_does_not_even_load_what_they_take() -> None:
    done = subprocess.run([sys.executable, "-c", IDLE], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
