"""UPnP's Internet Gateway Device on the wire: SSDP, device descriptions, SOAP. No I/O.

A gateway is asked by UDP where its description is, the description names the URL of its control,
and control takes SOAP. All three come from whoever answers, so every URL must lie on the address
of the gateway itself: a place is kept as port and path only, and there is no host to be misled by.

Sources: UPnP Device Architecture 1.1 (sections 1.3, 2, 3), WANIPConnection:1 and :2.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit
from xml.sax.saxutils import escape

from discovery.plain_xml import Element, parse_xml_untrusted
from tunnels.errors import BadFrame

SSDP_PORT = 1900
SSDP_GROUP = "239.255.255.250"
MAX_ANSWER_BYTES = 2048
MAX_URL_CHARS = 512
NO_SUCH_MAPPING, CONFLICT, SAME_PORT_ONLY, PERMANENT_ONLY = 714, 718, 724, 725
_TARGETS = (
    "urn:schemas-upnp-org:device:InternetGatewayDevice:1",
    "urn:schemas-upnp-org:device:InternetGatewayDevice:2",
)
# What an IGD has on its way out, the better one first.
_SERVICES = (
    "urn:schemas-upnp-org:service:WANIPConnection:2",
    "urn:schemas-upnp-org:service:WANIPConnection:1",
    "urn:schemas-upnp-org:service:WANPPPConnection:1",
)
_PATH = re.compile(r"/[\x21-\x7e]*")


@dataclass(frozen=True)
class Place:
    """A URL on the gateway's own address."""

    port: int
    path: str

    def url(self, gateway: str) -> str:
        return f"http://{gateway}:{self.port}{self.path}"


@dataclass(frozen=True)
class Control:
    """Where a service takes SOAP, and the service's type."""

    service: str
    place: Place


@dataclass(frozen=True)
class SoapAnswer:
    """error: UPnP's code, with `reason` in the router's words; None when it was done."""

    values: Mapping[str, str]
    error: int | None = None
    reason: str = ""


# --- SSDP --------------------------------------------------------------------------------------


def encode_searches() -> list[bytes]:
    """One M-SEARCH for each version of the device. MX 1: answers within a second."""
    return [
        f"M-SEARCH * HTTP/1.1\r\nHOST: {SSDP_GROUP}:{SSDP_PORT}\r\n"
        f'MAN: "ssdp:discover"\r\nMX: 1\r\nST: {target}\r\n\r\n'.encode()
        for target in _TARGETS
    ]


def parse_search_answer_untrusted(data: bytes, gateway: str) -> Place:
    """Where the description is. Raises BadFrame."""
    if len(data) > MAX_ANSWER_BYTES:
        raise BadFrame(f"an SSDP answer of {len(data)} bytes")
    status, *lines = data.decode("latin-1").split("\r\n")
    if not re.fullmatch(r"HTTP/1\.[01] 200( .*)?", status):
        raise BadFrame("this is no answer to an SSDP search")
    headers: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers.setdefault(name.strip().lower(), value.strip())
    if headers.get("st") not in (*_TARGETS, *_SERVICES):
        raise BadFrame("an SSDP answer of something that is no internet gateway")
    return _place(headers.get("location", ""), "", gateway)


# --- the description ---------------------------------------------------------------------------


def parse_description_untrusted(data: bytes, found_at: Place, gateway: str) -> Control:
    """The control of the connection to the internet. Raises BadFrame."""
    root = parse_xml_untrusted(data)
    base = root.child_text("URLBase") or found_at.url(gateway)
    there: dict[str, Element] = {}
    for service in root.each("service"):
        there.setdefault(service.child_text("serviceType"), service)
    for kind in _SERVICES:
        if kind in there:
            return Control(kind, _place(there[kind].child_text("controlURL"), base, gateway))
    raise BadFrame("a device that has no connection to the internet to map ports on")


def _place(url: str, base: str, gateway: str) -> Place:
    """Raises BadFrame for what is not plain HTTP on the gateway's own address."""
    if not url or len(url) + len(base) > MAX_URL_CHARS:
        raise BadFrame("a URL that is missing, or too long")
    try:
        parts = urlsplit(urljoin(base, url))
        host, port = ipaddress.ip_address(parts.hostname or ""), parts.port
    except ValueError as error:
        raise BadFrame("a URL that is none, or names no IP address") from error
    if parts.scheme != "http" or parts.username is not None or str(host) != gateway:
        raise BadFrame(f"a URL that does not lie on the router itself, but on {host}")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if port == 0 or not _PATH.fullmatch(path):
        raise BadFrame("a URL with a port or a path that cannot be")
    return Place(port or 80, path)


# --- SOAP --------------------------------------------------------------------------------------


def encode_soap(service: str, action: str, arguments: Mapping[str, object]) -> bytes:
    """The body of a POST; `soap_action` is the header that goes with it."""
    inner = "".join(f"<{name}>{escape(str(value))}</{name}>" for name, value in arguments.items())
    return (
        '<?xml version="1.0"?>\r\n'
        '<s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/" '
        's:encodingStyle="http://schemas.xmlsoap.org/soap/encoding/"><s:Body>'
        f'<u:{action} xmlns:u="{service}">{inner}</u:{action}></s:Body></s:Envelope>\r\n'
    ).encode()


def soap_action(service: str, action: str) -> str:
    return f'"{service}#{action}"'


def parse_soap_untrusted(data: bytes, action: str) -> SoapAnswer:
    """Raises BadFrame."""
    root = parse_xml_untrusted(data)
    for answer in root.each(f"{action}Response"):
        return SoapAnswer({one.name: one.text for one in answer.children})
    for error in root.each("UPnPError"):
        code = error.child_text("errorCode")
        if not re.fullmatch(r"\d{1,5}", code, re.ASCII):
            break
        reason = error.child_text("errorDescription")
        shown = "".join(char for char in reason if char.isprintable())[:100]
        return SoapAnswer({}, int(code), shown)
    raise BadFrame(f"this is no answer to {action}")


def parse_external_address_untrusted(answer: SoapAnswer) -> str:
    """The IPv4 address in an answer to GetExternalIPAddress. Raises BadFrame."""
    text = answer.values.get("NewExternalIPAddress", "")
    try:
        return str(ipaddress.IPv4Address(text or "0.0.0.0"))  # noqa: S104 - when offline
    except ValueError as error:
        raise BadFrame("an outside address that is none") from error
