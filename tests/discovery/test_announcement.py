"""What a node says of itself on the local network: read back whole, recognised by members alone."""

from __future__ import annotations

import random
from typing import Any

import pytest

from discovery import announcement as announcements
from discovery.announcement import (
    ENTROPY_BYTES,
    MAX_PLACES,
    MAX_RECORD_BYTES,
    MAX_TAGS,
    Announcement,
    encode_announcement,
    mesh_tag,
    parse_announcement_untrusted,
)
from tests.lab.nodes import identity
from tunnels.errors import BadFrame
from tunnels.peer import Candidate, PeerId

BOB = identity("bob")
MESH, OTHER_MESH = (bytes([n]) * 32 for n in (1, 2))
PLACES = (Candidate("quic", "192.0.2.7", 4433), Candidate("quic", "2001:db8::7", 4433))


def record(**changes: Any) -> bytes:
    fields: dict[str, Any] = {
        "sign": BOB.sign,
        "peer": BOB.peer,
        "seq": 1_800_000_000_000,
        "version": "0.1.0",
        "name": "bob",
        "places": PLACES,
        "meshes": (MESH,),
        "entropy": bytes(range(ENTROPY_BYTES)),
    }
    return encode_announcement(**(fields | changes))


def strings(data: bytes) -> list[bytes]:
    found = []
    while data:
        found.append(data[1 : 1 + data[0]])
        data = data[1 + data[0] :]
    return found


def joined(parts: list[bytes]) -> bytes:
    return b"".join(bytes([len(part)]) + part for part in parts)


def with_string(key: bytes, value: bytes) -> bytes:
    """The record with another value, or with none, its signature as it was."""
    return joined(
        [key + b"=" + value if one.startswith(key + b"=") else one for one in strings(record())]
    )


def without_string(key: bytes) -> bytes:
    return joined([one for one in strings(record()) if not one.startswith(key + b"=")])


def test_what_is_said_is_read() -> None:
    said = parse_announcement_untrusted(record())
    assert (said.peer, said.seq, said.version) == (BOB.peer, 1_800_000_000_000, "0.1.0")
    assert (said.name, said.places) == ("bob", PLACES)
    assert said.is_signed()


def test_members_recognise_their_mesh_and_no_other() -> None:
    said = parse_announcement_untrusted(record())
    assert said.is_of(MESH)
    assert not said.is_of(OTHER_MESH)


def test_strangers_cannot_tell_that_two_nodes_are_of_one_mesh() -> None:
    """Nor that one node is still in the same meshes when it has chosen new entropy."""
    ann = identity("ann")
    salt, other_salt = bytes(8), bytes([1]) * 8
    shown = mesh_tag(MESH, BOB.peer, salt)
    assert shown != mesh_tag(MESH, ann.peer, salt)
    assert shown != mesh_tag(MESH, BOB.peer, other_salt)
    assert MESH not in record()


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 16, 20])
def test_how_many_meshes_there_are_does_not_show(count: int) -> None:
    meshes = [bytes([number]) * 32 for number in range(count)]
    said = parse_announcement_untrusted(record(meshes=meshes))
    assert len(said.tags) == min(MAX_TAGS, -(-count // 4) * 4)
    assert all(said.is_of(mesh) for mesh in meshes[:MAX_TAGS])


def test_a_tag_copied_from_another_node_is_worth_nothing() -> None:
    mallory = identity("mallory")
    honest = strings(record())
    copied = [one for one in honest if one.startswith((b"salt=", b"tags="))]
    theirs = strings(record(sign=mallory.sign, peer=mallory.peer, meshes=()))
    forged = [one for one in theirs if not one.startswith((b"salt=", b"tags=", b"sig="))] + copied
    body = joined(forged)
    sealed = body + joined([theirs[-1]])
    said = parse_announcement_untrusted(sealed)
    assert said.tags == parse_announcement_untrusted(record()).tags
    assert not said.is_of(MESH)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (b"id", str(identity("mallory").peer).encode()),
        (b"seq", b"1800000000001"),
        (b"ver", b"0.1.1"),
        (b"name", b"bop"),
        (b"at0", b"quic,4433,192.0.2.66"),
        (b"salt", b"AAAAAAAAAAA"),
    ],
)
def test_a_changed_word_breaks_the_signature(key: bytes, value: bytes) -> None:
    assert not parse_announcement_untrusted(with_string(key, value)).is_signed()


def test_a_word_added_breaks_the_signature() -> None:
    *honest, signature = strings(record())
    longer = joined([*honest, b"at2=quic,1,192.0.2.66", signature])
    assert not parse_announcement_untrusted(longer).is_signed()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"\x05v=1",
        record()[:-1],
        record() + b"\0",
        record() + bytes(MAX_RECORD_BYTES),
        with_string(b"v", b"2"),
        with_string(b"id", b"short"),
        with_string(b"id", b"\xff" * 52),
        with_string(b"seq", b"-1"),
        with_string(b"seq", b"9" * 200),
        with_string(b"seq", b"9" * 16),
        with_string(b"ver", b""),
        with_string(b"name", b"\x1b\x07"),
        with_string(b"name", b"\xff"),
        with_string(b"at0", b"quic,4433"),
        with_string(b"at0", b"quic,0,192.0.2.7"),
        with_string(b"at0", b"quic,70000,192.0.2.7"),
        with_string(b"at0", b"quic,4433,example.com"),
        with_string(b"at0", b"quic,4433,fe80::1%eth0"),
        with_string(b"at0", b"qu ic,4433,192.0.2.7"),
        with_string(b"at0", b"q" * 17 + b",4433,192.0.2.7"),
        with_string(b"salt", b"AAAA"),
        with_string(b"salt", b"AAAAAAAAAAB"),
        with_string(b"salt", b"AAAA!AAAAAA"),
        with_string(b"salt", b"AAAAA"),
        with_string(b"tags", b"AAAA"),
        with_string(b"tags", b"A" * 200),
        with_string(b"sig", b"A" * 85),
        with_string(b"sig", b""),
        *(
            without_string(key)
            for key in (b"v", b"id", b"seq", b"ver", b"name", b"salt", b"tags", b"sig")
        ),
    ],
)
def test_what_no_node_says_is_refused(data: bytes) -> None:
    with pytest.raises(BadFrame):
        parse_announcement_untrusted(data)


def test_a_later_version_may_say_more() -> None:
    *honest, signature = strings(record())
    said = parse_announcement_untrusted(joined([*honest, b"color=red", b"flag", signature]))
    assert said.name == "bob"


def test_of_two_values_the_first_counts() -> None:
    """RFC 6763 section 6.4."""
    *honest, signature = strings(record())
    said = parse_announcement_untrusted(joined([*honest, b"name=bad", signature]))
    assert said.name == "bob"


def test_a_nodes_words_cannot_drive_our_terminal() -> None:
    said = parse_announcement_untrusted(record(name="bo\x1b[2Jb"))
    assert said.name == "bo[2Jb"


def test_the_longest_announcement_is_one_packet_and_reads_back() -> None:
    places = [
        Candidate("t" * 16, f"2001:db8:aaaa:aaaa:aaaa:aaaa:aaaa:aa{n}", 65535)
        for n in range(20, 50)
    ]
    data = record(
        name="ü" * 300,
        version="v" * 99,
        places=places,
        meshes=[bytes([n]) * 32 for n in range(99)],
        seq=announcements.MAX_SEQ,
    )
    assert len(data) <= MAX_RECORD_BYTES
    said = parse_announcement_untrusted(data)
    assert said.places == tuple(places[:MAX_PLACES])
    assert said.name == "ü" * 48
    assert said.version == "v" * 32
    assert said.is_signed()


def test_a_name_is_cut_between_its_letters() -> None:
    assert parse_announcement_untrusted(record(name="😀" * 64)).name == "😀" * 24


def test_no_bytes_make_the_parser_fail_otherwise() -> None:
    """The fuzzer does this at length (tests/fuzz)."""
    dice = random.Random(5)
    honest = record()
    for _ in range(3000):
        data = bytearray(honest)
        for _ in range(dice.randrange(1, 4)):
            data[dice.randrange(len(data))] = dice.randrange(256)
        try:
            said = parse_announcement_untrusted(bytes(data))
        except BadFrame:
            continue
        assert isinstance(said, Announcement)
        assert bytes(data) == honest or not said.is_signed()


def test_a_stranger_with_a_key_that_is_none_has_signed_nothing() -> None:
    nobody = PeerId(bytes(32))
    assert not parse_announcement_untrusted(record(peer=nobody)).is_signed()
