"""Pulls for this node's user: a few at once, and the others when one of them has ended."""

from __future__ import annotations

from typing import cast

import pytest
import trio
import trio.testing

from meshnode.models.fetching import OnProgress
from meshnode.pipeline import user_pulls
from meshnode.pipeline.commission import Held
from meshnode.pipeline.orders import Orders, Target
from meshnode.pipeline.pulling import Puller
from meshnode.pipeline.user_pulls import MAX_PULLS, TooManyPulls, UserPulls


class Others:
    """Other nodes, which pull until they are told to end. `pulling`: by name."""

    def __init__(self) -> None:
        self.pulling: dict[str, trio.Event] = {}
        self.began: list[str] = []

    def find(self, node: str) -> Target:
        return Target(node, f"peer-of-{node}")

    async def pull(self, node: str, _source: str, _layers: str | None, _tell: OnProgress) -> Held:
        self.began.append(node)
        self.pulling[node] = trio.Event()
        try:
            await self.pulling[node].wait()
        finally:
            del self.pulling[node]
        return Held("far", "f" * 64, 2, 2, 2, complete=True, proof="word")


@pytest.fixture
def others() -> Others:
    return Others()


@pytest.fixture
def pulls(others: Others) -> UserPulls:
    return UserPulls("attic", "peer-of-attic", cast(Puller, None), cast(Orders, others))


async def test_more_pulls_than_go_on_at_once_wait_their_turn(
    pulls: UserPulls, others: Others
) -> None:
    held: list[str] = []
    nodes = [f"n{at:02}" for at in range(2 * MAX_PULLS + 1)]

    async def pull(node: str) -> None:
        held.append((await pulls.pull("mesh:far", None, lambda *_: None, node=node))["node"])

    async with trio.open_nursery() as nursery:
        for node in nodes:
            nursery.start_soon(pull, node)
            await trio.testing.wait_all_tasks_blocked()
        assert others.began == nodes[:MAX_PULLS]
        while others.pulling:
            assert len(others.pulling) <= MAX_PULLS
            next(iter(others.pulling.values())).set()
            await trio.testing.wait_all_tasks_blocked()
    assert others.began == nodes, "who asks first is first"
    assert held == nodes


async def test_who_gives_up_waiting_keeps_no_place(
    pulls: UserPulls, others: Others, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(user_pulls, "MAX_ASKED", MAX_PULLS + 1)
    async with trio.open_nursery() as nursery:

        async def pull(node: str) -> None:
            await pulls.pull("mesh:far", None, lambda *_: None, node=node)

        for at in range(MAX_PULLS):
            nursery.start_soon(pull, f"n{at}")
        await trio.testing.wait_all_tasks_blocked()
        with trio.CancelScope() as leaving:
            async with trio.open_nursery() as waiting:
                waiting.start_soon(pull, "late")
                await trio.testing.wait_all_tasks_blocked()
                with pytest.raises(TooManyPulls, match="wait for one"):
                    await pull("later")
                leaving.cancel()
        nursery.start_soon(pull, "next")
        await trio.testing.wait_all_tasks_blocked()
        others.pulling["n0"].set()
        await trio.testing.wait_all_tasks_blocked()
        assert others.began[MAX_PULLS:] == ["next"], "not the one that left"
        nursery.cancel_scope.cancel()
