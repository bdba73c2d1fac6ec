"""What is believed of a router that speaks UPnP: its own address, plain XML, and little of it."""

from __future__ import annotations

import pytest

from discovery.plain_http import MAX_ANSWER_BYTES, Exchange
from discovery.plain_xml import MAX_DEPTH, MAX_ELEMENTS, MAX_XML_BYTES, parse_xml_untrusted
from discovery.upnp import (
    CONFLICT,
    Control,
    Place,
    SoapAnswer,
    encode_searches,
    encode_soap,
    parse_description_untrusted,
    parse_external_address_untrusted,
    parse_search_answer_untrusted,
    parse_soap_untrusted,
    soap_action,
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
from tunnels.errors import BadFrame

FOUND_AT = Place(5000, "/desc.xml")


# --- SSDP --------------------------------------------------------------------------------------


def test_a_search_is_one_datagram_for_each_version() -> None:
    one, two = encode_searches()
    assert one.startswith(b"M-SEARCH * HTTP/1.1\r\nHOST: 239.255.255.250:1900\r\n")
    assert one.endswith(b"InternetGatewayDevice:1\r\n\r\n")
    assert two.endswith(b"InternetGatewayDevice:2\r\n\r\n")


def test_an_answer_tells_where_the_description_is() -> None:
    assert parse_search_answer_untrusted(ssdp_answer(), GATEWAY) == FOUND_AT
    by_service = ssdp_answer(f"http://{GATEWAY}", target=WAN_IP)
    assert parse_search_answer_untrusted(by_service, GATEWAY) == Place(80, "/")


@pytest.mark.parametrize(
    "location",
    [
        "http://192.168.7.66:5000/desc.xml",  # another machine of the network
        "http://127.0.0.1:8080/admin",
        "http://169.254.169.254/latest/meta-data",
        "http://router.lan/desc.xml",  # a name leads anywhere
        f"https://{GATEWAY}/desc.xml",
        f"file://{GATEWAY}/etc/passwd",
        f"http://{GATEWAY}@192.168.7.66/",
        f"http://user:secret@{GATEWAY}/",
        f"http://{GATEWAY}:0/",
        f"http://{GATEWAY}:70000/",
        f"http://{GATEWAY}:port/",
        f"http://{GATEWAY}/a b",
        f"http://{GATEWAY}/é",
        f"http://{GATEWAY}/{'x' * 600}",
        "http://[::1",
        "",
    ],
)
def test_a_location_elsewhere_than_on_the_router_is_refused(location: str) -> None:
    with pytest.raises(BadFrame, match="URL"):
        parse_search_answer_untrusted(ssdp_answer(location), GATEWAY)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"NOTIFY * HTTP/1.1\r\n\r\n",
        b"HTTP/1.1 404 Not Found\r\n\r\n",
        ssdp_answer(target="urn:schemas-upnp-org:device:MediaRenderer:1"),
        ssdp_answer() + bytes(3000),
    ],
)
def test_what_is_no_gateways_answer_is_refused(answer: bytes) -> None:
    with pytest.raises(BadFrame):
        parse_search_answer_untrusted(answer, GATEWAY)


# --- the description -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "base", "place"),
    [
        ("/ctl/IPConn", "", Place(5000, "/ctl/IPConn")),
        ("ctl?n=1", "", Place(5000, "/ctl?n=1")),
        ("/ctl", f"http://{GATEWAY}:49152/x/", Place(49152, "/ctl")),
        (f"http://{GATEWAY}:49153/ctl", "", Place(49153, "/ctl")),
    ],
)
def test_control_lies_where_the_description_says(url: str, base: str, place: Place) -> None:
    found = parse_description_untrusted(description(url, base=base), FOUND_AT, GATEWAY)
    assert found == Control(WAN_IP, place)


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://192.168.7.66/ctl", ""),
        ("//192.168.7.66/ctl", ""),
        ("/ctl", "http://127.0.0.1:631/"),
        ("/ctl", "ftp://x/"),
        ("", ""),
    ],
)
def test_control_elsewhere_than_on_the_router_is_refused(url: str, base: str) -> None:
    with pytest.raises(BadFrame, match="URL"):
        parse_description_untrusted(description(url, base=base), FOUND_AT, GATEWAY)


def test_a_device_without_a_connection_is_refused() -> None:
    with pytest.raises(BadFrame, match="no connection to the internet"):
        parse_description_untrusted(description(service="urn:x"), FOUND_AT, GATEWAY)


# --- XML ----------------------------------------------------------------------------------------

LAUGHS = b"""<?xml version="1.0"?><!DOCTYPE lolz [<!ENTITY a "lol">
<!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;"><!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;&b;&b;">]>
<r>&c;</r>"""
OUTSIDER = b'<!DOCTYPE r [<!ENTITY x SYSTEM "file:///etc/passwd">]><r>&x;</r>'


@pytest.mark.parametrize(
    ("document", "why"),
    [
        (LAUGHS, "document type"),
        (OUTSIDER, "document type"),
        (b'<!DOCTYPE r SYSTEM "http://192.168.7.66/r.dtd"><r/>', "document type"),
        (b"<r>&x;</r>", "undefined entity"),
        (b"<a>" * (MAX_DEPTH + 1), "too many elements"),
        (b"<r>" + b"<a/>" * MAX_ELEMENTS + b"</r>", "too many elements"),
        (b" " * (MAX_XML_BYTES + 1), "bytes"),
        (b"<r>", "no XML"),
        (b"", "no XML"),
        ("<r/>".encode("utf-16"), "no XML"),
    ],
)
def test_xml_that_could_do_harm_is_refused(document: bytes, why: str) -> None:
    with pytest.raises(BadFrame, match=why):
        parse_xml_untrusted(document)


def test_an_encoding_is_not_looked_up() -> None:
    """Python's codecs are many, and none of a stranger's choosing is called."""
    found = parse_xml_untrusted('<?xml version="1.0" encoding="zlib_codec"?><r>ä</r>'.encode())
    assert found.text == "ä"
    assert parse_xml_untrusted("<r>ä</r>".encode("latin-1")).text == "\ufffd"


# --- SOAP --------------------------------------------------------------------------------------


def test_a_question_is_an_envelope_with_what_is_said_escaped() -> None:
    body = encode_soap(WAN_IP, "AddPortMapping", {"NewExternalPort": 4242, "NewText": "<&>"})
    asked = next(parse_xml_untrusted(body).each("AddPortMapping"))
    assert asked.child_text("NewExternalPort") == "4242"
    assert asked.child_text("NewText") == "<&>"
    assert soap_action(WAN_IP, "X") == f'"{WAN_IP}#X"'


def test_answers_are_read_and_refusals_have_their_code() -> None:
    data = soap_answer("GetExternalIPAddress", NewExternalIPAddress=OUTSIDE)
    answer = parse_soap_untrusted(data, "GetExternalIPAddress")
    assert parse_external_address_untrusted(answer) == OUTSIDE
    refused = parse_soap_untrusted(soap_fault(718, "in \u202euse"), "AddPortMapping")
    assert refused == SoapAnswer({}, CONFLICT, "in use")
    offline = parse_soap_untrusted(soap_answer("GetExternalIPAddress"), "GetExternalIPAddress")
    assert parse_external_address_untrusted(offline) == "0.0.0.0"


@pytest.mark.parametrize(
    "data", [soap_fault("many"), soap_fault("٣"), soap_answer("Else"), b"<r/>"]
)
def test_what_is_no_answer_is_refused(data: bytes) -> None:
    with pytest.raises(BadFrame, match="no answer to AddPortMapping"):
        parse_soap_untrusted(data, "AddPortMapping")


@pytest.mark.parametrize("text", ["router", "2001:db8::1", "11.22.33.444"])
def test_an_outside_address_must_be_one(text: str) -> None:
    with pytest.raises(BadFrame, match="outside address"):
        parse_external_address_untrusted(SoapAnswer({"NewExternalIPAddress": text}))


# --- HTTP --------------------------------------------------------------------------------------


def test_one_question_has_one_answer_in_whatever_pieces_it_comes() -> None:
    exchange = Exchange()
    asked = exchange.question("192.168.7.1:5000", "/ctl", soap_action='"a#b"', body=b"<x/>")
    assert asked.startswith(b"POST /ctl HTTP/1.1\r\n")
    assert asked.endswith(b"\r\n\r\n<x/>")
    heard = b"HTTP/1.1 100 Continue\r\n\r\n" + http_answer(b"<y/>", "500 Fault")
    for number in range(len(heard)):
        assert not exchange.done
        exchange.feed_untrusted(heard[number : number + 1])
    assert (exchange.done, exchange.status, exchange.body) == (True, 500, b"<y/>")


def test_a_description_is_got() -> None:
    exchange = Exchange()
    assert exchange.question("192.168.7.1:5000", "/d.xml").startswith(b"GET /d.xml HTTP/1.1\r\n")
    exchange.feed_untrusted(b"HTTP/1.0 200 OK\r\n\r\nto the end")
    assert not exchange.done
    exchange.feed_untrusted(b"")
    assert (exchange.done, exchange.body) == (True, b"to the end")


@pytest.mark.parametrize(
    ("heard", "why"),
    [
        (b"SSH-2.0-router\r\n\r\n", "no HTTP"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 9000, "no HTTP"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + bytes(MAX_ANSWER_BYTES), "without end"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 6000, "without end"),
    ],
)
def test_an_answer_without_sense_or_end_is_refused(heard: bytes, why: str) -> None:
    exchange = Exchange()
    exchange.question("192.168.7.1:5000", "/")
    with pytest.raises(BadFrame, match=why):
        exchange.feed_untrusted(heard)
