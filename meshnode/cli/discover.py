"""`mesh discover`: who announces itself on the local network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import trio

from discovery.announcement import Announcement, parse_announcement_untrusted
from meshnode.cli.members import ask, json_option, table
from meshnode.cli.settings import home_option
from meshnode.control import NoNode
from meshnode.errors import NetworkError
from tunnels import BadFrame, PeerId, parse_peer_id_untrusted

LISTEN_S = 2.5
"""Two queries' time: what one of them missed, the other finds."""
MAX_NODES = 256


@click.command()
@home_option
@json_option
def discover(home: Path | None, as_json: bool) -> None:
    """List the nodes that announce themselves on the local network.

    What they say is signed by each, and not checked further: who is a member is proven when nodes
    connect.
    """
    names, own = _our_meshes(home)
    nodes = trio.run(listen)
    rows = [_row(node, names, own) for node in sorted(nodes, key=lambda node: node.name)]
    click.echo(json.dumps({"nodes": rows}) if as_json else _text(rows))


async def listen() -> list[Announcement]:
    """The newest word of each node that is heard within `LISTEN_S`. Raises `NetworkError`."""
    # Imported where it is used: it brings an event loop of its own along.
    from discovery.mdns import MdnsFailed, open_mdns

    found: dict[PeerId, Announcement] = {}
    try:
        async with open_mdns() as mdns, trio.open_nursery() as nursery:
            nursery.start_soon(mdns.ask)
            with trio.move_on_after(LISTEN_S):
                while True:
                    for record in await mdns.heard():
                        _take_untrusted(record, found)
                        await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
    except MdnsFailed as error:
        raise NetworkError(f"{error}; is another program alone on UDP port 5353?") from None
    return list(found.values())


def _take_untrusted(record: bytes, found: dict[PeerId, Announcement]) -> None:
    try:
        said = parse_announcement_untrusted(record)
    except BadFrame:
        return
    before = found.get(said.peer)
    if before is None and len(found) >= MAX_NODES:
        return
    if (before is None or before.seq < said.seq) and said.is_signed():
        found[said.peer] = said


def _our_meshes(home: Path | None) -> tuple[dict[bytes, str], str]:
    """Names of the meshes that this home's node is in, by id, and its own PeerId; nothing without a
    home."""
    try:
        answer = ask(home, {"op": "meshes"})
    except NoNode:
        return {}, ""
    meshes = answer["meshes"].items()
    return {parse_peer_id_untrusted(id).key: str(name) for id, name in meshes}, answer["peer"]


def _row(node: Announcement, names: Mapping[bytes, str], own: str) -> dict[str, Any]:
    meshes = {str(PeerId(mesh)): name for mesh, name in names.items() if node.is_of(mesh)}
    return {
        "name": node.name,
        "peer": str(node.peer),
        "addresses": [str(place) for place in node.places],
        "member": bool(meshes),
        "meshes": meshes,
        "version": node.version,
        "this_node": str(node.peer) == own,
    }


def _text(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return (
            "no node announces itself here: start one with `mesh worker`, without --no-mdns, "
            "on the same network"
        )
    titles = ("name", "peer", "address", "member of", "version")
    return table(titles, [_cells(row) for row in rows])


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    member_of = ", ".join(row["meshes"].values()) or "-"
    return (
        row["name"] + (" (this node)" if row["this_node"] else ""),
        row["peer"][:8],
        row["addresses"][0] if row["addresses"] else "-",
        member_of,
        row["version"],
    )
