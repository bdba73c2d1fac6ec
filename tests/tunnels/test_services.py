"""What is opened at a peer: offered or refused, by name or prefix, answered, reset, closed."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from tests.lab.datagrams import World
from tests.lab.nodes import echo, exchange, start_node, two_nodes
from tests.tunnels.conftest import over_every_kind
from tunnels import PeerId, Stream, StreamRefused, StreamReset

pytestmark = pytest.mark.usefixtures("link_kind")


@over_every_kind
async def test_an_unknown_service_is_refused_though_data_was_under_way(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        session = await pair.connect()
        stream = await session.open("nonsense")
        with pytest.raises(StreamRefused, match="'nonsense' is not offered"):
            await stream.send_all(bytes(8 << 20))
        with pytest.raises(StreamRefused):
            await stream.receive_some()
        await stream.aclose()
        assert not session.closed.is_set()
        await trio.sleep(1)
        assert not session._streams


@over_every_kind
async def test_rules_are_asked_for_every_stream(autojump_clock: trio.testing.MockClock) -> None:
    asked: list[tuple[PeerId, str]] = []

    def rules(peer: PeerId, service: str) -> bool:
        asked.append((peer, service))
        if service == "broken":
            raise RuntimeError("a bug in the rules")
        return service == "yes"

    async with trio.open_nursery() as nursery:
        world = World()
        nursery.start_soon(world.run)
        alice = await start_node(nursery, world.host("11.0.0.1"), "alice")
        bob = await start_node(nursery, world.host("11.0.0.2"), "bob", authorize=rules)
        for service in ("yes", "no", "broken"):
            bob.endpoint.serve(service, echo)
        session = await alice.endpoint.connect(bob.endpoint.peer, bob.endpoint.candidates())
        for service in ("yes", "yes", "no", "broken"):
            stream = await session.open(service)
            if service == "yes":
                assert await exchange(stream, b"hello") == b"hello"
            else:
                with pytest.raises(StreamRefused):
                    await stream.receive_some()
        assert asked == [(alice.endpoint.peer, s) for s in ("yes", "yes", "no", "broken")]
        nursery.cancel_scope.cancel()


@over_every_kind
async def test_a_prefix_serves_all_below_it_and_the_longest_wins(
    autojump_clock: trio.testing.MockClock,
) -> None:
    def answer(word: bytes) -> object:
        async def handler(stream: Stream) -> None:
            await stream.send_all(word + b":" + stream.service.encode())

        return handler

    async with two_nodes() as pair:
        serve = pair.bob.endpoint.serve
        serve("rpc/", answer(b"any"))  # type: ignore[arg-type]
        serve("rpc/a/", answer(b"a"))  # type: ignore[arg-type]
        serve("rpc/a/b", answer(b"exact"))  # type: ignore[arg-type]
        session = await pair.connect()
        for service, word in (("rpc/1", "any"), ("rpc/a/1", "a"), ("rpc/a/b", "exact")):
            stream = await session.open(service)
            assert await stream.receive_some() == f"{word}:{service}".encode()
        with pytest.raises(StreamRefused):
            await (await session.open("rpc")).receive_some()


@over_every_kind
async def test_a_failing_handler_resets_its_stream_and_nothing_else(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(stream: Stream) -> None:
        await stream.receive_some()
        raise RuntimeError("boom")

    async with two_nodes() as pair:
        pair.bob.endpoint.serve("fail", fail)
        pair.bob.endpoint.serve("echo", echo)
        session = await pair.connect()
        stream = await session.open("fail")
        await stream.send_all(b"x")
        with pytest.raises(StreamReset, match="the service failed"):
            await stream.receive_some()
        assert "boom" in caplog.text
        assert await exchange(await session.open("echo"), b"still here") == b"still here"


async def test_a_handler_whose_peer_is_lost_leaves_one_line_in_the_log(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "tunnels")

    async def wait(stream: Stream) -> None:
        await stream.receive_some()

    async with two_nodes() as pair:
        pair.bob.endpoint.serve("wait", wait)
        session = await pair.connect()
        await (await session.open("wait")).send_all(b"")
        await trio.sleep(1)
        session.end("\x1b[2Jbye")
        await trio.sleep(1)
        assert "the handler of 'wait' ended early" in caplog.text
        assert "Traceback" not in caplog.text
        assert "?[2Jbye" in caplog.text, "and a peer's words are shown without its tricks"


@over_every_kind
async def test_a_reset_reaches_the_other_side_with_its_reason(
    autojump_clock: trio.testing.MockClock,
) -> None:
    seen: list[str] = []

    async def reader(stream: Stream) -> None:
        try:
            while await stream.receive_some():
                pass
        except StreamReset as reset:
            seen.append(str(reset))

    async with two_nodes() as pair:
        pair.bob.endpoint.serve("reader", reader)
        session = await pair.connect()
        stream = await session.open("reader")
        await stream.send_all(b"half a trans")
        stream.reset("changed my mind")
        with pytest.raises(StreamReset, match="changed my mind"):
            await stream.send_all(b"fer")
        await trio.sleep(1)
        assert seen == ["changed my mind"]


@over_every_kind
async def test_closing_before_all_is_read_stops_the_writer(
    autojump_clock: trio.testing.MockClock,
) -> None:
    stopped = trio.Event()

    async def chatter(stream: Stream) -> None:
        with pytest.raises(StreamReset, match="reads no more"):
            await send_for_ever(stream)
        stopped.set()

    async with two_nodes() as pair:
        pair.bob.endpoint.serve("chatter", chatter)
        session = await pair.connect()
        stream = await session.open("chatter")
        await stream.receive_some()
        await stream.aclose()
        with trio.fail_after(5):
            await stopped.wait()
        await trio.sleep(1)
        assert not session._streams


async def send_for_ever(stream: Stream) -> None:
    while True:
        await stream.send_all(bytes(10_000))


@over_every_kind
async def test_an_answer_survives_the_handler_that_ignores_the_question(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def answer(stream: Stream) -> None:
        await stream.send_all(b"no thanks")

    async with two_nodes() as pair:
        pair.bob.endpoint.serve("answer", answer)
        session = await pair.connect()
        stream = await session.open("answer")
        await stream.send_all(b"a long question" * 1000)
        await trio.sleep(1)
        assert await stream.receive_some() == b"no thanks"
        assert await stream.receive_some() == b""
