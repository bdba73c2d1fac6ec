"""NAT-PMP on the wire (RFC 6886): two questions, two answers, all of them a few bytes.

========== ================================= ==============================================
question   bytes                             answer
========== ================================= ==============================================
address    version 0, opcode 0               0, 128, 2 result, 4 epoch, 4 outside address
map        0, opcode 1 (UDP) or 2 (TCP),     0, 128 + opcode, 2 result, 4 epoch, 2 internal
           2 zero, 2 internal port,          port, 2 outside port, 4 lifetime
           2 wanted port, 4 lifetime
========== ================================= ==============================================

Numbers are big-endian. A mapping with lifetime 0 is taken away (section 3.4).
"""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass

from discovery.mapping import Transport
from tunnels.errors import BadFrame

PORT = 5351
VERSION = 0
MAX_ANSWER_BYTES = 64
_IS_ANSWER = 128
_OPCODES = {Transport.UDP: 1, Transport.TCP: 2}
_TRANSPORTS = {code: transport for transport, code in _OPCODES.items()}
_MAP = struct.Struct(">BBHHHI")
_HEAD = struct.Struct(">BBHI")
_MAPPED = struct.Struct(">HHI")
_REFUSALS = {
    1: "it speaks another version",
    2: "port mapping is switched off in it",
    3: "it has no connection to the internet",
    4: "it has no room for another mapping",
    5: "it does not know this question",
}


@dataclass(frozen=True)
class Answer:
    """refusal: why not, in words; then only `epoch_s` counts. address: for the question of the
    address; transport, ports and lifetime: for a mapping."""

    epoch_s: int
    refusal: str | None = None
    address: str | None = None
    transport: Transport | None = None
    internal_port: int = 0
    port: int = 0
    lifetime_s: int = 0


def encode_address_question() -> bytes:
    return bytes((VERSION, 0))


def encode_map(transport: Transport, internal_port: int, port: int, lifetime_s: int) -> bytes:
    """port: the one wanted outside, 0 for any. lifetime_s 0 takes the mapping away."""
    wanted = port if lifetime_s else 0
    return _MAP.pack(VERSION, _OPCODES[transport], 0, internal_port, wanted, lifetime_s)


def parse_answer_untrusted(data: bytes) -> Answer:
    """Raises BadFrame."""
    if not _HEAD.size <= len(data) <= MAX_ANSWER_BYTES:
        raise BadFrame(f"a NAT-PMP answer of {len(data)} bytes")
    version, opcode, result, epoch_s = _HEAD.unpack_from(data)
    if version != VERSION or opcode < _IS_ANSWER:
        raise BadFrame("this is no NAT-PMP answer")
    transport = _TRANSPORTS.get(opcode - _IS_ANSWER)
    if opcode != _IS_ANSWER and transport is None:
        raise BadFrame(f"a NAT-PMP answer of the unknown kind {opcode}")
    if result:
        refusal = _REFUSALS.get(result, f"it refuses with the code {result}")
        return Answer(epoch_s, refusal, transport=transport)
    body = data[_HEAD.size :]
    if transport is None:
        if len(body) < 4:
            raise BadFrame("a NAT-PMP answer without its address")
        return Answer(epoch_s, address=str(ipaddress.IPv4Address(body[:4])))
    if len(body) < _MAPPED.size:
        raise BadFrame("a NAT-PMP answer without its mapping")
    internal_port, port, lifetime_s = _MAPPED.unpack_from(body)
    if lifetime_s and not (internal_port and port):
        raise BadFrame("a NAT-PMP mapping of port 0")
    return Answer(epoch_s, None, None, transport, internal_port, port, lifetime_s)
