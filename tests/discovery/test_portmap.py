"""A node behind a router: its ports are mapped, kept mapped and given back, whatever the router."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from discovery.gateway import Gateway
from discovery.portmap import CHECK_S, GOODBYE_S, describe, survey
from tests.discovery.routers import GATEWAY, OURS, OUTSIDE
from tests.lab.datagrams import Weather, World
from tests.lab.home_network import BOTH, BOTH_OPEN, Clock, a_router, at_home
from tests.lab.routers import EVERYTHING, MAP_PORT, Router

# --- honest routers --------------------------------------------------------------------------


@pytest.mark.parametrize("way", EVERYTHING)
async def test_both_ports_are_mapped_and_given_back(autojump_clock: Clock, way: str) -> None:
    router = a_router(way)
    async with at_home(router) as home:
        assert home.portmap.candidates() == BOTH
        assert router.open == BOTH_OPEN
        assert describe(home.portmap.status) == (
            f"the router forwards UDP {OUTSIDE}:4242, TCP {OUTSIDE}:4242 ({way})"
        )
        assert home.told == [home.portmap.status]
    assert router.open == {}


async def test_of_a_router_that_knows_all_ways_one_is_used(autojump_clock: Clock) -> None:
    router = a_router()
    async with at_home(router) as home:
        assert set(router.asked) == {home.portmap.status.by}
        assert len(router.asked) == 2


@pytest.mark.parametrize("way", EVERYTHING)
async def test_mappings_are_renewed_before_they_end(autojump_clock: Clock, way: str) -> None:
    router = a_router(way, grants_s=240)
    async with at_home(router) as home:
        asked_at_first = len(router.asked)
        for _ in range(120):
            await trio.sleep(60)
            assert router.open == BOTH_OPEN
        renewals = (len(router.asked) - asked_at_first) / 2
        assert 3 <= renewals <= 7200 / 120 + 3
        assert len(home.told) == 1  # nothing has changed for the user


@pytest.mark.parametrize("way", EVERYTHING)
async def test_a_router_that_restarted_is_asked_again_within_a_minute(
    autojump_clock: Clock, way: str
) -> None:
    router = a_router(way)
    async with at_home(router) as home:
        await trio.sleep(300)
        router.restart()
        assert router.open == {}
        await trio.sleep(CHECK_S + 1)
        assert router.open == BOTH_OPEN
        assert home.portmap.candidates() == BOTH


@pytest.mark.parametrize("way", ["NAT-PMP", "UPnP"])
async def test_a_new_outside_address_is_noticed(autojump_clock: Clock, way: str) -> None:
    router = a_router(way)
    async with at_home(router) as home:
        router.outside = "11.99.88.77"
        await trio.sleep(CHECK_S + 1)
        assert {one.host for one in home.portmap.candidates()} == {"11.99.88.77"}


async def test_another_router_gets_the_mappings_and_the_old_one_loses_them(
    autojump_clock: Clock,
) -> None:
    old = a_router("PCP")
    new = Router(old.world, ("NAT-PMP",), address="192.168.7.2", outside="11.99.88.77")
    async with at_home(old, new) as home:
        home.router = new.gateway()
        home.change_network()
        await trio.sleep(5)
        assert (old.open, new.open) == ({}, BOTH_OPEN)
        assert home.portmap.status.by == "NAT-PMP"
        # Without a word from the system it is noticed too.
        home.router = old.gateway()
        await trio.sleep(CHECK_S + 5)
        assert (old.open, new.open) == (BOTH_OPEN, {})


async def test_a_network_that_comes_later_is_used_at_once(autojump_clock: Clock) -> None:
    router = a_router("PCP")
    async with at_home(world=router.world) as home:
        assert "no IPv4 router" in describe(home.portmap.status)
        home.nursery.start_soon(router.run)
        await trio.sleep(1000)
        home.router = router.gateway()
        home.change_network()
        await trio.sleep(5)
        assert home.portmap.candidates() == BOTH


async def test_a_router_that_is_silent_for_a_while_is_asked_again(autojump_clock: Clock) -> None:
    router = a_router("PCP")
    async with at_home(router) as home:
        home.world.cut = True
        await trio.sleep(CHECK_S + 10)
        assert home.portmap.candidates() == []
        home.world.cut = False
        await trio.sleep(60)
        assert home.portmap.candidates() == BOTH


async def test_lost_questions_are_repeated(autojump_clock: Clock) -> None:
    router = a_router("PCP")
    router.world.weather = Weather(delay_s=0.001, loss=0.3)
    async with at_home(router) as home:
        await trio.sleep(30)
        assert {one.transport for one in home.portmap.candidates()} == {"quic", "tcp"}
        router.world.weather = Weather(delay_s=0.001)


# --- routers with a will of their own ----------------------------------------------------------


@pytest.mark.parametrize("way", EVERYTHING)
async def test_a_port_that_is_taken_is_mapped_under_another_number(
    autojump_clock: Clock, way: str
) -> None:
    router = a_router(way, taken={4242})
    async with at_home(router) as home:
        places = home.portmap.candidates()
        assert {one.port for one in places} != {4242}
        assert set(router.open.values()) == {(OURS, 4242)}
        kept = router.open
        await trio.sleep(4000)
        assert router.open == kept  # renewed under the number that was given


async def test_a_router_without_leases_is_cleaned_up_all_the_same(autojump_clock: Clock) -> None:
    router = a_router("UPnP", permanent_only=True)
    async with at_home(router) as home:
        assert home.portmap.candidates() == BOTH
        await trio.sleep(10_000)
        assert router.open == BOTH_OPEN
    assert router.open == {}


async def test_what_one_way_refuses_another_may_give(autojump_clock: Clock) -> None:
    router = a_router("PCP", "UPnP", refuses={"PCP": 2})
    async with at_home(router) as home:
        assert home.portmap.status.by == "UPnP"


@pytest.mark.parametrize(
    ("refuses", "said"),
    [
        ({"PCP": 2, "NAT-PMP": 2, "UPnP": 606}, "PCP: port mapping is switched off in it"),
        ({"PCP": 8, "NAT-PMP": 4, "UPnP": 728}, "no room for another mapping"),
    ],
)
async def test_a_refusal_is_told_in_words(
    autojump_clock: Clock, refuses: dict[str, int], said: str
) -> None:
    async with at_home(a_router(refuses=refuses)) as home:
        assert home.portmap.candidates() == []
        assert said in describe(home.portmap.status)


@pytest.mark.parametrize("way", EVERYTHING)
@pytest.mark.parametrize(
    ("outside", "said"), [("192.168.1.4", "double NAT"), ("100.64.1.2", "CGNAT")]
)
async def test_a_router_behind_another_gives_no_candidate_and_says_so(
    autojump_clock: Clock, way: str, outside: str, said: str
) -> None:
    router = a_router(way, outside=outside)
    async with at_home(router) as home:
        assert home.portmap.candidates() == []
        assert said in str(home.portmap.status.problem)
        assert router.open == {}


async def test_without_an_answer_the_remedy_is_told_soon(autojump_clock: Clock) -> None:
    began_s = trio.current_time()
    async with at_home(Router(World(), ())) as home:
        assert trio.current_time() - began_s < 7
        assert "switch on UPnP, NAT-PMP or PCP" in describe(home.portmap.status)


async def test_a_refused_question_is_not_waited_for(autojump_clock: Clock) -> None:
    world = World(Weather(delay_s=0.001))
    world.refusing |= {(GATEWAY, MAP_PORT)}
    router = Router(world, ("UPnP",))
    async with at_home(router) as home:
        assert home.portmap.status.by == "UPnP"


async def test_a_node_on_another_address_asks_nobody(autojump_clock: Clock) -> None:
    router = a_router()
    async with at_home(router, only_host="10.9.8.7") as home:
        assert "listens on 10.9.8.7" in describe(home.portmap.status)
        assert router.world.sent == 0


async def test_the_goodbye_is_bounded(autojump_clock: Clock) -> None:
    router = a_router("PCP")
    async with at_home(router) as home:
        home.world.cut = True
        began_s = trio.current_time()
    assert trio.current_time() - began_s <= GOODBYE_S


async def test_the_survey_maps_nothing(
    autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = a_router()

    async def gateway() -> Gateway:
        return router.gateway()

    monkeypatch.setattr("discovery.portmap.find_gateway", gateway)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(router.world.run)
        nursery.start_soon(router.run)
        await trio.testing.wait_all_tasks_blocked()
        found = await survey(router.world.host(OURS))
        assert (found.router, found.by) == (GATEWAY, "PCP, NAT-PMP, UPnP")
        assert (router.entries, router.asked) == ({}, [])
        router.world.cut = True
        assert "switch on UPnP" in str((await survey(router.world.host(OURS))).problem)
        nursery.cancel_scope.cancel()
