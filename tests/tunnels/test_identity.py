"""The node key: made once, kept safely, never shown."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, x25519
from hypothesis import given
from hypothesis import strategies as st

from tests.lab.nodes import identity
from tunnels import Identity, IdentityError, verify
from tunnels.identity import certificate_hash, certificate_peer
from tunnels.peer import PeerId


def test_a_key_is_made_once_and_found_again(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    first = Identity.load_or_create(path)
    assert Identity.load_or_create(path).peer == first.peer
    assert Identity.load(path).peer == first.peer
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["node.key"]


def test_a_damaged_key_is_a_sentence_and_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    Identity.load_or_create(path)
    whole = path.read_bytes()
    for damaged in (b"", b"\x00" * 119, whole[:60], whole.replace(b"M", b"!")):
        path.write_bytes(damaged)
        with pytest.raises(IdentityError, match="restore it from a backup"):
            Identity.load_or_create(path)
        assert path.read_bytes() == damaged


def test_another_kind_of_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    path.write_bytes(
        ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    with pytest.raises(IdentityError, match="not an Ed25519 key"):
        Identity.load(path)


def test_a_folder_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="check that its folder exists"):
        Identity.load_or_create(tmp_path / "nowhere" / "node.key")
    with pytest.raises(IdentityError, match="cannot read"):
        Identity.load(tmp_path / "node.key")


def test_the_loser_of_a_race_takes_the_winners_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "node.key"
    winner = Identity.load_or_create(path)
    exists = Path.exists
    # the winner wrote just after the loser looked
    monkeypatch.setattr(Path, "exists", lambda looked: looked != path and exists(looked))
    assert Identity.load_or_create(path).peer == winner.peer
    assert os.listdir(tmp_path) == ["node.key"]


def test_nothing_shown_holds_the_private_key() -> None:
    who = identity("alice")
    secret = who.tls_key.private_bytes_raw().hex()
    assert secret not in repr(who) + str(who)
    assert repr(who) == f"Identity({who.peer.short})"


def test_a_signature_is_good_for_one_key_one_label_one_payload() -> None:
    alice, bob = identity("alice"), identity("bob")
    signature = alice.sign("label", b"payload")
    assert verify(alice.peer, "label", b"payload", signature)
    assert not verify(bob.peer, "label", b"payload", signature)
    assert not verify(alice.peer, "labe", b"lpayload", signature)
    assert not verify(alice.peer, "label", b"payloads", signature)


@given(st.binary(min_size=32, max_size=32), st.binary(max_size=70))
def test_no_key_and_no_signature_raises(key: bytes, signature: bytes) -> None:
    assert not verify(PeerId(key), "label", b"payload", signature)


def test_the_certificate_is_the_same_every_time_and_carries_the_key() -> None:
    one, two = identity("alice"), identity("alice")
    assert one.certificate_hash == two.certificate_hash == certificate_hash(one.certificate)
    assert certificate_peer(one.certificate) == one.peer
    assert identity("bob").certificate_hash != one.certificate_hash


def test_a_key_of_another_kind_is_no_peer() -> None:
    class Certificate:
        def public_key(self) -> object:
            return x25519.X25519PrivateKey.generate().public_key()

    class Broken:
        def public_key(self) -> object:
            raise ValueError("not a point on the curve")

    assert certificate_peer(Certificate()) is None  # type: ignore[arg-type]
    assert certificate_peer(Broken()) is None  # type: ignore[arg-type]
