"""trio and asyncio side by side: what one leaves for the other is done, and nothing outlives."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
import trio
import trio.testing

from tunnels._asyncio_island import Island
from tunnels.errors import LinkClosed


async def nothing() -> None:
    pass


async def test_it_begins_with_the_first_visit_and_ends_with_the_nursery() -> None:
    async with trio.open_nursery() as nursery:
        island = Island(nursery)
        assert not island.stands
        await island.run(nothing)
        assert island.stands
        nursery.cancel_scope.cancel()
    assert not island.stands
    assert island.is_over


async def test_both_live_in_one_thread() -> None:
    async def where() -> int:
        return threading.get_ident()

    async with trio.open_nursery() as nursery:
        assert await Island(nursery).run(where) == threading.get_ident()
        nursery.cancel_scope.cancel()


async def test_its_time_is_trios(autojump_clock: trio.testing.MockClock) -> None:
    began_s, real_s = trio.current_time(), time.monotonic()
    async with trio.open_nursery() as nursery:
        await Island(nursery).run(asyncio.sleep, 3600)
        nursery.cancel_scope.cancel()
    assert trio.current_time() - began_s == pytest.approx(3600)
    assert time.monotonic() - real_s < 60


async def test_one_that_never_rests_leaves_trio_its_turn() -> None:
    async def spin() -> None:
        loop = asyncio.get_running_loop()

        def again() -> None:
            loop.call_soon(again)

        again()

    async with trio.open_nursery() as nursery:
        await Island(nursery).run(spin)
        with trio.fail_after(20):
            for _ in range(100):
                await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()


async def test_what_other_threads_answer_wakes_it() -> None:
    """Names are looked up in threads."""

    async def look_up() -> str:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None, lambda: "found")

    async with trio.open_nursery() as nursery:
        with trio.fail_after(20):
            assert await Island(nursery).run(look_up) == "found"
        nursery.cancel_scope.cancel()


async def test_a_visitor_that_is_cancelled_at_once_leaves_it_whole() -> None:
    async with trio.open_nursery() as nursery:
        island = Island(nursery)
        with trio.CancelScope() as scope:
            scope.cancel()
            await island.run(nothing)
        await island.run(nothing)
        nursery.cancel_scope.cancel()


class Echo(asyncio.DatagramProtocol):
    """Sends what arrives back, and keeps it."""

    def __init__(self) -> None:
        self.got: list[bytes] = []
        self.some = asyncio.Event()
        self.enough = asyncio.Event()
        self.is_lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.got.append(data)
        self.some.set()
        if len(self.got) == 100:
            self.enough.set()


async def test_datagrams_go_there_and_back_and_the_last_leave_with_the_socket() -> None:
    async def meet() -> tuple[Echo, Echo]:
        loop = asyncio.get_running_loop()
        ends = []
        for host in ("127.0.0.1", "127.0.0.1"):
            ends.append(await loop.create_datagram_endpoint(Echo, local_addr=(host, 0)))
        (left, ours), (right, theirs) = ends
        for number in range(100):
            left.sendto(bytes([number]) * (1200 if number < 90 else 10), right_name(right))
        await theirs.enough.wait()
        right.sendto(b"the last", right_name(left))
        right.close()
        right.sendto(b"too late", right_name(left))
        await ours.some.wait()
        left.close()
        await asyncio.sleep(0)
        return ours, theirs

    def right_name(transport: asyncio.DatagramTransport) -> tuple[str, int]:
        name: tuple[str, int] = transport.get_extra_info("sockname")
        return name

    async with trio.open_nursery() as nursery:
        with trio.fail_after(20):
            ours, theirs = await Island(nursery).run(meet)
        assert [(one[0], len(one)) for one in theirs.got] == [
            (number, 1200 if number < 90 else 10) for number in range(100)
        ]
        assert ours.got == [b"the last"]
        assert ours.is_lost
        assert theirs.is_lost
        nursery.cancel_scope.cancel()


async def test_an_address_that_is_not_ours_is_refused_as_asyncio_does() -> None:
    async def bind() -> None:
        loop = asyncio.get_running_loop()
        await loop.create_datagram_endpoint(Echo, local_addr=("192.0.2.1", 0))

    async with trio.open_nursery() as nursery:
        with pytest.raises(OSError, match="assign"):
            await Island(nursery).run(bind)
        nursery.cancel_scope.cancel()


async def test_what_a_visit_returns_and_raises_comes_back() -> None:
    async def add(one: int, other: int) -> int:
        return one + other

    async def fail() -> None:
        raise KeyError("there")

    async with trio.open_nursery() as nursery:
        island = Island(nursery)
        assert await island.run(add, 2, 3) == 5
        with pytest.raises(KeyError, match="there"):
            await island.run(fail)
        assert await island.run(add, 1, 1) == 2
        nursery.cancel_scope.cancel()


async def test_a_visit_that_is_cancelled_is_over_there_before_it_is_over_here() -> None:
    async with trio.open_nursery() as nursery:
        island = Island(nursery)
        ended = []
        begun = trio.Event()

        async def wait() -> None:
            try:
                island.tell(begun.set)
                await island.event().wait()
            finally:
                ended.append(True)

        async with trio.open_nursery() as inner:
            inner.start_soon(island.run, wait)
            await begun.wait()
            inner.cancel_scope.cancel()
        assert ended
        nursery.cancel_scope.cancel()


async def test_calls_are_done_in_order_both_ways() -> None:
    count = 2000
    async with trio.open_nursery() as nursery:
        island = Island(nursery)
        await island.run(nothing)
        there: list[int] = []
        here: list[int] = []
        done = trio.Event()

        def bounce(number: int) -> None:
            there.append(number)
            island.tell(lambda: here.append(number))
            if number == count - 1:
                island.tell(done.set)

        for number in range(count):
            island.call(lambda number=number: bounce(number))  # type: ignore[misc]
        with trio.fail_after(5):
            await done.wait()
        assert there == here == list(range(count))
        nursery.cancel_scope.cancel()


async def test_a_call_that_fails_holds_up_none_behind_it() -> None:
    async with trio.open_nursery() as nursery:
        island = Island(nursery)
        await island.run(nothing)
        done = trio.Event()
        island.call(lambda: 1 / 0)
        island.call(lambda: island.tell(lambda: 1 / 0))
        island.call(lambda: island.tell(done.set))
        with trio.fail_after(5):
            await done.wait()
        nursery.cancel_scope.cancel()


async def test_a_goodbye_is_waited_for_other_tasks_are_not() -> None:
    said = []

    async with trio.open_nursery() as nursery:
        island = Island(nursery)

        async def goodbye() -> None:
            await island.at_most(0.2, island.event().wait())
            said.append("goodbye")

        async def never() -> None:
            await island.event().wait()
            said.append("never")

        async def begin() -> None:
            island.spawn(goodbye(), is_goodbye=True)
            island.spawn(never())

        await island.run(begin)
        nursery.cancel_scope.cancel()
    assert said == ["goodbye"]


async def test_an_island_that_is_over_says_so_and_takes_no_calls() -> None:
    async with trio.open_nursery() as nursery:
        island = Island(nursery)
        await island.run(nothing)
        nursery.cancel_scope.cancel()
    island.call(lambda: pytest.fail("nobody is there"))
    with pytest.raises(LinkClosed, match="stopped"):
        await island.run(nothing)


async def test_a_visitor_learns_that_the_island_ended() -> None:
    async with trio.open_nursery() as nursery, trio.open_nursery() as theirs:
        island = Island(theirs)
        begun = trio.Event()

        async def wait() -> None:
            island.tell(begun.set)
            await island.event().wait()

        async def visit() -> None:
            with pytest.raises(LinkClosed, match="stopped"):
                await island.run(wait)

        nursery.start_soon(visit)
        await begun.wait()
        theirs.cancel_scope.cancel()
