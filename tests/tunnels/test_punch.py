"""Two nodes behind NATs of every kind, and nothing but what each knows of the other."""

from __future__ import annotations

import statistics
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import pytest
import trio
import trio.testing

from tests.lab.datagrams import FakeSocket, Weather, World
from tests.lab.nats import Internet, Kind, Router
from tests.lab.punchers import KEY, Side, a_side, an_internet, carries, meet
from tunnels.binding import Address
from tunnels.consent import UNASKED_BYTES
from tunnels.errors import ListenFailed, PunchFailed
from tunnels.handshake import Role
from tunnels.meeting import Meeting, Nats
from tunnels.peer import NatKind
from tunnels.probe import GIVE_UP_S
from tunnels.punch import LINGER_S, MAX_SEARCHES
from tunnels.salvo import FAN_SOCKETS, SPRAYED_PORTS

Clock = trio.testing.MockClock
NATS = [kind for kind in Kind if kind not in (Kind.FIREWALL, Kind.LEAKY_HOME)]
STRICT = (Kind.PORT_RESTRICTED, Kind.HOME)
HARD = NatKind.HARD


@dataclass
class Pair:
    world: World
    internet: Internet
    alice: Side
    bob: Side


@asynccontextmanager
async def behind(
    alices: Kind, bobs: Kind, seed: int = 0, weather: Weather | None = None, **options: object
) -> AsyncIterator[Pair]:
    """alice and bob, each behind a router of its kind, who know how the internet sees them."""
    world = World(weather, seed)
    async with an_internet(world) as internet, AsyncExitStack() as stack:
        sides = []
        for number, kind in ((1, alices), (2, bobs)):
            router = Router(f"11.0.{number}.1", kind, **options)  # type: ignore[arg-type]
            host = internet.host(f"192.168.{number}.2", behind=internet.network(router))
            sides.append(await stack.enter_async_context(a_side(host, seed)))
        async with trio.open_nursery() as nursery:
            for side in sides:
                nursery.start_soon(side.look_into_mirrors)
        yield Pair(world, internet, sides[0], sides[1])


@pytest.mark.parametrize("bobs", NATS)
@pytest.mark.parametrize("alices", NATS)
async def test_every_pair_of_nats(alices: Kind, bobs: Kind, autojump_clock: Clock) -> None:
    async with behind(alices, bobs) as pair:
        ours, theirs = await meet(pair.alice, pair.bob)
        if alices.is_hard and bobs.is_hard:
            assert ours.address is None
            assert "both NATs show everybody another port" in ours.why
            assert ours.took_s <= GIVE_UP_S
            return
        assert ours.address is not None, ours.why
        assert theirs.address is not None
        assert await carries(pair.alice, ours.address, pair.bob)
        assert await carries(pair.bob, theirs.address, pair.alice)
        assert ours.took_s < (5 if alices.is_hard or bobs.is_hard else 0.5)


@pytest.mark.parametrize("hard_dials", [True, False])
async def test_guessing_takes_seconds_and_hardly_ever_fails(
    hard_dials: bool, autojump_clock: Clock
) -> None:
    alices, bobs = (Kind.SYMMETRIC, Kind.HOME) if hard_dials else (Kind.HOME, Kind.SYMMETRIC)
    took_s, tries = [], 20
    for seed in range(tries):
        weather = Weather(delay_s=0.02, jitter_s=0.02, loss=0.02)
        async with behind(alices, bobs, seed, weather) as pair:
            ours, theirs = await meet(pair.alice, pair.bob)
            if (
                ours.address
                and theirs.address
                and await carries(pair.alice, ours.address, pair.bob)
            ):
                took_s.append(ours.took_s)
    assert len(took_s) >= 0.95 * tries
    assert statistics.median(took_s) < 2


async def test_the_socket_that_got_through_is_kept_and_the_others_are_closed(
    autojump_clock: Clock,
) -> None:
    kept = set()
    for seed in range(8):
        async with behind(Kind.SYMMETRIC, Kind.HOME, seed) as pair:
            before = len(pair.world._sockets)
            ours, _ = await meet(pair.alice, pair.bob)
            kept.add(len(pair.world._sockets) - before)
            assert ours.address == pair.bob.reflexive[0]
            for _ in range(3):
                await trio.sleep(30)
                assert await carries(pair.alice, ours.address, pair.bob)
    assert kept <= {0, 1}, "none where the node's own socket had the luck"
    assert 1 in kept


async def test_a_guess_is_not_repeated_within_a_minute(autojump_clock: Clock) -> None:
    async with behind(Kind.SYMMETRIC, Kind.HOME) as pair:
        pair.world.cut = True
        sent = []
        for number in range(3):
            before = pair.world.sent
            await meet(pair.alice, pair.bob, bytes([number]) * 32)
            sent.append(pair.world.sent - before)
            await trio.sleep(0 if number == 0 else 60)
        assert sent[0] > SPRAYED_PORTS + FAN_SOCKETS
        assert sent[1] < 100
        assert sent[2] > SPRAYED_PORTS + FAN_SOCKETS


async def test_a_router_that_lets_early_probes_in_its_table_needs_the_same_instant(
    autojump_clock: Clock,
) -> None:
    weather = Weather(delay_s=0.05)
    async with behind(Kind.LEAKY_HOME, Kind.LEAKY_HOME, weather=weather) as pair:
        ours, _ = await meet(pair.alice, pair.bob)
        assert ours.address == pair.bob.reflexive[0]
    async with behind(Kind.LEAKY_HOME, Kind.LEAKY_HOME, weather=weather) as pair:
        late, _ = await meet(pair.alice, pair.bob, skew_s=1.0)
        assert late.address is None, "or this test shows nothing"


@pytest.mark.parametrize(
    ("alices", "bobs"),
    [(Kind.HOME, Kind.HOME), (Kind.SYMMETRIC, Kind.HOME), (Kind.HOME, Kind.SYMMETRIC)],
)
async def test_a_joiner_waits_until_its_code_is_carried_to_the_other_side(
    alices: Kind, bobs: Kind, autojump_clock: Clock
) -> None:
    """What it knows of the inviter was in the token."""
    async with behind(alices, bobs, seed=1) as pair:
        found: dict[Role, Address] = {}

        async def punch(us: Side, them: Side, role: Role, patience_s: float) -> None:
            meeting = Meeting(KEY, role, them.addresses, us.nats, them.nats, patience_s)
            found[role] = await us.puncher.punch(meeting)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(punch, pair.alice, pair.bob, Role.DIALLER, 250.0)
            await trio.sleep(200)
            began_s = trio.current_time()
            await punch(pair.bob, pair.alice, Role.LISTENER, 0.0)
        assert trio.current_time() - began_s < 5
        assert await carries(pair.alice, found[Role.DIALLER], pair.bob)
        assert await carries(pair.bob, found[Role.LISTENER], pair.alice)


async def test_where_udp_is_blocked_it_ends_in_time_and_says_why(autojump_clock: Clock) -> None:
    async with behind(Kind.HOME, Kind.HOME, blocks_udp=True) as pair:
        ours, theirs = await meet(pair.alice, pair.bob)
        assert ours.why == (
            "no direct path: nothing from the other side arrived within 6 s: "
            "a firewall or a NAT between drops it; one side's network lets no UDP through"
        )
        assert theirs.took_s <= GIVE_UP_S + 1


async def test_several_peers_at_once_with_one_socket(autojump_clock: Clock) -> None:
    async with behind(Kind.HOME, Kind.HOME) as pair, AsyncExitStack() as stack:
        others = []
        for number in range(3, 9):
            router = Router(f"11.0.{number}.1", Kind.PORT_RESTRICTED)
            host = pair.internet.host(f"192.168.{number}.2", behind=pair.internet.network(router))
            others.append(await stack.enter_async_context(a_side(host)))
            await others[-1].look_into_mirrors()
        found: dict[int, bool] = {}

        async def one(number: int, other: Side) -> None:
            ours, _ = await meet(pair.alice, other, bytes([number]) * 32)
            found[number] = ours.address == other.reflexive[0]

        async with trio.open_nursery() as nursery:
            for number, other in enumerate(others):
                nursery.start_soon(one, number, other)
        assert found == dict.fromkeys(range(6), True)


async def test_two_on_one_lan_take_the_short_way(autojump_clock: Clock) -> None:
    """Their router turns nothing around, and both are told of the other's outside first."""
    async with behind(Kind.HOME, Kind.HOME) as pair:
        lan = pair.internet.network(Router("11.0.9.1", Kind.HOME))
        async with (
            a_side(pair.internet.host("192.168.9.2", behind=lan)) as carol,
            a_side(pair.internet.host("192.168.9.3", behind=lan)) as dave,
        ):
            await carol.look_into_mirrors()
            await dave.look_into_mirrors()
            ours, _ = await meet(carol, dave)
            assert ours.address == ("192.168.9.3", 4433)


async def test_over_ipv6_there_is_nothing_to_translate(autojump_clock: Clock) -> None:
    async with an_internet(World()) as internet, AsyncExitStack() as stack:
        sides = []
        for number in (1, 2):
            router = Router(f"11.0.{number}.1", Kind.FIREWALL)
            network = internet.network(router)
            host = internet.host(f"2001:db8:{number}::2", behind=network, stealth=True)
            sides.append(await stack.enter_async_context(a_side(host)))
        ours, theirs = await meet(sides[0], sides[1])
        assert ours.address == ("2001:db8:2::2", 4433)
        assert theirs.address == ("2001:db8:1::2", 4433)


async def test_a_punch_that_is_cancelled_leaves_nothing_behind(autojump_clock: Clock) -> None:
    async with behind(Kind.SYMMETRIC, Kind.HOME) as pair:
        before = set(pair.world._sockets)
        meeting = Meeting(
            KEY, Role.DIALLER, pair.bob.addresses, mine=pair.alice.nats, theirs=pair.bob.nats
        )
        for after_s in (0.0, 0.1, 0.7, 2.0):
            with trio.move_on_after(after_s):
                await pair.alice.puncher.punch(meeting)
            assert set(pair.world._sockets) == before
            assert not pair.alice.puncher._searches


async def test_when_the_system_gives_no_more_sockets_what_there_are_will_do(
    autojump_clock: Clock,
) -> None:
    """With a quarter of them a guess succeeds seven times in eight."""
    found = most_refused = 0
    for seed in range(6):
        async with behind(Kind.SYMMETRIC, Kind.HOME, seed) as pair:
            bind, bound, refused = pair.alice.host.bind, list[FakeSocket](), list[int]()

            def at_most_64(host: str | None, port: int) -> FakeSocket:
                if len(bound) == 64:  # noqa: B023
                    refused.append(port)  # noqa: B023
                    raise ListenFailed("too many open files")
                bound.append(bind(host, port))  # noqa: B023
                return bound[-1]  # noqa: B023

            pair.alice.host.bind = at_most_64  # type: ignore[method-assign]
            ours, _ = await meet(pair.alice, pair.bob)
            found += ours.address == pair.bob.reflexive[0]
            most_refused = max(most_refused, len(refused))
    assert most_refused == 1, "it does not go on asking"
    assert found >= 3


async def test_two_fans_at_once_leave_descriptors_for_links(autojump_clock: Clock) -> None:
    async with behind(Kind.SYMMETRIC, Kind.HOME) as pair:
        pair.world.cut = True
        before, most = len(pair.world._sockets), 0

        async def search(number: int) -> None:
            where = ((f"11.0.66.{number}", 1),)
            key, mine, easy = bytes([number]) * 32, pair.alice.nats, Nats(NatKind.EASY)
            with pytest.raises(PunchFailed):
                await pair.alice.puncher.punch(Meeting(key, Role.DIALLER, where, mine, easy))

        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(search, number)
            for _ in range(50):
                await trio.sleep(0.1)
                most = max(most, len(pair.world._sockets) - before)
        assert 100 < most <= FAN_SOCKETS
        assert len(pair.world._sockets) == before


# --- who lies ------------------------------------------------------------------------------------


def bytes_to(world: World, host: str) -> int:
    return sum(len(datagram) + 28 for target, datagram in world.log if target[0] == host)


async def test_a_third_party_that_is_named_gets_one_kilobyte(autojump_clock: Clock) -> None:
    async with behind(Kind.HOME, Kind.HOME) as pair:
        pair.world.record = True
        victim = tuple(("11.0.66.1", port) for port in range(1, 33))
        with pytest.raises(PunchFailed):
            await pair.alice.puncher.punch(Meeting(KEY, Role.DIALLER, victim))
        assert 0 < bytes_to(pair.world, "11.0.66.1") <= UNASKED_BYTES


@pytest.mark.parametrize("ours", [NatKind.EASY, HARD])
async def test_a_third_party_that_is_guessed_at_is_hit_within_bounds_once_a_minute(
    ours: NatKind, autojump_clock: Clock
) -> None:
    """Whoever lies about its NAT and names another's address."""
    theirs = HARD if ours is NatKind.EASY else NatKind.EASY
    async with behind(Kind.HOME, Kind.HOME) as pair:
        pair.world.record = True
        for number in range(8):
            meeting = Meeting(
                *(bytes([number]) * 32, Role.LISTENER, (("11.0.66.1", 1),)),
                mine=Nats(ours),
                theirs=Nats(theirs),
            )
            with pytest.raises(PunchFailed):
                await pair.alice.puncher.punch(meeting)
        most = SPRAYED_PORTS if theirs is HARD else FAN_SOCKETS
        once = most * 92
        assert once < bytes_to(pair.world, "11.0.66.1") <= once + 8 * UNASKED_BYTES


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "169.254.169.254", "224.0.0.251", "255.255.255.255", "::1", "ff02::fb"]
)
async def test_the_address_policy_holds(host: str, autojump_clock: Clock) -> None:
    async with behind(Kind.HOME, Kind.HOME) as pair:
        pair.world.record = True
        for number, nats in enumerate((Nats(), Nats(HARD))):
            meeting = Meeting(bytes([number]) * 32, Role.DIALLER, ((host, 80),), theirs=nats)
            with pytest.raises(PunchFailed):
                await pair.alice.puncher.punch(meeting)
        assert pair.world.log == []


async def test_searches_are_bounded_and_those_that_found_make_room(autojump_clock: Clock) -> None:
    async with behind(Kind.HOME, Kind.HOME) as pair:
        puncher = pair.alice.puncher

        async def search(number: int) -> None:
            key = number.to_bytes(32, "big")
            await puncher.punch(Meeting(key, Role.DIALLER, (("11.0.66.1", 1),)))

        async with trio.open_nursery() as nursery:
            for number in range(MAX_SEARCHES):
                nursery.start_soon(search, number)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(PunchFailed, match="too many"):
                await search(999)
            nursery.cancel_scope.cancel()
        await meet(pair.alice, pair.bob)
        assert len(puncher._searches) == 1
        await trio.sleep(LINGER_S + 1)
        with pytest.raises(PunchFailed):
            await search(999)
        assert not puncher._searches


async def test_noise_on_the_socket_is_nothing(autojump_clock: Clock) -> None:
    async with behind(Kind.HOME, Kind.HOME) as pair:
        for noise in (b"", b"\x12", b"\x12" + bytes(63), bytes(64)):
            pair.world.inject(noise, ("11.0.66.1", 1), ("192.168.1.2", 4433))
        ours, _ = await meet(pair.alice, pair.bob)
        assert ours.address == pair.bob.reflexive[0]
