"""A worker that lies about what it lends holds up nobody who can do without it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from discovery.token import Token, parse_untrusted
from meshnode.connections import Connections
from meshnode.engine.cache import load_engine
from meshnode.membership import Membership
from meshnode.messages import MessageStream
from meshnode.pipeline.protocol import DeviceFacts, Granted, WorkerFacts
from meshnode.state import Home
from tests.e2e.conftest import World
from tests.e2e.test_two_nodes import alone, greedy_tokens, status_of, url_of
from tunnels import Endpoint, Stream

pytestmark = pytest.mark.engine

PLENTY_BYTES = 1 << 40


async def refuse(messages: MessageStream) -> None:
    await messages.send({"event": "refused", "reason": "not today"})


async def end_at_once(messages: MessageStream) -> None:
    await messages.send(Granted("00", 0, 0, 0, ()).to_message())
    await messages.send({"event": "ended", "reason": "not today"})


@asynccontextmanager
async def liar(
    folder: Path, token: Token, engine_key: str, lend: Callable[[MessageStream], Awaitable[None]]
) -> AsyncIterator[None]:
    """A member that offers much memory, and answers requests for it with `lend`."""
    device = DeviceFacts("CPU", "a large one", False, PLENTY_BYTES, PLENTY_BYTES)
    facts = WorkerFacts("liar", engine_key, "cpu", PLENTY_BYTES, (device,), ())

    async def control(stream: Stream) -> None:
        messages = MessageStream(stream)
        if (await messages.receive_untrusted(1 << 24)).get("op") == "facts":
            await messages.send(facts.to_message())
        else:
            await lend(messages)
        await stream.send_eof()

    with Home(folder) as home:
        identity = home.identity("node.key")
        membership = Membership(home, identity, "liar")
        endpoint = Endpoint(identity, authorize=membership.authorize)
        endpoint.serve("control", control)
        connections = Connections(endpoint, membership, lambda _event: None)
        connections.offer_services()
        async with trio.open_nursery() as nursery:
            await nursery.start(endpoint.run, "127.0.0.1", 0)
            await connections.join(token)
            yield
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("lend", [refuse, end_at_once])
async def test_a_worker_that_offers_and_does_not_lend_is_done_without(
    world: World,
    small_model: Path,
    engine_bin: Path,
    tmp_path: Path,
    lend: Callable[[MessageStream], Awaitable[None]],
) -> None:
    expected = await alone(world, small_model)
    models = ("--models", str(small_model.parent))
    arguments = ("--model", str(small_model), "--split=always")
    async with world.serve(*arguments, name="node") as node:
        token = parse_untrusted(await world.token_of(node))
        key = load_engine(engine_bin).key
        async with liar(tmp_path / "liar", token, key, lend):
            await node.wait_event("peer", containing="liar")
            join = f"--join-file={await world.join_file(node)}"
            async with world.worker(*models, join, name="honest"):
                url = await url_of(node)
                assert await greedy_tokens(url) == expected
                status = await status_of(url)
    assert {share["node"] for share in status["layers"]} == {"local", "honest"}
