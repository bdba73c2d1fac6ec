"""The body that asks for a pull: what it may say, and what it may not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from meshnode.gateway.pull_request import MAX_NODES, PullRequest, parse_pull_untrusted
from meshnode.gateway.refusal import Refusal


def parse(fields: dict[str, Any]) -> PullRequest:
    return parse_pull_untrusted(json.dumps(fields).encode())


@pytest.mark.parametrize(
    ("fields", "meant"),
    [
        ({}, PullRequest()),
        ({"layers": None, "nodes": None}, PullRequest()),
        ({"layers": "27:52", "nodes": []}, PullRequest("27:52")),
        ({"nodes": ["attic", "tower", "attic"]}, PullRequest(None, ("attic", "tower"))),
        ({"nodes": [f"n{at}" for at in range(MAX_NODES)]}, None),
    ],
)
def test_what_it_may_say(fields: dict[str, Any], meant: PullRequest | None) -> None:
    found = parse(fields)
    assert found == meant or (meant is None and len(found.nodes) == MAX_NODES)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"layers": 3}, "layers is a text"),
        ({"nodes": "attic"}, "nodes is a list"),
        ({"nodes": [None]}, "nodes is a list"),
        ({"nodes": [f"n{at}" for at in range(MAX_NODES + 1)]}, "64 nodes"),
        ({"nodes": ["x" * 129]}, "longer than 128"),
        ({"quickly": True, "\x1b[2J": 1}, "is not known"),
    ],
)
def test_what_makes_no_sense_is_told(fields: dict[str, Any], word: str) -> None:
    with pytest.raises(Refusal) as refused:
        parse(fields)
    assert (refused.value.status, refused.value.code) == (400, "bad_request")
    assert word in refused.value.message
    assert refused.value.message.isprintable()
