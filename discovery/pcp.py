"""PCP on the wire (RFC 6887): NAT-PMP's successor on the same port; MAP and ANNOUNCE only.

======== ===================== =====================================
offset   in a question         in an answer
======== ===================== =====================================
0        version 2             version 2
1        opcode                opcode, highest bit set
2        2 zero                1 zero, 1 result
4        4 lifetime, s         4 lifetime, s
8        16 our address        4 epoch, 12 zero
24       MAP: 12 nonce, 1 IANA protocol, 3 zero, 2 internal port, 2 outside port, 16 outside
         address. An answer repeats the nonce, so only who saw the question can answer.
======== ===================== =====================================

Numbers are big-endian; IPv4 addresses in IPv6's mapped form. Options are passed over.
"""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass

from discovery.mapping import Transport
from tunnels.errors import BadFrame

VERSION = 2
NONCE_BYTES = 12
MAX_ANSWER_BYTES = 1100  # section 7
_ANNOUNCE, _MAP = 0, 1
_IS_ANSWER = 128
_QUESTION = struct.Struct(">BBHI16s")
_ANSWER = struct.Struct(">BBBBII12x")
_MAPPING = struct.Struct(">12sB3xHH16s")
_ANY = ipaddress.IPv6Address("::ffff:0.0.0.0").packed
_REFUSALS = {
    1: "it speaks another version",
    2: "port mapping is switched off in it",
    4: "it does not know this question",
    7: "it has no connection to the internet",
    8: "it has no room for another mapping",
    9: "it does not map this protocol",
    10: "this machine has as many mappings as it allows",
    11: "it cannot give this port",
    12: "another router lies between it and this machine (double NAT)",
}


@dataclass(frozen=True)
class Answer:
    """refusal: why not, in words. nonce and what follows: of a MAP; zero in an ANNOUNCE."""

    epoch_s: int
    refusal: str | None = None
    lifetime_s: int = 0
    nonce: bytes = b""
    transport: Transport | None = None
    internal_port: int = 0
    port: int = 0
    host: str = ""


def encode_announce(ours: str) -> bytes:
    """Asks nothing but whether a PCP server is there, and its epoch (section 14.1.3)."""
    return _QUESTION.pack(VERSION, _ANNOUNCE, 0, 0, _packed(ours))


def encode_map(
    ours: str, nonce: bytes, transport: Transport, internal_port: int, port: int, lifetime_s: int
) -> bytes:
    """ours: the address of this machine that the gateway sees. port: the one wanted outside, 0 for
    any. lifetime_s 0 takes the mapping away; its nonce must be that of its making."""
    question = _QUESTION.pack(VERSION, _MAP, 0, lifetime_s, _packed(ours))
    return question + _MAPPING.pack(nonce, transport.value, internal_port, port, _ANY)


def parse_answer_untrusted(data: bytes) -> Answer:
    """Raises BadFrame, also for the answer by which a NAT-PMP server says that it knows no PCP."""
    if not _ANSWER.size <= len(data) <= MAX_ANSWER_BYTES or len(data) % 4:
        raise BadFrame(f"a PCP answer of {len(data)} bytes")
    version, opcode, _, result, lifetime_s, epoch_s = _ANSWER.unpack_from(data)
    if version != VERSION or opcode not in (_IS_ANSWER | _ANNOUNCE, _IS_ANSWER | _MAP):
        raise BadFrame("this is no PCP answer")
    refusal = None if not result else _REFUSALS.get(result, f"it refuses with the code {result}")
    if opcode == _IS_ANSWER | _ANNOUNCE:
        return Answer(epoch_s, refusal)
    if len(data) < _ANSWER.size + _MAPPING.size:
        raise BadFrame("a PCP answer without its mapping")
    nonce, protocol, internal_port, port, packed = _MAPPING.unpack_from(data, _ANSWER.size)
    if protocol not in (Transport.TCP.value, Transport.UDP.value):
        raise BadFrame(f"a PCP mapping of the protocol {protocol}")
    if refusal is None and lifetime_s and not (internal_port and port):
        raise BadFrame("a PCP mapping of port 0")
    transport = Transport(protocol)
    host = _host(packed)
    return Answer(epoch_s, refusal, lifetime_s, nonce, transport, internal_port, port, host)


def _packed(host: str) -> bytes:
    address = ipaddress.ip_address(host)
    if isinstance(address, ipaddress.IPv4Address):
        address = ipaddress.IPv6Address(f"::ffff:{address}")
    return address.packed


def _host(packed: bytes) -> str:
    address = ipaddress.IPv6Address(packed)
    return str(address.ipv4_mapped or address)
