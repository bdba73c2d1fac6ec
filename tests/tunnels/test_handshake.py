"""Both sides prove their keys; nothing borrowed from elsewhere will do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.lab.nodes import identity
from tunnels.errors import HandshakeFailed, WrongPeer
from tunnels.frames import VERSION, Hello, Ping, Proof, Ready, Record
from tunnels.handshake import LABEL, Handshake, Role
from tunnels.identity import Identity, verify
from tunnels.peer import PeerId

ALICE, BOB, MALLORY = identity("alice"), identity("bob"), identity("mallory")
BINDING = b"the listener's certificate"


def side(
    role: Role,
    who: Identity,
    *,
    expect: PeerId | None = None,
    nonce: bytes = b"1",
    kind: str = "quic",
    binding: bytes = BINDING,
    version: int = VERSION,
    label: str | None = None,
    signer: Identity | None = None,
) -> Handshake:
    hello = Hello(version, 1 << 20, who.peer.key[:16], nonce * 32, who.peer, kind)
    holder = signer or who
    return Handshake(
        role,
        hello,
        expect=expect,
        binding=binding,
        sign=lambda given, payload: holder.sign(label or given, payload),
        verify=verify,
    )


def dialler(who: Identity = ALICE, **options: object) -> Handshake:
    return side(Role.DIALLER, who, **{"expect": BOB.peer, "nonce": b"d", **options})  # type: ignore[arg-type]


def listener(who: Identity = BOB, **options: object) -> Handshake:
    return side(Role.LISTENER, who, **{"nonce": b"l", **options})  # type: ignore[arg-type]


def play(one: Handshake, two: Handshake) -> list[Record]:
    """Carry records both ways until nobody speaks; returns all of them."""
    spoken: list[Record] = []
    to_two, to_one = one.start(), two.start()
    while to_two or to_one:
        spoken += to_two + to_one
        heard_by_two, heard_by_one, to_two, to_one = to_two, to_one, [], []
        for record in heard_by_two:
            to_one += two.receive(record)
        for record in heard_by_one:
            to_two += one.receive(record)
    return spoken


def test_both_learn_who_the_other_is() -> None:
    one, two = dialler(), listener()
    spoken = play(one, two)
    assert [type(record) for record in spoken] == [Hello, Hello, Proof, Proof, Ready]
    assert one.proven is not None
    assert two.proven is not None
    assert (one.proven.peer, two.proven.peer) == (BOB.peer, ALICE.peer)
    assert one.proven.epoch == BOB.peer.key[:16]
    assert one.proven.window_bytes == 1 << 20


def test_the_dialler_takes_only_whom_it_seeks() -> None:
    with pytest.raises(WrongPeer):
        play(dialler(), listener(MALLORY))


@pytest.mark.parametrize(
    "two",
    [
        pytest.param(listener(label="mesh/1 grant"), id="a signature made for another use"),
        pytest.param(listener(binding=b"another certificate"), id="a proof of another link"),
        pytest.param(listener(signer=MALLORY), id="a signature by another key"),
    ],
)
def test_a_listener_that_proves_something_else_is_refused(two: Handshake) -> None:
    with pytest.raises(HandshakeFailed, match="could not prove"):
        play(dialler(), two)


def test_a_dialler_without_the_key_it_claims_is_refused() -> None:
    two = listener()
    with pytest.raises(HandshakeFailed, match="could not prove"):
        play(dialler(signer=MALLORY), two)
    assert two.proven is None


def test_a_proof_recorded_in_another_run_is_refused() -> None:
    recorded = play(dialler(), listener())
    old_proof = [record for record in recorded if isinstance(record, Proof)][1]
    two = listener(nonce=b"L")  # a fresh nonce, as every run has
    two.receive(dialler().start()[0])
    with pytest.raises(HandshakeFailed, match="could not prove"):
        two.receive(old_proof)


def test_a_proof_thrown_back_at_its_maker_is_refused() -> None:
    """Swapped roles: the listener's own proof does not pass for the dialler's."""
    two = listener()
    reply = two.receive(dialler().start()[0])
    with pytest.raises(HandshakeFailed, match="could not prove"):
        two.receive(reply[1])


def test_the_two_roles_never_sign_the_same_bytes() -> None:
    signed: list[bytes] = []

    def note(_: str, payload: bytes) -> bytes:
        signed.append(payload)
        return bytes(64)

    one, two = dialler(), listener()
    for each in (one, two):
        each._sign = note
        each._verify = lambda *_: True
    play(one, two)
    assert len(signed) == 2
    assert signed[0] != signed[1]


def test_another_version_says_which_to_update() -> None:
    with pytest.raises(HandshakeFailed, match="update the older"):
        play(dialler(version=VERSION + 1), listener())


def test_a_handshake_made_for_another_kind_of_link_is_refused() -> None:
    with pytest.raises(HandshakeFailed, match="another kind of link"):
        play(dialler(kind="relay"), listener())


def test_an_address_that_leads_back_home_is_told() -> None:
    with pytest.raises(HandshakeFailed, match="this very node"):
        play(dialler(ALICE, expect=None), listener(ALICE))


@pytest.mark.parametrize("record", [Ready(), Ping(1), Proof(bytes(64))])
def test_records_out_of_order_break_it(record: Record) -> None:
    with pytest.raises(HandshakeFailed, match="awaiting HELLO"):
        listener().receive(record)


def test_nothing_follows_the_end() -> None:
    one, two = dialler(), listener()
    play(one, two)
    with pytest.raises(HandshakeFailed, match="done"):
        two.receive(Ready())


def test_every_field_of_a_hello_is_covered_by_the_proof() -> None:
    for change in ({"epoch": b"x" * 16}, {"window_bytes": 1}, {"nonce": b"x" * 32}):
        one, two = dialler(), listener()
        hello = one.start()[0]
        assert isinstance(hello, Hello)
        altered = replace(hello, **change)
        their_hello, their_proof = two.receive(altered)
        one.receive(their_hello)
        with pytest.raises(HandshakeFailed, match="could not prove"):
            one.receive(their_proof)


def test_the_label_is_this_protocols_own() -> None:
    assert LABEL == "mesh/1 link proof"
