"""Which SCTP packets may reach aiortc. Sans-IO.

aiortc trusts the peer of a data channel: a parameter of length 0 keeps its parser busy for ever,
one SACK can make it count to twenty million. So every packet is looked through here first; one that
no honest stack sends ends the link (BadFrame). Layout: RFC 9260 section 3, RFC 6525 section 4.
"""

from __future__ import annotations

import struct
from enum import IntEnum

from tunnels.errors import BadFrame

MAX_GAP_SPAN = 8192  # all gaps of a SACK together
MAX_RESETS = 256  # streams in one request; we send 135 at most
_HEADER_BYTES = 12
_CHUNK_HEAD = struct.Struct("!BBH")
_DATA_HEAD_BYTES = 16
_SACK = struct.Struct("!LLHH")
_GAP = struct.Struct("!HH")
_PARAM = struct.Struct("!HH")
_TSN_BYTES = 4
_UNORDERED = 0x04


class ChunkType(IntEnum):
    DATA = 0
    INIT = 1
    INIT_ACK = 2
    SACK = 3
    HEARTBEAT = 4
    HEARTBEAT_ACK = 5
    ABORT = 6
    SHUTDOWN = 7
    SHUTDOWN_ACK = 8
    ERROR = 9
    COOKIE_ECHO = 10
    COOKIE_ACK = 11
    SHUTDOWN_COMPLETE = 14
    RECONFIG = 130
    FORWARD_TSN = 192


# bytes of fixed fields before the parameters
_WITH_PARAMETERS = {
    ChunkType.INIT: 16,
    ChunkType.INIT_ACK: 16,
    ChunkType.HEARTBEAT: 0,
    ChunkType.HEARTBEAT_ACK: 0,
    ChunkType.ABORT: 0,
    ChunkType.ERROR: 0,
    ChunkType.RECONFIG: 0,
}
_ALONE = (ChunkType.INIT, ChunkType.INIT_ACK)
_RESET_OUT, _RESET_ANSWER, _ADD_STREAMS = 13, 16, 17
_RECONFIG_BYTES = {_RESET_OUT: 12, _RESET_ANSWER: 8, _ADD_STREAMS: 8}


def check_packet_untrusted(packet: bytes) -> None:
    """Raises BadFrame."""
    if len(packet) < _HEADER_BYTES + _CHUNK_HEAD.size:
        raise BadFrame("an SCTP packet without a chunk")
    at = _HEADER_BYTES
    while at + _CHUNK_HEAD.size <= len(packet):
        kind, flags, size = _CHUNK_HEAD.unpack_from(packet, at)
        if size < _CHUNK_HEAD.size or at + size > len(packet):
            raise BadFrame("an SCTP chunk of an impossible length")
        if kind == ChunkType.DATA:
            _check_data(flags, size)
        else:
            _check_other(kind, packet[at + _CHUNK_HEAD.size : at + size])
        after = at + size + (-size % 4)
        if kind in _ALONE and (at > _HEADER_BYTES or after < len(packet)):
            raise BadFrame("an INIT chunk that does not stand alone")
        at = after


def _check_data(flags: int, size: int) -> None:
    if size <= _DATA_HEAD_BYTES:
        raise BadFrame("an SCTP DATA chunk without data")
    if flags & _UNORDERED:
        raise BadFrame("unordered data on a data channel of ours")


def _check_other(kind: int, body: bytes) -> None:
    if kind in _WITH_PARAMETERS:
        _check_parameters(kind, body)
    elif kind == ChunkType.SACK:
        _check_sack(body)
    elif kind == ChunkType.FORWARD_TSN:
        raise BadFrame("data channels of ours drop nothing")
    elif kind == ChunkType.SHUTDOWN and len(body) < _TSN_BYTES:
        raise BadFrame("an SCTP SHUTDOWN that is cut short")


def _check_parameters(kind: int, body: bytes) -> None:
    fixed = _WITH_PARAMETERS[ChunkType(kind)]
    if len(body) < fixed:
        raise BadFrame("an SCTP chunk that is cut short")
    at = fixed
    while at + _PARAM.size <= len(body):
        name, size = _PARAM.unpack_from(body, at)
        if size < _PARAM.size or at + size > len(body):
            raise BadFrame("an SCTP parameter of an impossible length")
        if kind == ChunkType.RECONFIG:
            _check_reconfiguration(name, size - _PARAM.size)
        at += size + (-size % 4)


def _check_reconfiguration(name: int, size: int) -> None:
    if size < _RECONFIG_BYTES.get(name, 0):
        raise BadFrame("an SCTP reconfiguration that is cut short")
    if name == _RESET_OUT and (size % 2 or size > _RECONFIG_BYTES[_RESET_OUT] + 2 * MAX_RESETS):
        raise BadFrame("an SCTP reset of too many streams")
    if name == _ADD_STREAMS:
        raise BadFrame("an SCTP association that wants to grow")


def _check_sack(body: bytes) -> None:
    if len(body) < _SACK.size:
        raise BadFrame("an SCTP SACK that is cut short")
    _, _, gaps, duplicates = _SACK.unpack_from(body)
    if len(body) < _SACK.size + _GAP.size * (gaps + duplicates):
        raise BadFrame("an SCTP SACK that is cut short")
    span = 0
    for number in range(gaps):
        first, last = _GAP.unpack_from(body, _SACK.size + _GAP.size * number)
        if not 1 <= first <= last:
            raise BadFrame("an SCTP SACK with a gap that is none")
        span += last - first + 1
    if span > MAX_GAP_SPAN:
        raise BadFrame("an SCTP SACK with gaps too wide")
