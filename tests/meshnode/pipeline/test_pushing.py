"""From worker to worker: who may push into a lease, and what a hostile one gets out of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from meshnode.pipeline import pushing
from meshnode.pipeline.borrow import Borrowed, PushRefused
from meshnode.pipeline.protocol import PUSH_SERVICE, PushFrom, PushTo
from meshnode.pipeline.pushing import OUT_OF_REACH, OVER
from tests.lab.lenders import SOON_S, Borrower, Lender, Town
from tests.lab.stalls import open_at, unfinished, until
from tunnels import Identity, Session, StreamError, StreamRefused
from tunnels.credit import MAX_WINDOW_BYTES

REFUSED = "is not offered to this node"


@dataclass
class Scene:
    """Two workers, a lease at each for the same borrower."""

    town: Town
    borrower: Borrower
    first: Lender
    second: Lender
    lent: tuple[Borrowed, Borrowed]

    async def join(self) -> None:
        """The first is to push to the second."""
        one, two = self.lent
        with trio.fail_after(SOON_S):
            await two.order(PushFrom(self.first.peer))
            await one.order(PushTo(self.second.peer, two.granted.lease))

    async def end_of_second(self) -> None:
        """The lease at the second worker ends."""
        await (await self.borrower.session(self.second)).aclose("gone")
        await until(lambda: not self.second.desk.leases)

    @property
    def service(self) -> str:
        """For pushing to the second."""
        return PUSH_SERVICE + self.second.lease.id


@asynccontextmanager
async def scene(folder: Path) -> AsyncIterator[Scene]:
    async with AsyncExitStack() as stack:
        town = Town(folder)
        first = await stack.enter_async_context(town.lender("a"))
        second = await stack.enter_async_context(town.lender("b"))
        await first.meet(second)
        borrower = await stack.enter_async_context(town.borrower())
        one = await stack.enter_async_context(borrower.borrow(first))
        two = await stack.enter_async_context(borrower.borrow(second))
        yield Scene(town, borrower, first, second, (one, two))


@pytest.fixture
def short_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A socket's path is limited to about 100 bytes."""
    return tmp_path_factory.mktemp("l")


async def refusal(lender: Lender, at: Lender, service: str) -> str:
    stream = await lender.knows[at.peer].open(service)
    with trio.fail_after(SOON_S), pytest.raises(StreamError) as caught:
        await stream.receive_some()
    return str(caught.value)


async def test_what_one_worker_pushes_the_next_one_takes(short_path: Path) -> None:
    async with scene(short_path) as stage:
        assert [lent.granted.ring for lent in stage.lent] == [1, 1]
        await stage.join()
        assert await stage.first.ask_server("push 300000") == b"pushed"
        with trio.fail_after(SOON_S):
            assert await stage.second.ask_server("take 300000") == b"x" * 300_000
        assert stage.borrower.endpoint.session(stage.second.peer) is not None


async def test_a_worker_whose_engine_knows_no_ring_says_so_and_hears_no_orders(
    short_path: Path,
) -> None:
    town = Town(short_path)
    async with (
        town.lender("a", knows_ring=False) as old,
        town.borrower() as borrower,
        borrower.borrow(old) as lent,
    ):
        assert lent.granted.ring == 0
        await lent._messages.send(PushFrom(old.peer).to_message())
        with trio.fail_after(SOON_S):
            await lent.ended.wait()
        assert "talks on" in lent.reason


async def test_nobody_pushes_whom_the_lease_does_not_name(short_path: Path) -> None:
    async with scene(short_path) as stage, stage.town.lender("c") as third:
        await third.meet(stage.second)
        assert REFUSED in await refusal(stage.first, stage.second, stage.service), "not yet"
        await stage.join()
        assert REFUSED in await refusal(third, stage.second, stage.service)
        assert REFUSED in await refusal(stage.first, stage.second, PUSH_SERVICE + "00ff")
        session = await stage.borrower.session(stage.second)
        async with await session.open(stage.service) as stream:
            with pytest.raises(StreamRefused, match=REFUSED):
                await stream.receive_some()


async def test_nobody_pushes_once_the_lease_has_ended(short_path: Path) -> None:
    async with scene(short_path) as stage:
        await stage.join()
        service, (_, two) = stage.service, stage.lent
        await stage.end_of_second()
        assert two.ended.is_set()
        assert REFUSED in await refusal(stage.first, stage.second, service)
        await until(lambda: not unfinished(stage.first.knows[stage.second.peer]))


async def test_a_hundred_streams_into_one_lease_are_one(short_path: Path) -> None:
    async with scene(short_path) as stage:
        await stage.join()
        told = [await refusal(stage.first, stage.second, stage.service) for _ in range(100)]
        assert any("pushes into this lease already" in one for one in told)
        assert any("asked too often" in one for one in told), "and not for long"
        assert await stage.first.ask_server("push 9") == b"pushed", "the one goes on"
        with trio.fail_after(SOON_S):
            assert await stage.second.ask_server("take 9") == b"x" * 9


async def test_a_push_without_end_waits_for_who_takes_it(short_path: Path) -> None:
    """Its bytes stay where they are: nothing between the two keeps more than a window of them."""
    async with scene(short_path) as stage, trio.open_nursery() as nursery:
        await stage.join()
        nursery.start_soon(stage.first.ask_server, "flood")
        session = stage.first.knows[stage.second.peer]
        (stream,) = open_at(session, stage.service)
        await until(lambda: stream.state.sendable_bytes == 0)
        assert session.stats.bytes_out < 4 * MAX_WINDOW_BYTES
        with trio.fail_after(SOON_S):
            taken = await stage.second.ask_server(f"take {1 << 20}")
        assert taken == b"x" * (1 << 20), "what is taken makes room"
        await stage.end_of_second()
        await until(lambda: not unfinished(session))
        nursery.cancel_scope.cancel()


async def test_an_owner_that_names_neighbours_twice_loses_the_lease(short_path: Path) -> None:
    async with scene(short_path) as stage:
        await stage.join()
        _, two = stage.lent
        await two._messages.send(PushFrom(Identity.generate().peer).to_message())
        with trio.fail_after(SOON_S):
            await two.ended.wait()
        assert "names the neighbours of a lease twice" in two.reason


async def test_a_peer_that_never_asked_is_not_pushed_to(short_path: Path) -> None:
    """Named by a hostile owner: a member that lends to somebody else, and one nobody has met."""
    async with scene(short_path) as stage, stage.town.lender("c") as third:
        await stage.first.meet(third)
        one, two = stage.lent
        with trio.fail_after(SOON_S), pytest.raises(PushRefused, match=OUT_OF_REACH):
            await one.order(PushTo(third.peer, "00ff"))
        with trio.fail_after(SOON_S), pytest.raises(PushRefused, match=OUT_OF_REACH):
            await two.order(PushTo(Identity.generate().peer, "00ff"))
        assert not one.ended.is_set()
        assert not two.ended.is_set()


async def test_the_end_of_a_push_is_told_to_the_owner(short_path: Path) -> None:
    async with scene(short_path) as stage:
        one, two = stage.lent
        with trio.fail_after(SOON_S):
            await two.order(PushFrom(stage.first.peer))
            end = await one.order(PushTo(stage.second.peer, two.granted.lease))
            await stage.first.knows[stage.second.peer].aclose("gone")
            await end.over.wait()
        assert end.reason == OVER
        assert not one.ended.is_set(), "the lease is another thing"


async def test_a_successor_that_never_says_yes_is_given_up(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshnode.pipeline.pushing.SETUP_S", 0.2)

    async def mute(stream: object) -> None:
        await trio.sleep_forever()

    async with scene(short_path) as stage:
        stage.second.endpoint.serve(PUSH_SERVICE, mute)
        one, two = stage.lent
        await two.order(PushFrom(stage.first.peer))
        with trio.fail_after(SOON_S), pytest.raises(PushRefused, match=OUT_OF_REACH):
            await one.order(PushTo(stage.second.peer, two.granted.lease))
        await until(lambda: not unfinished(stage.first.knows[stage.second.peer]))


async def test_a_silence_between_the_two_is_told_to_the_owner_and_its_end(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silences, heard = iter([True]), trio.Event()

    async def one_silence(_session: Session) -> bool:
        if not next(silences, False):
            await trio.sleep_forever()
        return True

    monkeypatch.setattr(pushing, "long_silence", one_silence)
    async with scene(short_path) as stage:
        monkeypatch.setattr(stage.first.knows[stage.second.peer], "wait_heard", heard.wait)
        one, two = stage.lent
        await two.order(PushFrom(stage.first.peer))
        end = await one.order(PushTo(stage.second.peer, two.granted.lease))
        await until(lambda: end.silent)
        heard.set()
        await until(lambda: not end.silent)
        assert not end.over.is_set()
