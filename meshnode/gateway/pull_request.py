"""The body of a `POST …/pull`: which layers, onto which nodes. Sans-IO."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from meshnode.gateway.refusal import Refusal
from meshnode.models.facts import shown_name

MAX_PULL_BYTES = 64 * 1024
MAX_NODES = 64
MAX_NODE_CHARS = 128
"""Of a node's name or id."""
_FIELDS = {"layers", "nodes"}
_SHOWN_CHARS = 40


@dataclass(frozen=True)
class PullRequest:
    """Which layers, as the user wrote them (None: all), and on which nodes, each once (none: on
    this one)."""

    layers: str | None = None
    nodes: tuple[str, ...] = ()


def parse_pull_untrusted(body: bytes) -> PullRequest:
    """`body` is known to be a JSON object. Raises `Refusal` (400) and nothing else."""
    fields: dict[str, Any] = json.loads(body)
    if unknown := fields.keys() - _FIELDS:
        shown = ", ".join(shown_name(name)[:_SHOWN_CHARS] for name in sorted(unknown)[:3])
        raise bad_request(f"{shown} is not known: there are layers and nodes")
    layers, nodes = fields.get("layers"), fields.get("nodes")
    if layers is not None and not isinstance(layers, str):
        raise bad_request('layers is a text, like "27:52"')
    nodes = [] if nodes is None else nodes
    if not isinstance(nodes, list) or not all(isinstance(node, str) for node in nodes):
        raise bad_request('nodes is a list of names, like ["attic"]')
    if any(len(node) > MAX_NODE_CHARS for node in nodes):
        raise bad_request(f"no node's name or id is longer than {MAX_NODE_CHARS} characters")
    if len(nodes) > MAX_NODES:
        raise bad_request(f"more than {MAX_NODES} nodes at once: ask for fewer")
    return PullRequest(layers, tuple(dict.fromkeys(nodes)))


def bad_request(message: str) -> Refusal:
    return Refusal(400, "bad_request", message)
