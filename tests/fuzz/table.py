"""Every parser of bytes from outside. A new one is a row in one of these modules."""

from __future__ import annotations

from tests.fuzz import (
    discovery_parsers,
    gateway_parsers,
    gossip_parsers,
    mdns_parsers,
    members_parsers,
    meshnode_parsers,
    model_parsers,
    portmap_parsers,
    probe_parsers,
    pulls_parsers,
    quic_parsers,
    ring_parsers,
    store_parsers,
    tunnels_parsers,
    webrtc_parsers,
)
from tests.fuzz.parser import Parser

PARSERS: dict[str, Parser] = {
    parser.name: parser
    for module in (
        *(tunnels_parsers, probe_parsers, quic_parsers, webrtc_parsers),
        *(discovery_parsers, mdns_parsers, portmap_parsers),
        *(members_parsers, gossip_parsers, meshnode_parsers, model_parsers),
        *(ring_parsers, store_parsers, gateway_parsers, pulls_parsers),
    )
    for parser in module.PARSERS
}


def folder_name(name: str) -> str:
    """Where a parser's regressions lie below `tests/fuzz/regressions`."""
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())
