"""Reply codes, as careless users and strangers give them to a node."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from discovery.invites import secret_hash
from discovery.reply import NONCE_BYTES, Reply, encode
from discovery.token import Secret, Token
from discovery.token import encode as token_text
from meshnode.errors import AccessError, MeshError, NetworkError
from meshnode.events import Kind
from tests.lab.parties import Party, parties
from tunnels.dial import GIVE_UP_S
from tunnels.peer import Candidate

Clock = trio.testing.MockClock
NOBODY = Candidate("quic", "11.0.66.1", 9)


def code_of(token: Token, secret: Secret | None = None) -> str:
    reply = Reply(token.id, bytes(NONCE_BYTES), ((NOBODY.host, NOBODY.port),))
    return encode(reply, secret_hash(secret or token.secret))


async def refusal(of: Party, code: str) -> MeshError:
    with pytest.raises(MeshError) as refused:
        await of.connections.replies.accept(code)
    return refused.value


async def test_what_is_no_code_for_this_node_is_told_in_a_sentence(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "bob", "carol") as (bob, carol):
        token, others = bob.invite(), carol.invite()
        withdrawn = bob.invite()
        bob.ledger.invites.withdraw(withdrawn.id)
        for code, why in (
            ("", "no reply code"),
            (token_text(token), "an invite token"),
            (code_of(token)[:-3], "length|not whole|copy it again"),
            (code_of(others), "did not make that invite"),
            (code_of(token, Secret(bytes(16))), "not made with this invite's token"),
            (code_of(withdrawn), "the invite is over"),
        ):
            error = await refusal(bob, code)
            assert isinstance(error, AccessError)
            assert error.exit_code == 5
            assert any(part in str(error) for part in why.split("|")), (why, str(error))


async def test_where_nobody_waits_any_more_it_says_what_may_be_wrong(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "bob") as (bob,):
        began_s = trio.current_time()
        error = await refusal(bob, code_of(bob.invite()))
        assert isinstance(error, NetworkError)
        assert "Is it still waiting?" in str(error)
        assert trio.current_time() - began_s < 10, "node.sock waits no longer"


async def test_who_is_not_asked_to_wait_is_told_at_once_that_nobody_answers(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    """In scripts nobody could carry a code."""
    async with parties(tmp_path, "bob", "ann") as (bob, ann):
        token = _elsewhere(bob.invite())
        with pytest.raises(NetworkError, match="joining failed"):
            await ann.connections.join(token)
        assert [event for event in ann.events if event.kind is Kind.REPLY] == []


async def test_a_joiner_shows_its_code_and_joins_once_it_was_carried(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "bob", "ann") as (bob, ann):
        ann.connections.replies.wait_s = 120.0
        # It knows bob by an address that leads nowhere, and by one that only punching opens.
        token = bob.invite()
        (place,) = (one for one in token.candidates if one.transport == "quic")
        hidden = _elsewhere(token, Candidate("quic", place.host, place.port, "hard"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ann.connections.join, hidden)
            await trio.sleep(GIVE_UP_S + 0.1)
            (shown,) = (event for event in ann.events if event.kind is Kind.REPLY)
            code = str(shown.data["line"]).removeprefix("mesh accept ")
            assert "11.0." in await bob.connections.replies.accept(code)
        assert ann.knows(bob)


def _elsewhere(token: Token, *more: Candidate) -> Token:
    return replace(token, candidates=(NOBODY, *more))
