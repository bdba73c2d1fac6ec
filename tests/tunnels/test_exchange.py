"""Offers swapped over a session, with peers that mean it and peers that do not."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from tests.lab.nodes import Pair, two_nodes
from tunnels import BadFrame, StreamRefused, StreamReset, TunnelError
from tunnels.exchange import LIMITS, SERVICE, Exchange, Ourselves, Swap
from tunnels.handshake import Role
from tunnels.meeting import Nats
from tunnels.offers import LENGTH, MAX_OFFER_BYTES, Offer, Want, encode
from tunnels.peer import Candidate, NatKind

PLACES = (Candidate("tcp", "11.0.0.2", 9), Candidate("quic", "192.0.2.9", 7, "reflexive"))


class _Sides:
    """An exchange of alice's and one of bob's, who notes what he is to follow."""

    def __init__(self, pair: Pair) -> None:
        self.followed: list[Swap] = []
        self._news = trio.Event()
        self.alice = Exchange(lambda: Ourselves([]), self._never)
        self.bob = Exchange(
            lambda: Ourselves(PLACES, Nats(NatKind.EASY, NatKind.BLOCKED)),
            self._follow,
        )
        pair.bob.endpoint.serve(SERVICE, self.bob.serve, LIMITS)

    async def _follow(self, swap: Swap) -> None:
        self.followed.append(swap)
        self._news.set()

    async def _never(self, swap: Swap) -> None:
        raise AssertionError(swap)

    async def bobs(self) -> Swap:
        await self._news.wait()
        return self.followed[-1]


async def test_both_sides_know_the_others_offer_and_the_same_key(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        sides = _Sides(pair)
        swap = await sides.alice.ask(await pair.connect(), Want.PUNCH)
        bobs = await sides.bobs()
        assert (swap.mine, swap.theirs) == (bobs.theirs, bobs.mine)
        assert swap.key == bobs.key
        assert (swap.role, bobs.role) == (Role.DIALLER, Role.LISTENER)
        assert swap.theirs.candidates == PLACES
        assert (swap.theirs.nat_v4, swap.theirs.nat_v6) == (NatKind.EASY, NatKind.BLOCKED)
        assert bobs.theirs.want is Want.PUNCH
        assert swap.key.hex() not in repr(swap)


async def test_each_swap_has_a_key_of_its_own(autojump_clock: trio.testing.MockClock) -> None:
    async with two_nodes() as pair:
        sides = _Sides(pair)
        session = await pair.connect()
        keys = {(await sides.alice.ask(session, Want.NOTHING)).key for _ in range(3)}
        assert len(keys) == 3


async def test_who_asks_too_often_is_refused(autojump_clock: trio.testing.MockClock) -> None:
    async with two_nodes() as pair:
        sides = _Sides(pair)
        session = await pair.connect()
        for _ in range(int(LIMITS.peer_rate.burst)):
            await sides.alice.ask(session, Want.NOTHING)
        with pytest.raises(StreamRefused, match="too often"):
            await sides.alice.ask(session, Want.NOTHING)


GOOD = encode(Offer(bytes(16), bytes([9]) + bytes(31)))
HOSTILE = [
    b"",
    b"\x00",
    GOOD[:-1],
    LENGTH.pack(MAX_OFFER_BYTES + 1) + bytes(99),
    encode(Offer(bytes(16), bytes(32))),  # a key of small order: the secret would be known to all
]


@pytest.mark.parametrize("data", HOSTILE)
async def test_an_offer_that_makes_no_sense_leads_to_nothing(
    autojump_clock: trio.testing.MockClock, data: bytes
) -> None:
    async with two_nodes() as pair:
        sides = _Sides(pair)
        session = await pair.connect()
        async with await session.open(SERVICE) as stream:
            await stream.send_all(data)
            await stream.send_eof()
            with pytest.raises(StreamReset):
                await stream.receive_some()
        assert not sides.followed
        await sides.alice.ask(session, Want.NOTHING)  # the session stands


@pytest.mark.parametrize("data", HOSTILE)
async def test_an_answer_that_makes_no_sense_is_an_error(
    autojump_clock: trio.testing.MockClock, data: bytes
) -> None:
    async with two_nodes() as pair:
        sides = _Sides(pair)

        async def answer(stream: trio.abc.HalfCloseableStream) -> None:
            await stream.send_all(data)
            await stream.send_eof()

        pair.bob.endpoint.serve(SERVICE, answer, LIMITS)
        with pytest.raises(BadFrame):
            await sides.alice.ask(await pair.connect(), Want.NOTHING)


async def test_a_peer_that_says_nothing_is_not_waited_for_for_ever(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        sides = _Sides(pair)
        session = await pair.connect()
        async with await session.open(SERVICE) as silent:
            with pytest.raises(StreamReset, match="no offer"):
                await silent.receive_some()

        async def say_nothing(_stream: object) -> None:
            await trio.sleep_forever()

        pair.bob.endpoint.serve(SERVICE, say_nothing, LIMITS)
        with pytest.raises(TunnelError, match="no offer"):
            await sides.alice.ask(session, Want.NOTHING)
