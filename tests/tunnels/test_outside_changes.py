"""How a node looks from outside changes: it keeps what it has, and notices what it lost."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from tests.lab.nats import Kind
from tests.lab.nodes import start_node
from tests.lab.outside import HOME, PORT, STUN_PORT, A, B, behind_easy_nat, lab, router
from tunnels import outside
from tunnels.outside import CHECK_S, KEEP_ALIVE_S
from tunnels.peer import NatKind
from tunnels.stun import Server


async def test_a_mapping_is_kept_open_by_one_small_question_now_and_then(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with behind_easy_nat() as (world, _, _):
        began_s = trio.current_time()
        world.asked_at(A)
        await trio.sleep(2 * KEEP_ALIVE_S + 1)
        assert trio.current_time() - began_s < CHECK_S
        questions = [to for to, _ in world.world.log if to[1] == STUN_PORT]
        assert len(questions) == 2
        assert len(set(questions)) == 1
        world.asked_at(B)
        await trio.sleep(CHECK_S - 2 * KEEP_ALIVE_S)
        assert world.asked_at(B) == 1, "each minute all are asked"


@pytest.mark.parametrize("kind", ["none", "hard"])
async def test_where_there_is_nothing_to_keep_open_nothing_is_sent(
    autojump_clock: trio.testing.MockClock, kind: str
) -> None:
    async with lab() as world:
        world.add_server(A)
        world.add_server(B)
        view, _ = world.view(kind, [A, B])
        await view.checked.wait()
        world.asked_at(A, B)
        await trio.sleep(CHECK_S - 1)
        assert world.asked_at(A, B) == 0
        await trio.sleep(2)
        assert world.asked_at(A, B) == 2


async def test_a_router_that_forgot_us_is_noticed(autojump_clock: trio.testing.MockClock) -> None:
    async with behind_easy_nat() as (_, view, nat):
        (before,) = view.candidates()
        changed, since_s = view.changed, trio.current_time()
        nat.rebind()
        await changed.wait()
        (after,) = view.candidates()
        assert after.host == before.host
        assert after.port != before.port
        assert trio.current_time() - since_s <= KEEP_ALIVE_S + 1


@pytest.mark.parametrize(
    ("nat", "kind", "within_s"), [("hard", NatKind.HARD, 1), ("blocked", NatKind.BLOCKED, 5)]
)
async def test_another_network_is_looked_at_and_believed_at_once(
    autojump_clock: trio.testing.MockClock, nat: str, kind: NatKind, within_s: float
) -> None:
    async with behind_easy_nat() as (_, view, here):
        other, changed, since_s = router(nat), view.changed, trio.current_time()
        here.kind, here.blocks_udp = other.kind, other.blocks_udp
        view.check_now()
        await changed.wait()
        assert view.facts(4).kind is kind
        assert trio.current_time() - since_s < within_s


async def test_while_nobody_answers_they_are_asked_again_soon(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with lab() as world:
        world.add_server(A)
        world.add_server(B)
        view, nat = world.view("easy", [A, B])
        nat.blocks_udp = True
        await view.checked.wait()
        nat.blocks_udp, changed, since_s = False, view.changed, trio.current_time()
        await changed.wait()
        assert view.facts(4).kind is NatKind.EASY
        assert trio.current_time() - since_s <= outside.CHECK_AGAIN_S + 1


async def test_an_outage_changes_nothing_of_what_is_known(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with behind_easy_nat() as (_, view, nat):
        changed, before = view.changed, view.candidates()
        nat.blocks_udp = True
        await trio.sleep(KEEP_ALIVE_S + 10)
        nat.blocks_udp = False
        await trio.sleep(CHECK_S)
        assert not changed.is_set()
        assert view.candidates() == before


async def test_a_network_that_begins_to_block_is_found_out_after_a_while(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with behind_easy_nat() as (_, view, nat):
        nat.blocks_udp, changed, since_s = True, view.changed, trio.current_time()
        await changed.wait()
        assert view.facts(4).kind is NatKind.BLOCKED
        assert 20 < trio.current_time() - since_s < 2 * CHECK_S


async def test_a_check_that_finds_what_was_known_is_no_change(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with behind_easy_nat() as (_, view, _):
        changed = view.changed
        await trio.sleep(5 * CHECK_S)
        assert not changed.is_set()


async def test_a_network_that_changes_while_we_look_is_looked_at_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with lab() as world:
        world.add_server(A)
        world.add_server(B)
        view, nat = world.view("easy", [A, B])
        nat.blocks_udp = True
        await trio.sleep(1)
        nat.blocks_udp = False
        view.check_now()
        await view.checked.wait()
        await trio.sleep(1)
        assert view.facts(4).kind is NatKind.EASY


async def test_a_node_that_comes_into_another_network_looks_at_it_at_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with lab() as world:
        world.add_server(A)
        world.add_server(B)
        before = router("easy")
        home = world.internet.host(HOME, behind=world.internet.network(before))
        servers = [Server(host, STUN_PORT) for host in (A, B)]
        started = await start_node(world.nursery, home, "node", port=PORT, stun=servers)
        view = started.endpoint.outside
        await view.checked.wait()
        assert view.facts(4).kind is NatKind.EASY
        before.kind = Kind.SYMMETRIC
        home.changes.unpark_all()
        await trio.sleep(1)
        assert view.facts(4).kind is NatKind.HARD
