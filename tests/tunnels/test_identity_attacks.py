"""Nobody passes for another: each attack is run against real endpoints in a world of memory.

Mallory holds a key of her own, sees every datagram and every certificate, and may run any number
of connections; what she lacks is alice's and bob's keys. `handshake.py` alone is tested in
test_handshake.py.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable

import pytest
import trio
import trio.testing
from aioquic import tls
from aioquic.buffer import Buffer  # type: ignore[attr-defined]
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.packet import QuicProtocolVersion
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    EllipticCurvePrivateKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.hashes import SHA256

from tests.lab import nodes
from tests.lab.nodes import Node, Pair, identity, start_node, two_nodes
from tests.tunnels.conftest import over_quic, through_a_relay_too
from tunnels import DialFailed, Identity, PeerId, SessionUp
from tunnels.frames import (
    VERSION,
    Hello,
    Ping,
    Proof,
    Record,
    RecordDecoder,
    encode,
)
from tunnels.handshake import Handshake, Role
from tunnels.link import Channel, Link
from tunnels.quic_transport import QuicTransport

pytestmark = pytest.mark.usefixtures("link_kind")
MALLORY = identity("mallory")


def transport_of(node: Node) -> QuicTransport:
    transport = node.endpoint._linking.transports["quic"]
    assert isinstance(transport, QuicTransport)
    return transport


async def raw_link(pair: Pair) -> Link:
    """A link from alice's machine to bob on which nothing was said yet."""
    bob = pair.bob.endpoint
    [place] = bob.candidates()
    return await pair.alice.endpoint._linking.transports[place.transport].dial(place, bob.peer)


class Conversation:
    """The control channel of a raw link, record by record."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._decoder = RecordDecoder()

    @classmethod
    async def over(cls, link: Link) -> Conversation:
        return cls(await link.open_channel())

    def say(self, *records: Record) -> None:
        self._channel.send(b"".join(map(encode, records)))

    async def hear(self) -> list[Record]:
        return self._decoder.feed_untrusted(await self._channel.receive())


def dialler(
    who: Identity,
    link: Link,
    expect: PeerId,
    *,
    label: str | None = None,
    version: int = VERSION,
    kind: str | None = None,
    claims: PeerId | None = None,
    role: Role = Role.DIALLER,
    binding: bytes | None = None,
) -> Handshake:
    """An honest dialler, but for what is said otherwise."""
    hello = Hello(version, 1 << 17, bytes(16), b"n" * 32, claims or who.peer, kind or link.kind)
    handshake = Handshake(
        Role.DIALLER,
        hello,
        expect=expect,
        binding=link.binding if binding is None else binding,
        sign=lambda given, payload: who.sign(label or given, payload),
        verify=lambda *_: True,
    )
    if role is Role.LISTENER:
        transcript = handshake._transcript
        handshake._transcript = lambda signer: transcript(role)  # type: ignore[method-assign]
    return handshake


async def run(handshake: Handshake, talk: Conversation) -> list[Record]:
    """Play the dialler's part until its proof is sent; returns what it said."""
    said = handshake.start()
    talk.say(*said)
    heard = await talk.hear()
    while len(heard) < 2:
        heard += await talk.hear()
    for record in heard:
        answer = handshake.receive(record)
        talk.say(*answer)
        said += answer
    return said


async def refused(pair: Pair, link: Link, reason: str) -> None:
    with trio.fail_after(2):
        await link.closed.wait()
    assert link.closure is not None
    assert link.closure.by_peer
    assert reason in link.closure.reason
    assert pair.guests() == []


@through_a_relay_too
async def test_the_tools_of_these_tests_open_a_session_when_nothing_is_forged(
    clock: object,
) -> None:
    async with two_nodes() as pair:
        up = pair.bob.endpoint.subscribe()
        link = await raw_link(pair)
        await run(dialler(MALLORY, link, pair.bob.endpoint.peer), await Conversation.over(link))
        event = await up.receive()
        assert isinstance(event, SessionUp)
        assert event.peer == MALLORY.peer


FORGERIES: dict[str, tuple[dict[str, object], str]] = {
    "another's key is claimed": ({"claims": identity("alice").peer}, "could not prove"),
    "the label of an older version": ({"label": "mesh/0 link proof"}, "could not prove"),
    "the label of a grant": ({"label": "mesh grant v1"}, "could not prove"),
    "another certificate's binding": ({"binding": bytes(32)}, "could not prove"),
    "no binding": ({"binding": b""}, "could not prove"),
    "the listener's role": ({"role": Role.LISTENER}, "could not prove"),
    "a lower version": ({"version": VERSION - 1}, "update the older"),
    "a higher version": ({"version": VERSION + 1}, "update the older"),
    "another kind of link": ({"kind": "pigeon"}, "another kind of link"),
}


@through_a_relay_too
@pytest.mark.parametrize("forgery", FORGERIES)
async def test_a_dialler_that_forges_is_refused(forgery: str, clock: object) -> None:
    options, reason = FORGERIES[forgery]
    async with two_nodes() as pair:
        link = await raw_link(pair)
        bob = pair.bob.endpoint.peer
        handshake = dialler(MALLORY, link, bob, **options)  # type: ignore[arg-type]
        talk = await Conversation.over(link)
        if reason == "could not prove":
            await run(handshake, talk)
        else:
            talk.say(*handshake.start())
        await refused(pair, link, reason)


@through_a_relay_too
async def test_a_handshake_replayed_on_another_link_is_refused(clock: object) -> None:
    """Word for word what alice said when she was let in, nonce and all."""
    async with two_nodes() as pair:
        alice, bob = pair.alice.endpoint.identity, pair.bob.endpoint
        up = bob.subscribe()
        link = await raw_link(pair)
        said = await run(dialler(alice, link, bob.peer), await Conversation.over(link))
        session = (await up.receive()).session
        session.end("enough")
        replay = await raw_link(pair)
        talk = await Conversation.over(replay)
        talk.say(said[0])
        await talk.hear()
        talk.say(*said[1:])
        await refused(pair, replay, "could not prove")


@through_a_relay_too
async def test_our_own_words_thrown_back_at_us_are_refused(clock: object) -> None:
    async with two_nodes() as pair:
        link = await raw_link(pair)
        talk = await Conversation.over(link)
        talk.say(dialler(MALLORY, link, pair.bob.endpoint.peer).start()[0])
        bobs_hello, bobs_proof = await talk.hear()
        assert isinstance(bobs_proof, Proof)
        talk.say(bobs_proof)
        await refused(pair, link, "could not prove")
        again = await raw_link(pair)
        (await Conversation.over(again)).say(bobs_hello)
        await refused(pair, again, "this very node")


async def test_a_peer_cannot_pass_its_dialler_on_to_a_third(clock: object) -> None:
    """Alice dials mallory on purpose; mallory hands alice's words to bob and his to her."""
    async with two_nodes() as pair:
        alice, bob = pair.alice.endpoint.identity, pair.bob.endpoint
        link = await raw_link(pair)  # mallory's, to bob
        # What alice signs names the certificate that she saw, which is mallory's.
        duped = dialler(alice, link, MALLORY.peer, binding=MALLORY.certificate_hash)
        talk = await Conversation.over(link)
        talk.say(*duped.start())
        hello, proof = await talk.hear()
        duped._expect = bob.peer
        duped.receive(hello)
        talk.say(*duped.receive(proof))
        await refused(pair, link, "could not prove")


async def test_a_man_in_the_middle_shows_a_key_that_is_not_the_pinned_one(clock: object) -> None:
    async with two_nodes() as pair:
        middle = await start_node(
            pair.nursery, pair.world.host("11.0.0.66"), "mallory", transports=nodes.KINDS
        )
        with pytest.raises(DialFailed, match="wrong key"):
            await pair.alice.endpoint.connect(pair.bob.endpoint.peer, middle.endpoint.candidates())
        await trio.sleep(6)
        assert middle.endpoint.sessions() == []


class Impostor(Identity):
    """Mallory with another's certificate: its key is public, its private half is not hers."""

    def __init__(self, victim: Identity, key: Identity) -> None:
        super().__init__(key.tls_key)
        self._certificate = victim.certificate
        self.peer = victim.peer


@over_quic
async def test_the_certificate_of_another_without_its_key_is_refused(clock: object) -> None:
    async with two_nodes() as pair:
        bob = pair.bob.endpoint
        fake = await start_node(pair.nursery, pair.world.host("11.0.0.66"), "mallory")
        transport_of(fake)._identity = Impostor(bob.identity, MALLORY)
        with pytest.raises(DialFailed, match="the connection was closed"):
            await pair.alice.endpoint.connect(bob.peer, fake.endpoint.candidates())
        assert pair.alice.endpoint.sessions() == []


@pytest.fixture
def empty_certificates(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, whoever shows a certificate shows an empty list of them."""
    push = tls.push_certificate

    def push_none(buf: Buffer, certificate: tls.Certificate) -> None:
        certificate.certificates = []
        push(buf, certificate)

    return lambda: monkeypatch.setattr(tls, "push_certificate", push_none)


@over_quic
async def test_no_certificate_at_all_is_refused(
    empty_certificates: Callable[[], None], clock: object
) -> None:
    async with two_nodes() as pair:
        empty_certificates()
        began_s = trio.current_time()
        with pytest.raises(DialFailed, match="Certificate message is empty"):
            await pair.connect()
        assert trio.current_time() - began_s < 8
        assert pair.alice.endpoint.sessions() == pair.bob.endpoint.sessions() == []


def certificate_of(key: EllipticCurvePrivateKey) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "mesh")])
    return (
        x509.CertificateBuilder(name, name, key.public_key(), 1)
        .not_valid_before(datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC))
        .not_valid_after(datetime.datetime(9999, 12, 31, tzinfo=datetime.UTC))
        .sign(key, SHA256())
    )


@over_quic
async def test_a_certificate_with_another_kind_of_key_is_refused(clock: object) -> None:
    async with two_nodes() as pair:
        key = generate_private_key(SECP256R1())
        server = await start_node(pair.nursery, pair.world.host("11.0.0.66"), "mallory")

        class OtherKind:
            peer = MALLORY.peer
            tls_key = key
            certificate = certificate_of(key)
            certificate_hash = bytes(32)

        transport_of(server)._identity = OtherKind()  # type: ignore[assignment]
        with pytest.raises(DialFailed, match="another kind of key"):
            await pair.alice.endpoint.connect(pair.bob.endpoint.peer, server.endpoint.candidates())


async def test_an_address_that_leads_back_to_us_is_not_the_peer(clock: object) -> None:
    async with two_nodes() as pair:
        alice = pair.alice.endpoint
        with pytest.raises(DialFailed, match="wrong key"):
            await alice.connect(pair.bob.endpoint.peer, alice.candidates())
        assert alice.sessions() == []


@over_quic
@pytest.mark.parametrize("offered", [["h3"], ["mesh/0"], ["mesh/2", "h2"], None])
async def test_another_protocol_on_the_same_port_is_turned_away(
    offered: list[str] | None, clock: object
) -> None:
    """ALPN changed, or stripped by somebody on the way (who cannot, under TLS: by the peer)."""
    async with two_nodes() as pair:
        transport = transport_of(pair.alice)
        ours = transport._configuration

        def theirs(*, is_client: bool, remote: str) -> QuicConfiguration:
            configuration = ours(is_client=is_client, remote=remote)
            configuration.alpn_protocols = offered
            return configuration

        transport._configuration = theirs  # type: ignore[method-assign]
        with pytest.raises(DialFailed, match="No common ALPN"):
            await pair.connect()
        await trio.sleep(6)
        assert pair.guests() == []


@over_quic
@pytest.mark.parametrize(
    "version", [QuicProtocolVersion.VERSION_2, QuicProtocolVersion.NEGOTIATION, 0xFF00001D]
)
async def test_another_version_of_quic_is_not_answered(version: int, clock: object) -> None:
    async with two_nodes() as pair:
        quic = QuicConnection(
            configuration=QuicConfiguration(is_client=True, alpn_protocols=["mesh/1"])
        )
        quic.connect(("peer", 0), now=0.0)
        first = bytearray(quic.datagrams_to_send(now=0.0)[0][0])
        first[1:5] = int(version).to_bytes(4, "big")
        place = pair.bob.endpoint.candidates()[0]
        pair.world.record = True
        pair.world.inject(bytes(first), ("11.6.6.6", 6), (place.host, place.port))
        await trio.sleep(2)
        assert not pair.world.log
        assert transport_of(pair.bob)._door.half_open == 0


@over_quic
async def test_a_forged_version_negotiation_does_not_bring_a_dialler_down(clock: object) -> None:
    """Anyone on the way may send one; there is one version, so it is of no use to us."""
    async with two_nodes() as pair:
        pair.world.record = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pair.connect)
            await trio.testing.wait_all_tasks_blocked()
            target, first = pair.world.log[0]
            sizes = first[5], first[6 + first[5]]
            theirs, mine = first[6 : 6 + sizes[0]], first[7 + sizes[0] : 7 + sum(sizes)]
            forged = b"\x80\0\0\0\0" + bytes([len(mine)]) + mine + bytes([len(theirs)]) + theirs
            alice = transport_of(pair.alice)._socket.local
            pair.world.inject(forged + b"\xff\0\0\x1d", target, alice)
        assert len(pair.bob.endpoint.sessions()) == 1


@over_quic
async def test_there_are_no_tickets_and_nothing_early_is_heard(clock: object) -> None:
    """No resumption, hence no 0-RTT: neither is offered, nor taken from who claims to have one."""
    tickets: list[tls.SessionTicket] = []
    async with two_nodes() as pair:
        alice, bob = transport_of(pair.alice), pair.bob.endpoint
        link = await alice.dial(bob.candidates()[0], bob.peer)
        link.quic.tls.new_session_ticket_cb = tickets.append
        link.quic._session_ticket_handler = tickets.append
        await trio.sleep(2)
        assert tickets == []
        server = next(iter(transport_of(pair.bob)._links.values()))
        assert server.quic.tls.new_session_ticket_cb is None
        assert server.quic.tls.get_session_ticket_cb is None
        assert tls.Epoch.ZERO_RTT not in server.quic._cryptos or not (
            server.quic._cryptos[tls.Epoch.ZERO_RTT].recv.is_valid()
        )


@through_a_relay_too
async def test_the_link_is_what_is_proven_and_not_only_the_key(clock: object) -> None:
    """Two diallers at the same listener: the proof of one link does not open the other."""
    async with two_nodes() as pair:
        bob = pair.bob.endpoint.peer
        one, two = await raw_link(pair), await raw_link(pair)
        talk_one, talk_two = await Conversation.over(one), await Conversation.over(two)
        first = dialler(identity("alice"), one, bob)
        talk_one.say(*first.start())
        talk_two.say(*first.start())  # the same hello, the same nonce
        for record in await talk_one.hear():
            proof = first.receive(record)
        await talk_two.hear()
        talk_two.say(*proof)  # bob's nonce differs
        await refused(pair, two, "could not prove")


@through_a_relay_too
async def test_a_record_before_the_proof_ends_the_link(clock: object) -> None:
    async with two_nodes() as pair:
        for record in (Ping(1), Proof(bytes(64))):
            link = await raw_link(pair)
            (await Conversation.over(link)).say(record)
            await refused(pair, link, "awaiting HELLO")
