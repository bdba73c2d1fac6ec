"""What can go wrong in a tunnel. Every message is one sentence that says what to do."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tunnels.peer import Candidate, PeerId


class TunnelError(Exception):
    """Root of everything this package raises on purpose."""


class IdentityError(TunnelError):
    """The node's key file cannot be used."""


class ListenFailed(TunnelError):
    """The node's port could not be opened."""


class BadFrame(TunnelError):
    """Bytes from outside do not follow the wire format. The only error of `parse_*_untrusted`."""


class HandshakeFailed(TunnelError):
    """The other side did not prove who it is, or speaks another version."""


class WrongPeer(HandshakeFailed):
    """Someone else answers at the address."""

    def __init__(self, expected: PeerId, found: PeerId | None) -> None:
        self.expected = expected
        self.found = found
        who = f"{found.short} answers there" if found else "another kind of key answers there"
        super().__init__(
            f"wrong key: {who}, not {expected.short}; the address now belongs to another node, "
            "ask for a fresh invite"
        )


class LinkClosed(TunnelError):
    """The link is gone; its channels with it."""


class Refused(LinkClosed):
    """The machine is there, and nobody listens on that port of it."""


class DialFailed(TunnelError):
    """No candidate led to the peer.

    `failures` pairs each candidate tried with the sentence why it failed, in order of trial.
    unheard: those that nothing came back from, not even a refusal: a NAT or a firewall may be
    between.
    """

    def __init__(
        self,
        peer: PeerId,
        failures: Sequence[tuple[Candidate, str]],
        unheard: Collection[Candidate] = (),
    ) -> None:
        self.peer = peer
        self.failures = tuple(failures)
        self.unheard = tuple(unheard)
        if self.failures:
            tried = "; ".join(f"{candidate}: {why}" for candidate, why in self.failures)
            text = f"cannot reach {peer.short}; tried {tried}"
        else:
            text = (
                f"cannot reach {peer.short}: no address is known for it; ask it for a fresh invite"
            )
        super().__init__(text)


class PunchFailed(TunnelError):
    """No direct path to a peer was found through the NATs between; a relay goes on carrying."""


class SessionClosed(TunnelError):
    """The session has ended; connect again."""


class StreamError(TunnelError):
    """A stream cannot go on. Raised by every read and write from then on."""


class StreamRefused(StreamError):
    """The other side does not offer this service to us."""


class StreamReset(StreamError):
    """One side gave the stream up; the message is its reason."""


class StreamLost(StreamError):
    """The session under the stream died, or the peer restarted."""
