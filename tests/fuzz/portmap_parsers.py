"""What routers, and whoever else answers in their place, say about port mappings."""

from __future__ import annotations

from discovery import nat_pmp, pcp
from discovery.mapping import Transport, uselessness
from discovery.plain_http import MAX_ANSWER_BYTES, Exchange
from discovery.upnp import (
    Place,
    parse_description_untrusted,
    parse_external_address_untrusted,
    parse_search_answer_untrusted,
    parse_soap_untrusted,
)
from tests.discovery.routers import (
    GATEWAY,
    OUTSIDE,
    WAN_IP,
    description,
    http_answer,
    soap_answer,
    soap_fault,
    ssdp_answer,
)
from tests.fuzz.parser import REJECTED, Parser, check
from tests.fuzz.script import Script
from tunnels.errors import BadFrame

FOUND_AT = Place(5000, "/desc.xml")


def nat_pmp_seeds() -> list[bytes]:
    answers = (
        "0080 0000 00000064 0b16212c",
        "0081 0000 00000065 1092 10cd 00000708",
        "0082 0002 00000065",
    )
    return [bytes.fromhex(answer) for answer in answers]


def run_nat_pmp(data: bytes) -> object:
    answer = nat_pmp.parse_answer_untrusted(data)
    check(answer.address is None or len(answer.address) <= 15, "an address is IPv4")
    check(bool(answer.port) or not answer.lifetime_s, "what is mapped has a port")
    if answer.address is not None:
        uselessness(answer.address)
    return answer


def pcp_seeds() -> list[bytes]:
    head = "0281 0000 00000708 0000004d 00000000 00000000 00000000 000102030405060708090a0b"
    mapped = f"{head} 11000000 1092 10cd 00000000 00000000 0000ffff 0b16212c"
    answers = (mapped, mapped + "02000004 61626364", "0280 0000 00000000 0000004d" + "00" * 12)
    return [bytes.fromhex(answer) for answer in answers]


def run_pcp(data: bytes) -> object:
    answer = pcp.parse_answer_untrusted(data)
    check(answer.transport is None or isinstance(answer.transport, Transport), "a transport")
    check(len(answer.nonce) in (0, pcp.NONCE_BYTES), "a nonce is whole")
    if answer.host:
        uselessness(answer.host)
    return answer


def run_search(data: bytes) -> object:
    place = parse_search_answer_untrusted(data, GATEWAY)
    return _plain(place)


def run_description(data: bytes) -> object:
    control = parse_description_untrusted(data, FOUND_AT, GATEWAY)
    check("WAN" in control.service, "a connection")
    return _plain(control.place)


def _plain(place: Place) -> Place:
    check(0 < place.port < 65536, "a port is one")
    check(place.path.startswith("/") and place.path.isascii(), "a path can be asked for")
    Exchange().question(f"{GATEWAY}:{place.port}", place.path)
    return place


def run_soap(data: bytes) -> object:
    answer = parse_soap_untrusted(data, "GetExternalIPAddress")
    check(answer.reason.isprintable() and len(answer.reason) <= 100, "a reason can be shown")
    if answer.error is None:
        uselessness(parse_external_address_untrusted(answer))
    return answer


def run_http(data: bytes) -> object:
    """The first bytes say in which pieces the rest comes."""
    script = Script(data)
    cuts = sorted(script.byte() * 4 for _ in range(3))
    rest = data[3:]
    exchange = Exchange()
    exchange.question(GATEWAY, "/")
    for start, end in zip((0, *cuts), (*cuts, len(rest)), strict=True):
        if not exchange.done:
            exchange.feed_untrusted(rest[start:end])
    if not exchange.done:
        exchange.feed_untrusted(b"")
    check(len(exchange.body) <= MAX_ANSWER_BYTES, "an answer is bounded")
    check(not exchange.done or exchange.status is not None, "what is done has a status")
    return exchange.status if exchange.done else REJECTED


def http_seeds() -> list[bytes]:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nabcd\r\n0\r\n\r\n"
    until_closed = b"HTTP/1.0 200 OK\r\nServer: x\r\n\r\nall of it"
    redirect = b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\n\r\n"
    answers = (http_answer(b"<r/>"), http_answer(b"", "500 Error"), chunked, until_closed, redirect)
    return [b"\x05\x10\x20" + answer for answer in answers]


PARSERS = (
    Parser("nat-pmp answer", (BadFrame,), nat_pmp_seeds, run_nat_pmp),
    Parser("pcp answer", (BadFrame,), pcp_seeds, run_pcp),
    Parser(
        *("ssdp answer", (BadFrame,)),
        lambda: [ssdp_answer(), ssdp_answer(f"http://{GATEWAY}", WAN_IP)],
        run_search,
    ),
    Parser(
        *("upnp description", (BadFrame,)),
        lambda: [description(), description("ctl", base=f"http://{GATEWAY}:49152/x/")],
        run_description,
    ),
    Parser(
        *("soap answer", (BadFrame,)),
        lambda: [
            soap_answer("GetExternalIPAddress", NewExternalIPAddress=OUTSIDE),
            soap_fault(718),
        ],
        run_soap,
    ),
    Parser("http answer", (BadFrame,), http_seeds, run_http),
)
