"""The orchestrator joins workers to a ring: which pairs stand, which do without, what is lost."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import trio

from meshnode.engine.cache import Engine
from meshnode.engine.errors import EngineFailed
from meshnode.events import Event
from meshnode.messages import Message, MessageStream
from meshnode.pipeline import deployment as deployment_module
from meshnode.pipeline import pushing
from meshnode.pipeline import ring as ring_module
from meshnode.pipeline.borrow import Borrowed, LeaseLost, PushEnd, borrow
from meshnode.pipeline.deployment import Deployment, Placement
from meshnode.pipeline.plan import Plan
from meshnode.pipeline.protocol import (
    PUSH_SERVICE,
    End,
    Granted,
    LeaseRequest,
    PushFrom,
    PushNews,
)
from meshnode.pipeline.ring import Member, Pair, Partings, Ring, RingLost
from tests.lab.lenders import SOON_S, Lender, Town
from tests.lab.stalls import until
from tunnels import Endpoint, Identity, PeerId, Session, Stream


@dataclass
class Scene:
    """Workers a, b, … with a lease each, and the ring that a borrower makes of them."""

    folder: Path
    workers: list[Lender]
    members: list[Member]
    partings: Partings = field(default_factory=Partings)
    events: list[Event] = field(default_factory=list)

    def ring(self, *chain: Member | None) -> Ring:
        """Of all of them, or of these."""
        return Ring(chain or self.members, self.folder / "ring", self.partings, self.events.append)

    def told(self) -> list[tuple[object, object, object]]:
        rows = [event.data for event in self.events]
        return [(row["from"], row["to"], row["straight"]) for row in rows]

    def lines(self) -> list[str]:
        return (self.folder / "ring").read_text().splitlines()


@asynccontextmanager
async def scene(
    folder: Path, *names: str, old: str = "", acquainted: bool = True
) -> AsyncIterator[Scene]:
    async with AsyncExitStack() as stack:
        town = Town(folder)
        borrower = await stack.enter_async_context(town.borrower())
        workers: list[Lender] = []
        members: list[Member] = []
        for name in names:
            worker = await stack.enter_async_context(town.lender(name, knows_ring=name != old))
            if workers and acquainted:
                await workers[-1].meet(worker)
            borrowed = await stack.enter_async_context(borrower.borrow(worker))
            workers.append(worker)
            session = await borrower.session(worker)
            members.append(Member(name, session, f"unix:/{name}", borrowed))
        yield Scene(folder, workers, members)


@asynccontextmanager
async def running(stage: Scene, ring: Ring) -> AsyncIterator[None]:
    """From the moment when the file is there."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ring.run)
        await until((stage.folder / "ring").exists)
        yield
        nursery.cancel_scope.cancel()


@pytest.fixture
def short_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A socket's path is limited to about 100 bytes."""
    return tmp_path_factory.mktemp("l")


async def test_each_worker_pushes_to_the_next_one(short_path: Path) -> None:
    async with scene(short_path, "a", "b", "c") as stage, running(stage, stage.ring()):
        assert stage.lines() == ["unix:/a\tunix:/b", "unix:/b\tunix:/c"]
        assert stage.told() == [("a", "b", True), ("b", "c", True)]
        a, b, c = stage.workers
        with trio.fail_after(SOON_S):
            assert await a.ask_server("push 9") == b"pushed"
            assert await b.ask_server("take 9") == b"x" * 9
            assert await b.ask_server("push 7") == b"pushed"
            assert await c.ask_server("take 7") == b"x" * 7


async def test_workers_that_do_not_know_each_other_do_without(short_path: Path) -> None:
    async with (
        scene(short_path, "a", "b", acquainted=False) as stage,
        running(stage, stage.ring()),
    ):
        assert stage.lines() == []
        assert stage.told() == [("a", "b", False)]
        assert "through this node" in stage.events[0].text
        assert not any(one.borrowed.ended.is_set() for one in stage.members)


async def test_a_pair_that_says_nothing_holds_up_no_other(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring_module, "SETUP_S", 1.0)
    monkeypatch.setattr(pushing, "SETUP_S", 60.0)

    async def mute(_stream: Stream) -> None:
        await trio.sleep_forever()

    async with scene(short_path, "a", "b", "c") as stage:
        stage.workers[1].endpoint.serve(PUSH_SERVICE, mute)
        async with running(stage, stage.ring()):
            assert stage.lines() == ["unix:/b\tunix:/c"]
            assert stage.told() == [("a", "b", False), ("b", "c", True)]


async def test_next_to_a_worker_without_the_ring_nobody_pushes(short_path: Path) -> None:
    async with scene(short_path, "a", "b", old="b") as stage:
        ring = stage.ring()
        assert ring.file is None, "llama-server need not look for it"
        await ring.run()
        assert not stage.events
        assert not any(one.borrowed.ended.is_set() for one in stage.members)


async def test_past_layers_of_the_orchestrators_own_nobody_pushes(short_path: Path) -> None:
    async with scene(short_path, "a", "b", "c") as stage:
        a, b, c = stage.members
        async with running(stage, stage.ring(None, a, None, b, c)):
            assert stage.lines() == ["unix:/b\tunix:/c"]


async def test_a_server_pushes_to_one_and_is_pushed_to_by_one(short_path: Path) -> None:
    async with scene(short_path, "a", "b", "c") as stage:
        a, b, c = stage.members
        async with running(stage, stage.ring(a, b, a, c)):
            assert stage.told() == [("a", "b", True), ("b", "a", False)]


async def test_a_way_lost_in_use_ends_the_deployment(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring_module, "NEWS_S", 0.1)
    async with scene(short_path, "a", "b") as stage:
        ring, (a, b) = stage.ring(), stage.workers

        async def part() -> None:
            await until(lambda: bool(stage.events))
            await a.knows[b.peer].aclose("gone")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(part)
            with (
                trio.fail_after(SOON_S),
                pytest.raises(RingLost, match="a lost its way to b") as loss,
            ):
                await ring.run()
        assert ring.loss is loss.value
        assert loss.value.pair == (stage.members[0], stage.members[1])


async def test_a_way_that_was_lost_in_use_is_not_tried_for_a_while(short_path: Path) -> None:
    async with scene(short_path, "a", "b", "c") as stage:
        a, b, _ = stage.members
        stage.partings.note((a, b))
        async with running(stage, stage.ring()):
            assert stage.told() == [("a", "b", False), ("b", "c", True)]


async def test_plans_hear_which_pairs_go_through_this_node(short_path: Path) -> None:
    async with scene(short_path, "a", "b", acquainted=False) as stage:
        (a, b), partings = (one.peer for one in stage.members), stage.partings
        assert not partings.apart(a, b)
        async with running(stage, stage.ring()):
            assert partings.apart(a, b)
            assert not partings.apart(b, a), "the other way round nobody tried"
        await stage.workers[0].meet(stage.workers[1])
    again = short_path / "again"
    again.mkdir()
    async with scene(again, "a", "b") as stage:
        (a, b), partings = (one.peer for one in stage.members), stage.partings
        partings.tried((stage.members[0], stage.members[1]), joined=False)
        async with running(stage, stage.ring()):
            assert not partings.apart(a, b), "they are asked again, and have joined"
        partings.note((stage.members[0], stage.members[1]))
        assert partings.apart(a, b)


# --- workers that do not hear each other ----------------------------------------------------

GRANTED = Granted("1", 0, 0, 0, (), ring=1)
SILENT, HEARD = PushNews(End.TO, True, silent=True), PushNews(End.TO, True)


@dataclass
class Heard:
    """What the orchestrator's session with a worker says of it."""

    peer: PeerId
    suspected: bool = False


def standing_pair() -> tuple[Pair, PushEnd, Heard]:
    """Workers a and b, with a way between them; how b is heard here."""
    sessions = [Heard(PeerId(bytes([number]) * 32)) for number in (1, 2)]
    borrowed = Borrowed(GRANTED, MessageStream(cast(Stream, None)))
    one, two = (
        Member(name, cast(Session, session), name, borrowed)
        for name, session in zip("ab", sessions, strict=True)
    )
    end = PushEnd()
    end.hear(HEARD)
    return (one, two), end, sessions[1]


async def test_two_that_this_node_hears_and_that_do_not_hear_each_other_are_parted(
    autojump_clock: object,
) -> None:
    pair, end, _ = standing_pair()
    end.hear(SILENT)
    with trio.fail_after(ring_module.SILENT_S + 1):
        assert "though this node hears both" in await ring_module._until_lost(pair, end)


async def test_the_outage_of_one_of_the_two_is_waited_for(autojump_clock: object) -> None:
    pair, end, second = standing_pair()
    second.suspected = True
    end.hear(SILENT)
    with trio.move_on_after(10 * ring_module.SILENT_S):
        raise AssertionError(await ring_module._until_lost(pair, end))
    end.hear(HEARD)
    second.suspected = False
    with trio.move_on_after(10 * ring_module.SILENT_S):
        raise AssertionError(await ring_module._until_lost(pair, end))


# --- workers that lie -----------------------------------------------------------------------

STANDS, IS_OVER = PushNews(End.FROM, True), PushNews(End.FROM, False, "no more")
SILENT_FIRST = PushNews(End.FROM, True, silent=True)
ORDERED = PushFrom(PeerId(bytes(range(32))))


@asynccontextmanager
async def liar(words: list[Message], *, when_asked: bool) -> AsyncIterator[Borrowed]:
    """A lease of a worker that says these words, at once or after an order."""

    async def control(stream: Stream) -> None:
        messages = MessageStream(stream)
        await messages.receive_untrusted()
        await messages.send(GRANTED.to_message())
        if when_asked:
            await messages.receive_untrusted()
        for word in words:
            await messages.send(word)
        await trio.sleep_forever()

    worker = Endpoint(Identity.generate(), authorize=lambda _peer, _service: True)
    worker.serve("control", control)
    borrower = Endpoint(Identity.generate(), authorize=lambda _peer, _service: False)
    async with trio.open_nursery() as nursery:
        for endpoint in (worker, borrower):
            await nursery.start(endpoint.run, "127.0.0.1", 0)
        session = await borrower.connect(worker.peer, worker.candidates())
        async with borrow(session, LeaseRequest("", "", 1, b""), lambda *_: None) as borrowed:
            yield borrowed
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("words", "when_asked", "reason"),
    [
        pytest.param([STANDS], False, "nobody asked for", id="unasked"),
        pytest.param([PushNews(End.TO, True)], True, "nobody asked for", id="the other end"),
        pytest.param([STANDS, STANDS], True, "what cannot be", id="twice"),
        pytest.param([IS_OVER, STANDS], True, "what cannot be", id="risen again"),
        pytest.param([SILENT_FIRST], True, "what cannot be", id="silent from the start"),
        pytest.param([IS_OVER, IS_OVER], True, "what cannot be", id="over twice"),
    ],
)
async def test_news_that_cannot_be_end_the_lease(
    words: list[PushNews], when_asked: bool, reason: str
) -> None:
    async with liar([one.to_message() for one in words], when_asked=when_asked) as borrowed:
        if when_asked:
            await borrowed._messages.send(ORDERED.to_message())
            borrowed._ends[End.FROM] = PushEnd()
        with trio.fail_after(SOON_S):
            await borrowed.ended.wait()
        assert reason in borrowed.reason


# --- what the deployment makes of it --------------------------------------------------------


@dataclass
class LostWay:
    """A deployment whose engine failed, as it does when a push fails; its ring knows why."""

    pair: Pair
    folder: Path
    partings: Partings = field(default_factory=Partings)

    def deployment(self, monkeypatch: pytest.MonkeyPatch) -> Deployment:
        plan = Plan((), True, 0, (), (), ())
        deployment = Deployment(
            cast(Placement, SimpleNamespace(plan=plan, lenders=(), manifest=None, part=None)),
            engine=cast(Engine, None),
            runtime_folder=self.folder,
            log_folder=self.folder,
            emit=lambda _event: None,
            on_step=lambda *_: None,
            partings=self.partings,
        )
        ring = Ring((), self.folder / "ring", self.partings, lambda _event: None)
        ring.loss = RingLost("a lost its way to b", self.pair)

        async def fail(*_: object) -> None:
            raise EngineFailed("llama-server was killed", (), self.folder)

        monkeypatch.setattr(deployment, "_serve", fail)
        monkeypatch.setattr(deployment, "_ring", lambda _endpoints: ring)
        return deployment


async def test_an_engine_that_fails_for_a_lost_way_is_told_as_that_and_parts_the_two(
    tmp_path: Path, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That llama-server ended is not what a user can do something about."""
    pair, _, _ = standing_pair()
    lost = LostWay(pair, tmp_path)
    with pytest.raises(RingLost, match="a lost its way to b"):
        await lost.deployment(monkeypatch).run(lambda _deployed: None)
    assert lost.partings.recent(pair), "the next deployment does without this way"


async def test_two_whose_way_was_lost_because_one_died_are_not_parted(
    tmp_path: Path, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The news of the lease comes a moment after the engine's end."""
    pair, _, _ = standing_pair()
    lost = LostWay(pair, tmp_path)
    deployment = lost.deployment(monkeypatch)

    async def lose_a_lease(nursery: trio.Nursery) -> dict[str, str]:
        async def later() -> None:
            await trio.sleep(deployment_module.LEASE_NEWS_S / 2)
            deployment._lease_lost.set()
            raise LeaseLost("the lease on b ended")

        nursery.start_soon(later)
        return {}

    monkeypatch.setattr(deployment, "_open_endpoints", lose_a_lease)
    with pytest.raises(LeaseLost):
        await deployment.run(lambda _deployed: None)
    assert not lost.partings.recent(pair)
