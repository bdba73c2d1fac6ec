"""trio and asyncio side by side: what one leaves for the other is done, and nothing outlives."""

from __future__ import annotations

import threading

import pytest
import trio

from tunnels._asyncio_island import Island
from tunnels.errors import LinkClosed


def island_threads() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name == "asyncio island"]


async def nothing() -> None:
    pass


async def test_it_begins_with_the_first_visit_and_ends_with_the_nursery() -> None:
    async with trio.open_nursery() as nursery:
        island = Island(nursery)
        assert not island_threads()
        await island.run(nothing)
        assert len(island_threads()) == 1
        nursery.cancel_scope.cancel()
    assert not island_threads()
    assert not island.stands


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
