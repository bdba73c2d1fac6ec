"""What routers say about port mappings by NAT-PMP and PCP, and what is believed of it."""

from __future__ import annotations

import struct

import pytest

from discovery import nat_pmp, pcp
from discovery.mapping import Epoch, Mapping, Transport, uselessness
from tests.discovery.routers import OURS, OUTSIDE
from tunnels.errors import BadFrame

NONCE = bytes(range(12))


# --- NAT-PMP: the bytes of RFC 6886 ---------------------------------------------------------------


def test_nat_pmp_questions_are_those_of_the_rfc() -> None:
    assert nat_pmp.encode_address_question() == b"\0\0"
    udp = nat_pmp.encode_map(Transport.UDP, 4242, 4300, 3600)
    assert udp == bytes.fromhex("0001 0000 1092 10cc 00000e10")
    tcp = nat_pmp.encode_map(Transport.TCP, 4242, 4300, 0)
    assert tcp == bytes.fromhex("0002 0000 1092 0000 00000000")  # a goodbye names no outside port


def test_nat_pmp_answers_are_read() -> None:
    address = nat_pmp.parse_answer_untrusted(bytes.fromhex("0080 0000 00000064 0b16212c"))
    assert (address.epoch_s, address.address, address.refusal) == (100, OUTSIDE, None)
    mapped = nat_pmp.parse_answer_untrusted(
        bytes.fromhex("0081 0000 00000065 1092 10cd 00000708") + b"\0\0"
    )
    assert mapped == nat_pmp.Answer(101, None, None, Transport.UDP, 4242, 4301, 1800)
    refused = nat_pmp.parse_answer_untrusted(bytes.fromhex("0082 0002 00000065"))
    assert (refused.transport, refused.refusal) == (
        Transport.TCP,
        "port mapping is switched off in it",
    )
    odd = nat_pmp.parse_answer_untrusted(bytes.fromhex("0080 00ff 00000065"))
    assert odd.refusal == "it refuses with the code 255"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ("", "0 bytes"),
        ("00" * 65, "65 bytes"),
        ("0180 0000 00000064 0b16212c", "no NAT-PMP answer"),
        ("0001 0000 00000064 0b16212c", "no NAT-PMP answer"),  # our own question, sent back
        ("0083 0000 00000064 0b16212c", "unknown kind"),
        ("0080 0000 00000064 0b1621", "without its address"),
        ("0081 0000 00000065 1092 10cd 0000", "without its mapping"),
        ("0081 0000 00000065 1092 0000 00000708", "port 0"),
        ("0081 0000 00000065 0000 1092 00000708", "port 0"),
    ],
)
def test_what_is_no_nat_pmp_answer_is_refused(data: str, why: str) -> None:
    with pytest.raises(BadFrame, match=why):
        nat_pmp.parse_answer_untrusted(bytes.fromhex(data))


# --- PCP: the bytes of RFC 6887 -------------------------------------------------------------------


def test_pcp_questions_are_those_of_the_rfc() -> None:
    announce = pcp.encode_announce(OURS)
    ours = "00000000 00000000 0000ffff c0a80714"
    assert announce == bytes.fromhex(f"0200 0000 00000000 {ours}")
    wanted = pcp.encode_map(OURS, NONCE, Transport.UDP, 4242, 4300, 3600)
    assert wanted == bytes.fromhex(
        f"0201 0000 00000e10 {ours} 000102030405060708090a0b 11000000 1092 10cc"
        "00000000 00000000 0000ffff 00000000"
    )
    assert len(pcp.encode_map("2001:db8::1", NONCE, Transport.TCP, 1, 1, 0)) == 60


def pcp_mapped(
    *,
    version: int = 2,
    opcode: int = 0x81,
    result: int = 0,
    protocol: int = 17,
    internal_port: int = 4242,
    port: int = 4301,
) -> bytes:
    head = struct.pack(">BBBBII12x", version, opcode, 0, result, 1800, 77)
    outside = bytes.fromhex("00000000 00000000 0000ffff 0b16212c")
    return head + struct.pack(">12sB3xHH16s", NONCE, protocol, internal_port, port, outside)


def test_pcp_answers_are_read() -> None:
    mapped = pcp.parse_answer_untrusted(pcp_mapped())
    assert mapped == pcp.Answer(77, None, 1800, NONCE, Transport.UDP, 4242, 4301, OUTSIDE)
    with_option = pcp.parse_answer_untrusted(pcp_mapped() + b"\2\0\0\4abcd")
    assert with_option == mapped
    refused = pcp.parse_answer_untrusted(pcp_mapped(result=12, port=0))
    assert refused.refusal is not None
    assert "double NAT" in refused.refusal
    assert pcp.parse_answer_untrusted(pcp_mapped(result=99)).refusal == (
        "it refuses with the code 99"
    )
    announced = pcp.parse_answer_untrusted(pcp_mapped(opcode=0x80)[:24])
    assert announced == pcp.Answer(77)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (bytes.fromhex("0080 0001 00000064"), "8 bytes"),  # how a NAT-PMP server says no
        (pcp_mapped() + b"x", "61 bytes"),
        (pcp_mapped() + bytes(1100), "1160 bytes"),
        (pcp_mapped(version=1), "no PCP answer"),
        (pcp_mapped(opcode=1), "no PCP answer"),
        (pcp_mapped(opcode=0x82), "no PCP answer"),
        (pcp_mapped()[:56], "without its mapping"),
        (pcp_mapped(protocol=1), "protocol 1"),
        (pcp_mapped(port=0), "port 0"),
        (pcp_mapped(internal_port=0), "port 0"),
    ],
)
def test_what_is_no_pcp_answer_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(BadFrame, match=why):
        pcp.parse_answer_untrusted(data)


# --- what a mapping is worth ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "why"),
    [
        ("0.0.0.0", "no IPv4 address"),
        ("2001:4860::1", "no IPv4 address"),
        ("100.64.3.4", "CGNAT"),
        ("10.1.2.3", "private"),
        ("192.168.1.4", "private"),
        ("127.0.0.1", "private"),
        ("224.0.0.5", "nobody can reach"),
        ("198.18.0.1", "private"),
        ("255.255.255.255", "private"),
    ],
)
def test_an_outside_address_that_nobody_reaches_is_no_candidate(host: str, why: str) -> None:
    assert why in str(uselessness(host))


def test_a_public_address_is_one() -> None:
    assert uselessness(OUTSIDE) is None


@pytest.mark.parametrize(
    ("lifetime_s", "after_s"), [(3600, 1800), (120, 60), (2, 30), (10**9, 1800), (0, 1800)]
)
def test_mappings_are_renewed_at_half_their_life(lifetime_s: int, after_s: float) -> None:
    assert Mapping(Transport.UDP, 1, OUTSIDE, 1, lifetime_s).renew_after_s == after_s


@pytest.mark.parametrize(
    ("seen", "restarted"),
    [
        ([(1000, 0.0), (1060, 60.0)], [False, False]),
        ([(1000, 0.0), (1056, 60.0)], [False, False]),  # a clock that is 5 % slow
        ([(1000, 0.0), (999, 0.1)], [False, False]),  # answers that overtook each other
        ([(1000, 0.0), (5, 60.0)], [False, True]),
        ([(10, 0.0), (11, 3600.0)], [False, True]),  # restarted, and not yet where it was
        ([(10, 0.0), (3600, 60.0)], [False, True]),  # another router
        ([(1000, 0.0), (5, 60.0), (65, 120.0)], [False, True, False]),
    ],
)
def test_a_restarted_router_is_known_by_its_clock(
    seen: list[tuple[int, float]], restarted: list[bool]
) -> None:
    epoch = Epoch()
    assert [epoch.has_restarted(epoch_s, now) for epoch_s, now in seen] == restarted
