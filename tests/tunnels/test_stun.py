"""STUN: our words against the RFC's and another library's, questions against a clock."""

from __future__ import annotations

import math
import shutil
import socket
import struct
import subprocess
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import require
from tunnels import stun
from tunnels.binding import Address
from tunnels.errors import BadFrame
from tunnels.stun import (
    MAX_MESSAGE_BYTES,
    MAX_OPEN,
    Attribute,
    Failure,
    Message,
    Request,
    Responder,
    Success,
    Transactions,
    encode,
    is_request,
    is_stun,
    parse_untrusted,
)

ID = bytes(range(12))
SERVER, OTHER = ("192.0.2.1", 3478), ("192.0.2.2", 3478)
REQUEST = encode(Request(ID))
US = ("198.51.100.7", 40001)
MESSAGES: list[Message] = [
    Request(ID),
    Request(ID, fingerprint=False),
    Success(ID, US),
    Success(ID, ("2001:db8::7", 65535)),
    Success(ID, ("192.0.2.3", 1), fingerprint=False),
    Request(ID, software=b"mesh"),
    Success(ID, US, software=b"another"),
    Failure(ID, 420, (0x24, 0x7FFF, 0x31)),
    Failure(ID, 699),
]

# RFC 5769, sections 2.1 to 2.3
RFC_REQUEST = bytes.fromhex(
    "000100582112a442b7e7a701bc34d686fa87dfae802200105354554e2074657374"
    "20636c69656e74002400046e0001ff80290008932ff9b151263b36000600096576"
    "746a3a68367659202020000800149aeaa70cbfd8cb56781ef2b5b2d3f249c1b571"
    "a280280004e57a3bcf"
)
RFC_ANSWER_V4 = bytes.fromhex(
    "0101003c2112a442b7e7a701bc34d686fa87dfae8022000b7465737420766563746f7220"
    "002000080001a147e112a643000800142b91f599fd9e90c38c7489f92af9ba53f06be7d7"
    "80280004c07d4c96"
)
RFC_ANSWER_V6 = bytes.fromhex(
    "010100482112a442b7e7a701bc34d686fa87dfae8022000b7465737420766563746f7220"
    "002000140002a1470113a9faa5d3f179bc25f4b5bed2b9d900080014a382954e4be67bf1"
    "1784c97c8292c275bfe3ed4180280004c8fb0b4c"
)
RFC_ID = bytes.fromhex("b7e7a701bc34d686fa87dfae")


def message(kind: int, body: bytes = b"", *, size: int | None = None) -> bytes:
    length = len(body) if size is None else size
    return struct.pack(">HHI12s", kind, length, stun.MAGIC_COOKIE, ID) + body


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack(">HH", kind, len(value)) + value + bytes(-len(value) % 4)


def with_last_words(words: bytes) -> bytes:
    """A request with a right fingerprint, and more after it."""
    head = message(0x0001, size=8 + len(words))
    checksum = (zlib.crc32(head) ^ 0x5354554E).to_bytes(4, "big")
    return head + attribute(Attribute.FINGERPRINT, checksum) + words


# --- the wire -----------------------------------------------------------------------------------


@pytest.mark.parametrize("said", MESSAGES, ids=repr)
def test_a_message_reads_back(said: Message) -> None:
    data = encode(said)
    assert is_stun(data)
    assert parse_untrusted(data) == said


def test_the_rfcs_own_messages_are_read() -> None:
    assert parse_untrusted(RFC_REQUEST) == Request(
        RFC_ID, unknown=(0x24,), software=b"STUN test client"
    )
    server = b"test vector"
    v4 = ("192.0.2.1", 32853)
    assert parse_untrusted(RFC_ANSWER_V4) == Success(RFC_ID, v4, software=server)
    v6 = ("2001:db8:1234:5678:11:2233:4455:6677", 32853)
    assert parse_untrusted(RFC_ANSWER_V6) == Success(RFC_ID, v6, software=server)


@pytest.mark.parametrize("mapped", [US, ("2001:db8::7", 443)])
def test_another_library_reads_what_we_say_and_we_read_what_it_says(mapped: Address) -> None:
    require("aioice", find_spec("aioice") is not None, "needs aioice (pip install aioice)")
    aioice = import_module("aioice.stun")
    theirs = aioice.parse_message(encode(Success(ID, mapped)))
    assert theirs.attributes["XOR-MAPPED-ADDRESS"] == mapped
    assert aioice.parse_message(encode(Request(ID))).transaction_id == ID
    failure = aioice.parse_message(encode(Failure(ID, 420, (0x24,))))
    assert failure.attributes["ERROR-CODE"][0] == 420

    for kind, attributes in (("REQUEST", {}), ("RESPONSE", {"XOR-MAPPED-ADDRESS": mapped})):
        words = aioice.Message(
            message_method=aioice.Method.BINDING,
            message_class=aioice.Class[kind],
            transaction_id=ID,
            attributes=attributes,
        )
        words.add_fingerprint()
        said = parse_untrusted(bytes(words))
        assert said.transaction == ID
        assert not isinstance(said, Success) or said.mapped == mapped


def test_an_ipv4_address_in_ipv6_clothes_is_taken_for_what_it_is() -> None:
    assert parse_untrusted(encode(Success(ID, ("::ffff:192.0.2.9", 7)))) == Success(
        ID, ("192.0.2.9", 7)
    )


def test_of_two_addresses_the_first_counts() -> None:
    first, second = (encode(Success(ID, one, fingerprint=False))[20:] for one in (US, SERVER))
    said = parse_untrusted(message(0x0101, first + second))
    assert said == Success(ID, US, fingerprint=False)


@pytest.mark.parametrize(
    "wire",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(message(0x0001)[:19], id="half a head"),
        pytest.param(message(0x0001, bytes(MAX_MESSAGE_BYTES)), id="too long"),
        pytest.param(message(0x0001).replace(b"\x21\x12", b"\x21\x13"), id="another cookie"),
        pytest.param(message(0x0001, size=4), id="cut off"),
        pytest.param(message(0x0001, b"abc"), id="not by four"),
        pytest.param(message(0x0001, b"\x80\x22\x00\x05abcd"), id="an attribute beyond the end"),
        pytest.param(message(0x0011), id="an indication"),
        pytest.param(message(0x0101), id="an answer without an address"),
        pytest.param(message(0x0101, attribute(0x20, b"\0\1\0")), id="a short address"),
        pytest.param(message(0x0101, attribute(0x20, b"\0\3\1\1abcd")), id="an unknown family"),
        pytest.param(message(0x0101, attribute(0x20, b"\0\2\1\1abcd")), id="IPv6 of four bytes"),
        pytest.param(message(0x0101, attribute(0x20, b"\0\1\x21\x12abcd")), id="port 0"),
        pytest.param(message(0x0101, attribute(0x7F, b"")), id="a secret meaning"),
        pytest.param(message(0x0111), id="a failure without a code"),
        pytest.param(message(0x0111, attribute(0x09, b"\0\0\2\0")), id="a failure 200"),
        pytest.param(message(0x0111, attribute(0x09, b"\0\0\4\x64")), id="a failure 4 hundred 100"),
        pytest.param(encode(Request(ID))[:-1] + b"\0", id="a wrong fingerprint"),
        pytest.param(with_last_words(attribute(0x8022, b"")), id="words after the fingerprint"),
    ],
)
def test_what_is_no_binding_message_is_refused(wire: bytes) -> None:
    with pytest.raises(BadFrame):
        parse_untrusted(wire)


def test_what_is_for_others_on_the_port_is_left_to_them() -> None:
    assert not is_stun(b"\x40" + encode(Request(ID))[1:])
    assert not is_stun(encode(Request(ID))[:19])
    assert not is_stun(b"\0\1\0\0" + bytes(16))


@given(st.binary(max_size=120))
def test_a_body_of_any_bytes_is_read_or_refused(body: bytes) -> None:
    for kind in (0x0001, 0x0101, 0x0111):
        with suppress(BadFrame):
            parse_untrusted(message(kind, body))


# --- asking -------------------------------------------------------------------------------------


def test_a_question_is_repeated_at_growing_pauses_and_then_given_up() -> None:
    questions = Transactions()
    questions.ask(SERVER, ID, 10.0)
    sent_s = []
    while not (turn := questions.advance(now := questions.next_deadline())).silent:
        assert turn.sends == ((encode(Request(ID)), SERVER),)
        sent_s.append(now - 10.0)
    assert sent_s == [0.0, 0.25, 0.75, 1.75]
    assert (turn.silent, now) == ((ID,), 13.75)
    assert questions.next_deadline() == math.inf


def test_nothing_is_sent_before_its_time() -> None:
    questions = Transactions()
    questions.ask(SERVER, ID, 0.0)
    assert questions.advance(0.0).sends
    assert questions.advance(0.2) == stun.Turn((), ())


@pytest.mark.parametrize("answer", [Success(ID, US), Failure(ID, 500)], ids=repr)
def test_an_answer_ends_its_question_once(answer: Success | Failure) -> None:
    questions = Transactions()
    questions.ask(SERVER, ID, 0.0)
    assert questions.settle(answer, SERVER)
    assert not questions.settle(answer, SERVER)
    assert questions.next_deadline() == math.inf


def test_an_answer_made_up_by_somebody_else_is_none() -> None:
    questions = Transactions()
    questions.ask(SERVER, ID, 0.0)
    assert not questions.settle(Success(ID, US), OTHER), "not the address that was asked"
    assert not questions.settle(Success(bytes(12), US), SERVER), "not the question's number"
    assert questions.settle(Success(ID, US), SERVER)


def test_questions_do_not_pile_up() -> None:
    questions = Transactions()
    for number in range(MAX_OPEN + 3):
        questions.ask(SERVER, number.to_bytes(12, "big"), 0.0)
    turn = questions.advance(0.0)
    assert len(turn.sends) == MAX_OPEN
    dropped = tuple(number.to_bytes(12, "big") for number in range(3))
    assert turn.silent == dropped, "the oldest are dropped, and nobody waits for them"
    assert not questions.settle(Success(dropped[0], US), SERVER)
    assert not questions.advance(0.0).silent


def test_a_question_that_is_forgotten_is_not_repeated() -> None:
    questions = Transactions()
    questions.ask(SERVER, ID, 0.0)
    questions.forget(ID)
    questions.forget(ID)
    assert questions.next_deadline() == math.inf
    assert not questions.advance(0.0).sends


# --- answering ----------------------------------------------------------------------------------


def test_a_node_is_known_to_nodes_alone() -> None:
    for software in (b"", b"another", stun.SOFTWARE):
        question = encode(Request(ID, software=software))
        answer = Responder(0.0).answer_untrusted(question, US, 0.0)
        assert answer is not None
        told = stun.SOFTWARE if software == stun.SOFTWARE else b""
        assert parse_untrusted(answer) == Success(ID, US, software=told)


def test_whoever_asks_is_told_its_address() -> None:
    assert is_request(REQUEST)
    answer = Responder(0.0).answer_untrusted(REQUEST, US, 0.0)
    assert answer is not None
    assert not is_request(answer)
    assert parse_untrusted(answer) == Success(ID, US)


def test_somebody_who_wants_more_is_told_that_it_is_not_to_be_had() -> None:
    answer = Responder(0.0).answer_untrusted(RFC_REQUEST, US, 0.0)
    assert answer is not None
    assert parse_untrusted(answer) == Failure(RFC_ID, 420, (0x24,))


@given(
    st.lists(st.tuples(st.integers(0, 0xFFFF), st.binary(max_size=9)), max_size=120),
    st.sampled_from([US, ("2001:db8::7", 443)]),
)
def test_an_answer_is_no_larger_than_twice_its_question(
    attributes: list[tuple[int, bytes]], sender: Address
) -> None:
    wire = message(0x0001, b"".join(attribute(*one) for one in attributes))
    bare_v6 = not attributes and ":" in sender[0]
    answer = Responder(0.0).answer_untrusted(wire, sender, 0.0)
    assert len(answer or b"") <= (2.2 if bare_v6 else 2) * len(wire)


@pytest.mark.parametrize("wire", [b"", encode(Request(ID))[:-1], encode(Success(ID, US))])
def test_what_is_no_question_gets_no_answer(wire: bytes) -> None:
    assert Responder(0.0).answer_untrusted(wire, US, 0.0) is None


def test_a_network_gets_a_bounded_number_of_answers_and_others_go_on() -> None:
    responder = Responder(0.0)
    one_home = [(f"2001:db8::{n:x}", 9) for n in range(1, 999)]
    answers = [responder.answer_untrusted(REQUEST, sender, 0.0) for sender in one_home]
    assert sum(one is not None for one in answers) == stun.PER_NETWORK.burst
    assert responder.answer_untrusted(REQUEST, US, 0.0) is not None
    assert responder.answer_untrusted(REQUEST, ("2001:db8::1", 9), 1.0) is not None


def test_a_crowd_gets_a_bounded_number_of_answers() -> None:
    responder = Responder(0.0)
    crowd = [(f"11.{n >> 8}.{n & 255}.1", 9) for n in range(2000)]
    answers = [responder.answer_untrusted(REQUEST, one, 0.0) for one in crowd]
    assert sum(one is not None for one in answers) == stun.IN_ALL.burst


UP_WITHIN_S = 30.0

# --- a real server ------------------------------------------------------------------------------


@contextmanager
def coturn(port: int) -> Iterator[None]:
    """A TURN server's STUN side on loopback, v4 and v6."""
    program = shutil.which("turnserver")
    require("coturn", program is not None, "needs turnserver (./just setup)")
    assert program is not None
    command = (
        *(program, "-n", "-L", "127.0.0.1", "-L", "::1", "-p", str(port), "-S", "--no-cli"),
        *("--no-tls", "--no-dtls", "--log-file=stdout", "-m", "1", "--pidfile=/dev/null"),
        *("--userdb=/dev/null", "--fingerprint"),
    )
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            yield
        finally:
            server.kill()


def _answer_once_up(ours: socket.socket, server: tuple[str, int]) -> tuple[bytes, tuple[str, int]]:
    """A refusal comes at once while nobody listens: the clock counts, not the tries."""
    up_until_s = time.monotonic() + UP_WITHIN_S
    while time.monotonic() < up_until_s:
        ours.sendto(encode(Request(ID)), server)
        try:
            return ours.recvfrom(2048)
        except (TimeoutError, ConnectionRefusedError):
            continue
    raise AssertionError(f"the server was not up within {UP_WITHIN_S:g} s")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_real_server_tells_us_our_address(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as ours:
        ours.bind((host, 0))
        ours.settimeout(0.5)
        port = _free_port(family, host)
        with coturn(port):
            data, sender = _answer_once_up(ours, (host, port))
        assert sender[:2] == (host, port)
        answer = parse_untrusted(data)
        assert isinstance(answer, Success)
        assert answer.mapped == (host, ours.getsockname()[1])
        assert answer.software.startswith(b"Coturn"), "and what it is: no node"


def _free_port(family: socket.AddressFamily, host: str) -> int:
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
