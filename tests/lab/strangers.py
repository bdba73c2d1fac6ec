"""What somebody without a key says to a node."""

from __future__ import annotations

from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection


def first_initial() -> bytes:
    """The first datagram of a new QUIC connection to a mesh node."""
    quic = QuicConnection(
        configuration=QuicConfiguration(is_client=True, alpn_protocols=["mesh/1"])
    )
    quic.connect(("peer", 0), now=0.0)
    return quic.datagrams_to_send(now=0.0)[0][0]
