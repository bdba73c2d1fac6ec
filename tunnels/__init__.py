"""Authenticated byte streams between two PeerIds, over whatever works."""

from tunnels.blocking import BlockingEnd, as_socket
from tunnels.changes import Change, SessionDown, SessionUp
from tunnels.dial import AddressPolicy
from tunnels.endpoint import Endpoint
from tunnels.errors import (
    BadFrame,
    DialFailed,
    HandshakeFailed,
    IdentityError,
    LinkClosed,
    ListenFailed,
    SessionClosed,
    StreamError,
    StreamLost,
    StreamRefused,
    StreamReset,
    TunnelError,
    WrongPeer,
)
from tunnels.forward import ForwardFailed, connect_and_splice, listen_and_forward
from tunnels.identity import Identity, verify
from tunnels.peer import Candidate, PeerId, parse_peer_id_untrusted
from tunnels.redial import SessionBack, SessionSilent
from tunnels.session import Session
from tunnels.stats import LinkStats, SessionStats
from tunnels.stream import Stream

__all__ = [
    "AddressPolicy",
    "BadFrame",
    "BlockingEnd",
    "Candidate",
    "Change",
    "DialFailed",
    "Endpoint",
    "ForwardFailed",
    "HandshakeFailed",
    "Identity",
    "IdentityError",
    "LinkClosed",
    "LinkStats",
    "ListenFailed",
    "PeerId",
    "Session",
    "SessionBack",
    "SessionClosed",
    "SessionDown",
    "SessionSilent",
    "SessionStats",
    "SessionUp",
    "Stream",
    "StreamError",
    "StreamLost",
    "StreamRefused",
    "StreamReset",
    "TunnelError",
    "WrongPeer",
    "as_socket",
    "connect_and_splice",
    "listen_and_forward",
    "parse_peer_id_untrusted",
    "verify",
]
