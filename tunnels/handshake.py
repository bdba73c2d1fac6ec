"""Mutual proof of identity inside an encrypted link.

    dialler                                listener
    HELLO (me, nonce, epoch)  ------------>
                              <------------ HELLO (me, nonce, epoch), PROOF
    PROOF                     ------------>
                              <------------ READY

Each PROOF signs, under LABEL, one transcript: the signer's role, the link's kind, both HELLOs as
sent (so both PeerIds, both nonces, both epochs) and the link's binding (for QUIC and TLS the
SHA-256 of the listener's certificate as each side saw it). A proof of another link, the other
role or another run of this link therefore verifies nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from tunnels.errors import HandshakeFailed, WrongPeer
from tunnels.frames import VERSION, Hello, Proof, Ready, Record, encode
from tunnels.peer import PeerId

LABEL = "mesh/1 link proof"


class Role(Enum):
    DIALLER = "dialler"
    LISTENER = "listener"

    @property
    def other(self) -> Role:
        return Role.LISTENER if self is Role.DIALLER else Role.DIALLER


@dataclass(frozen=True)
class Proven:
    """What the handshake established about the other side."""

    peer: PeerId
    epoch: bytes
    window_bytes: int


class _State(Enum):
    HELLO = "awaiting HELLO"
    PROOF = "awaiting PROOF"
    READY = "awaiting READY"
    DONE = "done"


_EXPECTED: dict[_State, type] = {_State.HELLO: Hello, _State.PROOF: Proof, _State.READY: Ready}


class Handshake:
    """I run one side. Records go in, records to send come out; `proven` is set at the end.

    expect: the only PeerId accepted, or None (a listener takes whoever proves a key).
    binding: what ties the proof to this encrypted link.
    sign(label, payload), verify(peer, label, payload, signature): as in identity.py.
    """

    def __init__(
        self,
        role: Role,
        hello: Hello,
        *,
        expect: PeerId | None,
        binding: bytes,
        sign: Callable[[str, bytes], bytes],
        verify: Callable[[PeerId, str, bytes, bytes], bool],
    ) -> None:
        self._role = role
        self._mine = hello
        self._theirs: Hello | None = None
        self._expect = expect
        self._binding = binding
        self._sign = sign
        self._verify = verify
        self._state = _State.HELLO
        self.proven: Proven | None = None

    def start(self) -> list[Record]:
        """What to send before anything is received."""
        return [self._mine] if self._role is Role.DIALLER else []

    def receive(self, record: Record) -> list[Record]:
        """Take one record; returns those to send. Raises HandshakeFailed (WrongPeer)."""
        if not isinstance(record, _EXPECTED.get(self._state, ())):
            raise HandshakeFailed(
                f"the handshake broke: {type(record).__name__} while {self._state.value}"
            )
        match record:
            case Hello():
                return self._receive_hello(record)
            case Proof():
                return self._receive_proof(record)
            case _:
                return self._finish()

    def _receive_hello(self, hello: Hello) -> list[Record]:
        if hello.version != VERSION:
            raise HandshakeFailed(
                f"the other side speaks version {hello.version} of the tunnel, we speak "
                f"{VERSION}; update the older of the two"
            )
        if hello.kind != self._mine.kind:
            raise HandshakeFailed("the handshake broke: it was made for another kind of link")
        if self._expect is not None and hello.peer != self._expect:
            raise WrongPeer(self._expect, hello.peer)
        if hello.peer == self._mine.peer:
            raise HandshakeFailed("this address leads back to this very node")
        self._theirs = hello
        self._state = _State.PROOF
        return [self._mine, self._proof()] if self._role is Role.LISTENER else []

    def _receive_proof(self, proof: Proof) -> list[Record]:
        assert self._theirs is not None
        payload = self._transcript(self._role.other)
        if not self._verify(self._theirs.peer, LABEL, payload, proof.signature):
            raise HandshakeFailed(
                "the other side could not prove its key: someone may be in the middle"
            )
        if self._role is Role.DIALLER:
            self._state = _State.READY
            return [self._proof()]
        return [Ready(), *self._finish()]

    def _finish(self) -> list[Record]:
        assert self._theirs is not None
        self._state = _State.DONE
        self.proven = Proven(self._theirs.peer, self._theirs.epoch, self._theirs.window_bytes)
        return []

    def _proof(self) -> Proof:
        return Proof(self._sign(LABEL, self._transcript(self._role)))

    def _transcript(self, signer: Role) -> bytes:
        assert self._theirs is not None
        dialler, listener = self._mine, self._theirs
        if self._role is Role.LISTENER:
            dialler, listener = listener, dialler
        fields = (
            signer.value.encode("ascii"),
            self._mine.kind.encode("utf-8"),
            encode(dialler),
            encode(listener),
            self._binding,
        )
        return b"".join(len(field).to_bytes(4, "big") + field for field in fields)
