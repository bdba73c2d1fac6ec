"""Attackers of what nodes say to each other: by a stranger with half a token, and by members.

As in `attackers`: real programs behind a home's uplink, each a coroutine that never returns.
"""

from __future__ import annotations

import functools
import itertools
import secrets
import tempfile
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cbor2
import trio

from discovery.grants import Grant, Role, encode_grant, issue
from discovery.revocations import REMEMBERED_S, Revocation, encode_revocation, revoke_peer
from discovery.roster import Member as Word
from discovery.token import SECRET_BYTES, parse_untrusted
from meshnode.cbor import MAX_VALUES
from meshnode.errors import MeshError
from meshnode.introduction import (
    MAX_CANDIDATES,
    MAX_RECORDS,
    member_message,
    record_pages,
)
from meshnode.messages import MessageStream
from tests.bench.attackers import (
    PATIENCE_S,
    Attack,
    PolicedNetwork,
    Target,
    Uplink,
    often,
    start_endpoint,
    with_session,
)
from tests.bench.flooded import ENGINE_KEY, LENT_BYTES, Member, member
from tunnels import Candidate, Identity, Session, TunnelError

STATEMENTS = 200  # on a page of revocations: 48 KiB
TENSORS = 25_000  # in a manifest, of nine values each
BURST_S = 4.0  # what a peer may cost at once is over then

Message = dict[str, Any]


async def tell(session: Session, service: str, messages: Iterable[Message]) -> None:
    """Says these on a stream of its own, and hears the other side out."""
    async with await session.open(service) as stream:
        talk = MessageStream(stream)
        for message in messages:
            await talk.send(message)
        await stream.send_eof()
        while await stream.receive_some():
            pass


async def guessed_tokens(target: Target) -> None:
    """The id of a token that is out, and one secret after the other: over a session that stands,
    and by keys made for each guess."""
    token = parse_untrusted(target.token)
    uplink = Uplink()

    async def guess(session: Session) -> None:
        await tell(session, "join", [{"id": token.id, "secret": secrets.token_bytes(SECRET_BYTES)}])

    async def by_a_new_key() -> None:
        async with trio.open_nursery() as nursery:
            endpoint = await start_endpoint(nursery, uplink)
            await guess(await endpoint.connect(target.peer, target.candidates))
            nursery.cancel_scope.cancel()

    async def standing(session: Session) -> None:
        while not session.closed.is_set():
            await often(lambda: guess(session), tasks=4)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(with_session, target, standing)
        nursery.start_soon(often, by_a_new_key, 16)


# --- by members -----------------------------------------------------------------------------


@functools.cache
def _folder() -> Path:
    """So that who is stopped and started again is the same member."""
    return Path(tempfile.mkdtemp(prefix="flood-"))


async def _as_member(target: Target, attack: Callable[[Member], Awaitable[None]]) -> None:
    network = PolicedNetwork(Uplink())
    while True:
        try:
            async with (
                member(_folder(), target, network) as attacker,
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(attack, attacker)
                await attacker.session.closed.wait()
                nursery.cancel_scope.cancel()
        except* (MeshError, TunnelError):
            await trio.sleep(PATIENCE_S / 4)  # it may have asked for its own hello too often


def _grant(attacker: Member, target: Target) -> Grant:
    grant = attacker.ledger.grant(parse_untrusted(target.token).mesh)
    assert grant is not None
    return grant


def _longer(attacker: Member, grant: Grant, to: Identity, later_s: int) -> Grant:
    """One that hangs on its own, the longest chain there is."""
    return issue(
        grant,
        attacker.ledger.identity.sign,
        peer=to.peer,
        role=Role.CLIENT,
        issued_at=grant.issued_at + later_s,
        may_invite=False,
    )


def _word(identity: Identity, seq: int) -> Word:
    places = [Candidate("quic", f"11.{seq % 250}.0.{n + 1}", 4433) for n in range(MAX_CANDIDATES)]
    return Word(identity.peer, "m" * 64, tuple(places), seq=seq).signed(identity.sign)


def _restated(attacker: Member, grant: Grant) -> Iterator[Revocation]:
    """What it says of one that nobody knows, each time a moment later: true, and news."""
    me, nobody = attacker.ledger.identity, Identity.generate().peer
    for at in itertools.count(grant.issued_at):
        yield revoke_peer(me.sign, mesh=grant.mesh, peer=nobody, issuer=me.peer, at=at, grant=grant)


def _pages(said: Iterator[Revocation], size: int) -> Iterator[Message]:
    while True:
        page = [encode_revocation(one) for one in itertools.islice(said, size)]
        yield {"revocations": page, "more": True}


async def hellos(target: Target) -> None:
    """Each with the longest grant and as many addresses as are taken, news every time, and then
    with revocations until the node has enough."""

    async def attack(attacker: Member) -> None:
        me, grant = attacker.ledger.identity, _grant(attacker, target)
        numbers = itertools.count(1 << 50)
        shown = [encode_grant(_longer(attacker, grant, me, 0))]
        pages = _pages(_restated(attacker, grant), STATEMENTS)

        async def hello() -> None:
            message = member_message(_word(me, next(numbers))) | {"grants": shown}
            await tell(attacker.session, "hello", itertools.chain([message], pages))

        await often(hello, tasks=4)

    await _as_member(target, attack)


async def revocations(target: Target) -> None:
    """True ones, restated, one on a page and a page full; forged ones; members made up."""

    async def attack(attacker: Member) -> None:
        grant = _grant(attacker, target)
        said = _restated(attacker, grant)
        [one] = itertools.islice(said, 1)
        forged = [
            replace(one, at=at, until=at + REMEMBERED_S)
            for at in range(one.at + 1000, one.at + 1000 + STATEMENTS)
        ]
        forgeries = {"revocations": [encode_revocation(false) for false in forged], "more": True}
        async with trio.open_nursery() as nursery:
            for service, pages in (
                ("revocations", _pages(said, 1)),
                ("revocations", _pages(said, STATEMENTS)),
                ("revocations", itertools.repeat(forgeries)),
                ("roster", _made_up(attacker, grant)),
            ):
                telling = functools.partial(tell, attacker.session, service, pages)
                nursery.start_soon(often, telling, 4)

    await _as_member(target, attack)


def _made_up(attacker: Member, grant: Grant) -> Iterator[Message]:
    """Pages of members that it has let in, at other addresses each time: news that is passed on,
    and dialled. Every second page is of members that it has not let in."""
    ghosts = [Identity.generate() for _ in range(MAX_RECORDS)]
    grants = [_longer(attacker, grant, ghost, 0) for ghost in ghosts]
    strangers = [Identity.generate() for _ in range(MAX_RECORDS)]
    for number in itertools.count(1):
        words = [_word(one, number) for one in (strangers if number % 2 else ghosts)]
        yield record_pages(list(zip(words, grants, strict=True)))[0]


async def control(target: Target) -> None:
    """Facts, leases that are refused, manifests that end in nonsense, messages of many values."""

    async def attack(attacker: Member) -> None:
        row = ["blk.0.attn.weight", 0, 64, 64, 1, 1, 16384, bytes(32)]
        wanted = cbor2.dumps([1, bytes(32), [row] * TENSORS + [row[:1]]])
        lease = {"op": "lease", "engine_key": ENGINE_KEY, "model": "m", "wanted": wanted}
        asked: list[Message] = [
            {"op": "facts"},
            lease | {"engine_key": "another", "memory_bytes": 1},
            lease | {"memory_bytes": 2 * LENT_BYTES},
            lease | {"memory_bytes": 1},
            {"op": [100] * (MAX_VALUES - 10)},
        ]
        turns = itertools.cycle(asked)
        await often(lambda: tell(attacker.session, "control", [next(turns)]), tasks=4)

    await _as_member(target, attack)


ATTACKS = {
    "tokens": Attack("guessed secrets of a token, by an old key and new ones", guessed_tokens),
    "hellos": Attack(
        "by a member: introductions as large as they may be", hellos, settle_s=BURST_S
    ),
    "revocations": Attack(
        "by a member: revocations and members, restated, forged, made up",
        revocations,
        settle_s=BURST_S,
    ),
    "control": Attack("by a member: facts and leases that are refused", control, settle_s=BURST_S),
}
