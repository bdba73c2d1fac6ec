"""What a tunnel promises holds over every kind of link: each test that says nothing else runs over
each of them."""

from __future__ import annotations

import pytest

from tests.lab import nodes

KINDS = ("quic", "tcp")
through_a_relay_too = pytest.mark.parametrize("link_kind", [*KINDS, "relay"], indirect=True)
over_quic = pytest.mark.parametrize("link_kind", ["quic"], indirect=True)
over_tcp = pytest.mark.parametrize("link_kind", ["tcp"], indirect=True)


@pytest.fixture(params=KINDS)
def link_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kind of the links between `two_nodes`."""
    kind = str(request.param)
    monkeypatch.setattr(nodes, "KINDS", (kind,))
    return kind
