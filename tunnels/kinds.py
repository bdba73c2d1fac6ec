"""Which kinds of links a node makes, takes, and lets streams go over."""

from __future__ import annotations

from collections.abc import Collection

from tunnels.link import LINK_KINDS

LEGS = frozenset({"tcp", "quic"})
"""What may lead to a relay."""


class Kinds:
    """I tell, of a node whose user has named `wanted`: names of LINK_KINDS."""

    def __init__(self, wanted: Collection[str]) -> None:
        if not wanted or not set(wanted) <= set(LINK_KINDS):
            raise ValueError(f"links are of these kinds: {', '.join(LINK_KINDS)}")
        self.wanted = frozenset(wanted)

    @property
    def _are_introduced(self) -> bool:
        """Whether others of its links stand only until one over these kinds does."""
        return "webrtc" in self.wanted and not self.wanted & LEGS

    @property
    def made(self) -> frozenset[str]:
        """A relay has to be reached somehow, and a WebRTC link begins over any other."""
        if self.wanted & LEGS:
            return self.wanted
        return self.wanted | LEGS | ({"relay"} if "webrtc" in self.wanted else set())

    @property
    def met_over(self) -> frozenset[str]:
        """By any peer; relays are linked to by all that are made."""
        return self.made if self._are_introduced else self.wanted

    @property
    def carriers(self) -> frozenset[str]:
        """Of streams. Over links of other kinds go those alone that introduce (session.py)."""
        return self.wanted if self._are_introduced else frozenset(LINK_KINDS)

    def __str__(self) -> str:
        return ", ".join(one for one in LINK_KINDS if one in self.wanted)
