"""The servers that help ICE, as a user names them: STUN, and a TURN server with its password."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

TRANSPORTS = ("udp", "tcp", "tls")
DEFAULT_PORT = 3478
DEFAULT_TLS_PORT = 5349
_URI = re.compile(
    r"(?P<scheme>turns?):(?P<host>\[[0-9a-fA-F:.]+\]|[^\[\]:?,\s]+)(:(?P<port>\d{1,5}))?"
    r"(\?transport=(?P<transport>\w+))?"
)
FORM = "turn:HOST[:PORT][?transport=udp|tcp|tls],USER"


@dataclass(frozen=True)
class TurnServer:
    """transport: how we speak to it; it speaks UDP to the peer in any case. tls: its certificate
    must be one that this machine trusts, for that host."""

    host: str
    port: int
    transport: str
    user: str
    password: str = field(repr=False)


@dataclass(frozen=True)
class IceServers:
    """relay_only: every byte goes through the TURN server, and no address of ours is told."""

    stun: tuple[tuple[str, int], ...] = ()
    turn: TurnServer | None = None
    relay_only: bool = False


def parse_turn(text: str, password: str) -> TurnServer:
    """`turn:HOST[:PORT][?transport=udp|tcp|tls],USER`, and RFC 7065's `turns:`. Raises ValueError
    with a sentence, which does not hold the password even where the text held one."""
    uri, comma, user = text.partition(",")
    found = _URI.fullmatch(uri)
    if found is None or not comma or not user:
        raise ValueError(f"a TURN server is named {FORM}")
    if "," in user:
        raise ValueError(f"a TURN server is named {FORM}; its password does not belong there")
    secure = found["scheme"] == "turns"
    transport = found["transport"] or ("tls" if secure else "udp")
    if transport not in TRANSPORTS or (secure and transport == "udp"):
        raise ValueError(f"a TURN server is spoken to over {', '.join(TRANSPORTS)}")
    if secure:
        transport = "tls"
    port = int(found["port"] or (DEFAULT_TLS_PORT if transport == "tls" else DEFAULT_PORT))
    if not 1 <= port <= 65535:
        raise ValueError(f"a port is 1 to 65535, not {port}")
    if not password:
        raise ValueError("a TURN server wants a password")
    return TurnServer(found["host"].strip("[]"), port, transport, user, password)
