"""Offers swapped with a peer over the session with it: the service `paths`."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import trio
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tunnels.allowance import Rate
from tunnels.errors import BadFrame, TunnelError
from tunnels.gate import ServiceLimits
from tunnels.handshake import Role
from tunnels.meeting import Nats
from tunnels.offers import (
    LENGTH,
    MAX_OFFER_BYTES,
    NONCE_BYTES,
    Offer,
    Want,
    encode,
    parse_untrusted,
)
from tunnels.peer import Candidate, PeerId
from tunnels.session import Session
from tunnels.stream import Stream

SERVICE = "paths"
SWAP_TIMEOUT_S = 10.0  # between two that are connected already, over any relay
LIMITS = ServiceLimits(
    peer_streams=1, streams=32, peer_rate=Rate(0.2, burst=6), rate=Rate(8, burst=64)
)
"""Each swap makes both sides send probes to addresses that the other names."""
_KEY_CONTEXT = b"mesh paths 1"
_KEY_BYTES = 32


@dataclass(frozen=True)
class Ourselves:
    """What we offer."""

    candidates: Sequence[Candidate]
    nats: Nats = Nats()  # noqa: RUF009 - frozen


@dataclass(frozen=True)
class Swap:
    """Both offers, and what the probes between the two are sealed with. role: who asked dials."""

    peer: PeerId
    role: Role
    mine: Offer
    theirs: Offer
    key: bytes

    def __repr__(self) -> str:
        return f"Swap({self.peer.short}, {self.role.name})"


class Exchange:
    """I swap offers, at our wish or at a peer's.

    us: what we offer now. follow: what is to be done about a swap that a peer began.
    """

    def __init__(
        self,
        us: Callable[[], Ourselves],
        follow: Callable[[Swap], Awaitable[None]],
    ) -> None:
        self._us = us
        self._follow = follow

    async def ask(self, session: Session, want: Want) -> Swap:
        """Raises TunnelError: the peer does not want to, or said nothing that makes sense."""
        mine, private = self._offer(want)
        try:
            with trio.fail_after(SWAP_TIMEOUT_S):
                stream = await session.open(SERVICE)
                try:
                    await stream.send_all(encode(mine))
                    await stream.send_eof()
                    theirs = await _receive_untrusted(stream)
                finally:
                    with trio.CancelScope(shield=True):
                        await stream.aclose()
        except trio.TooSlowError:
            raise TunnelError(f"the peer made no offer in {SWAP_TIMEOUT_S:.0f} s") from None
        return _swap(session.peer, Role.DIALLER, mine, theirs, private)

    async def serve(self, stream: Stream) -> None:
        """The side that is asked. Raises BadFrame, StreamError."""
        with trio.move_on_after(SWAP_TIMEOUT_S) as patience:
            theirs = await _receive_untrusted(stream)
            mine, private = self._offer(theirs.want)
            swap = _swap(stream.peer, Role.LISTENER, mine, theirs, private)
            await stream.send_all(encode(mine))
            await stream.send_eof()
        if patience.cancelled_caught:
            stream.reset("no offer came")
            return
        await self._follow(swap)

    def _offer(self, want: Want) -> tuple[Offer, X25519PrivateKey]:
        private, us = X25519PrivateKey.generate(), self._us()
        offer = Offer(
            nonce=secrets.token_bytes(NONCE_BYTES),
            public_key=private.public_key().public_bytes_raw(),
            nat_v4=us.nats.v4,
            nat_v6=us.nats.v6,
            want=want,
            candidates=tuple(us.candidates),
        )
        return offer, private


def _swap(peer: PeerId, role: Role, mine: Offer, theirs: Offer, private: X25519PrivateKey) -> Swap:
    try:
        secret = private.exchange(X25519PublicKey.from_public_bytes(theirs.public_key))
    except ValueError as error:  # a key of small order: RFC 7748 section 6.1
        raise BadFrame("the key of an offer is none") from error
    nonces = mine.nonce + theirs.nonce if role is Role.DIALLER else theirs.nonce + mine.nonce
    key = HKDF(SHA256(), _KEY_BYTES, salt=nonces, info=_KEY_CONTEXT).derive(secret)
    return Swap(peer, role, mine, theirs, key)


async def _receive_untrusted(stream: Stream) -> Offer:
    """Raises BadFrame, StreamError."""
    data = bytearray()
    while len(data) < LENGTH.size or len(data) < LENGTH.size + _length(data):
        piece = await stream.receive_some(MAX_OFFER_BYTES)
        if not piece:
            raise BadFrame("an offer ends too early")
        data += piece
    return parse_untrusted(bytes(data[LENGTH.size : LENGTH.size + _length(data)]))


def _length(data: bytearray) -> int:
    length: int = LENGTH.unpack_from(data)[0]
    if length > MAX_OFFER_BYTES:
        raise BadFrame(f"an offer has {MAX_OFFER_BYTES} bytes at most")
    return length
