"""How often the secret of an invite may be guessed at: by one key, and by one address with many."""

from __future__ import annotations

import secrets
from pathlib import Path

import trio
import trio.testing

from meshnode.messages import MessageStream
from tests.lab.parties import PORT, Party, party, world_of_parties
from tunnels import Endpoint, Identity, Session, TunnelError
from tunnels.door import PER_NETWORK
from tunnels.gate import TALK

Clock = trio.testing.MockClock
AT_ONCE = 4


async def guess(session: Session, invite_id: bytes) -> bool:
    """Whether the guess was heard at all; a wrong one is told so."""
    try:
        async with await session.open("join") as stream:
            messages = MessageStream(stream)
            await messages.send({"id": invite_id, "secret": secrets.token_bytes(16)})
            answer = await messages.receive_untrusted()
    except TunnelError:
        return False
    assert "secret is wrong" in str(answer["refused"])
    return True


async def guess_for(session: Session, invite_id: bytes, seconds: float) -> int:
    """As fast as the inviter listens."""
    heard, end_s = 0, trio.current_time() + seconds
    while trio.current_time() < end_s:
        if await guess(session, invite_id):
            heard += 1
        else:
            await trio.sleep(0.2)
    return heard


async def test_one_key_guesses_once_in_two_seconds(tmp_path: Path, autojump_clock: Clock) -> None:
    async with (
        world_of_parties() as world,
        party(tmp_path, world.host("11.0.0.1"), "bob") as bob,
        party(tmp_path, world.host("11.0.0.2"), "eve") as eve,
    ):
        token = bob.invite()
        heard = await guess_for(await eve.dial(bob), token.id, 30)
        rate = TALK.peer_rate
        assert heard <= rate.burst + 30 * rate.per_s + 1
        assert heard >= rate.burst
        eve.session(bob).end("done")
        await eve.connections.join(token)
        assert bob.knows(eve), "whoever has the token still gets in"


async def test_one_address_with_ever_new_keys_guesses_sixteen_times_a_second_at_most(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    seconds, heard = 6.0, 0
    async with world_of_parties() as world, trio.open_nursery() as nursery:
        async with party(tmp_path, world.host("11.0.0.1"), "bob") as bob:
            invite_id, host = bob.invite().id, world.host("11.0.0.2")
            end_s = trio.current_time() + seconds

            async def guesser(port: int) -> None:
                nonlocal heard
                while trio.current_time() < end_s:
                    heard += await guesses_of_a_key(bob, host, port, invite_id)
                    port += AT_ONCE

            async with trio.open_nursery() as guessers:
                for number in range(AT_ONCE):
                    guessers.start_soon(guesser, PORT + 1 + number)
        nursery.cancel_scope.cancel()
    assert heard <= TALK.rate.burst + TALK.rate.per_s * (seconds + 1)
    assert heard > 2 * TALK.peer_rate.burst, "a new key is heard anew"


async def guesses_of_a_key(bob: Party, host: object, port: int, invite_id: bytes) -> int:
    endpoint = Endpoint(Identity.generate(), authorize=lambda *_: False, network=host)  # type: ignore[arg-type]
    heard = 0
    async with trio.open_nursery() as nursery:
        await nursery.start(endpoint.run, None, port)
        try:
            session = await endpoint.connect(bob.peer, bob.endpoint.candidates())
            for _ in range(int(TALK.peer_rate.burst)):
                heard += await guess(session, invite_id)
        except TunnelError:
            await trio.sleep(1 / PER_NETWORK.per_s)
        nursery.cancel_scope.cancel()
    return heard


def test_the_limits_are_what_the_page_on_floods_says() -> None:
    assert (TALK.peer_rate.per_s, TALK.peer_rate.burst) == (0.5, 8)
    assert (TALK.rate.per_s, TALK.rate.burst) == (16, 64)
