"""The machines of a running node's mesh, as its `node.sock` tells them to `mesh plan`. Sans-IO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from meshnode.errors import BadMessage
from meshnode.models.spans import Span
from meshnode.pipeline.plan import PlanDevice, PlanNode
from meshnode.pipeline.speeds import ASSUMED_LINK, Link, Links, speed_of
from meshnode.pipeline.what_if import WhatIf

NOTHING: Mapping[str, Sequence[Span]] = {}


def machines_row(
    nodes: Sequence[PlanNode], links: Links, held: Mapping[str, Sequence[Span]] = NOTHING
) -> dict[str, Any]:
    """JSON-ready: the local node and those that lend, and the ways between them. `held`: by node,
    what it holds of the model that is planned for."""
    return {
        "machines": [
            {
                "name": node.name,
                "local": node.is_local,
                "rtt_ms": None if node.rtt_s is None else round(node.rtt_s * 1000, 3),
                "bytes_per_s": node.bytes_per_s,
                "held": [[one.file_index, one.start, one.stop] for one in held.get(node.name, ())],
                "devices": [
                    {
                        "name": one.name,
                        "usable_bytes": one.usable_bytes,
                        "gpu": one.is_gpu,
                        "speed": one.measured.to_row() if one.measured else None,
                    }
                    for one in node.devices
                ],
            }
            for node in nodes
        ],
        "links": [
            {
                "from": start,
                "to": end,
                "rtt_ms": round(link.rtt_s * 1000, 3),
                "bytes_per_s": round(link.bytes_per_s),
                "measured": link.is_measured,
                "age_s": round(link.age_s),
            }
            for (start, end), link in sorted(links.pairs.items())
        ],
        "parted": sorted(links.parted),
    }


def read_machines(answer: Mapping[str, Any]) -> WhatIf:
    """What `machines_row` made. Raises `BadMessage` for what another version of mesh said."""
    try:
        nodes = tuple(
            PlanNode(
                row["name"],
                bool(row["local"]),
                tuple(
                    PlanDevice(
                        *(one["name"], int(one["usable_bytes"]), bool(one["gpu"])),
                        measured=speed_of(one.get("speed")),
                    )
                    for one in row["devices"]
                ),
                row["bytes_per_s"],
                None if row["rtt_ms"] is None else row["rtt_ms"] / 1000,
            )
            for row in answer["machines"]
        )
        links = Links(
            {
                (row["from"], row["to"]): Link(
                    row["rtt_ms"] / 1000,
                    float(row["bytes_per_s"]),
                    bool(row["measured"]),
                    float(row["age_s"]),
                )
                for row in answer["links"]
            },
            parted=frozenset((one, other) for one, other in answer["parted"]),
        )
        held = {
            row["name"]: tuple(Span(*map(int, one)) for one in row.get("held", ()))
            for row in answer["machines"]
        }
    except (KeyError, TypeError, ValueError) as error:
        raise BadMessage(
            "the running node did not say what machines there are: is it of another version? "
            "Start it again"
        ) from error
    return WhatIf(nodes, links, {}, frozenset(), held)


def links_of(nodes: Sequence[PlanNode]) -> Links:
    """What is known of the ways between the local node and the others: round trips."""
    local = next(node.name for node in nodes if node.is_local)
    pairs = {}
    for node in nodes:
        if node.is_local or node.rtt_s is None:
            continue
        rate = node.bytes_per_s or ASSUMED_LINK.bytes_per_s
        pairs[local, node.name] = pairs[node.name, local] = Link(
            node.rtt_s, rate, is_measured=False
        )
    return Links(pairs)
