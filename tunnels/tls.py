"""TLS 1.3 of one connection as bytes in, bytes out; who moves the bytes is up to the owner.

The engine never touches a socket: trio drives it over real or imagined sockets, and the thread of
express.py over a real one, without a change of hands in between. It also never waits, so that one
thread may hold its lock for as long as a call takes (OpenSSL forbids two at once).

The listener shows its node key's certificate and the dialler pins it; the dialler shows none, both
prove their keys inside (handshake.py). There are no tickets, hence no resumption and no early data.
TLS's own end (close_notify) is not used: the layers above say each end themselves.
"""

from __future__ import annotations

import os
import secrets
import ssl
import tempfile

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from tunnels.errors import LinkClosed, ListenFailed
from tunnels.identity import Identity

ALPN = "mesh/1"
READ_BYTES = 64 << 10


def listener_context(identity: Identity) -> ssl.SSLContext:
    """For whoever connects to us. Takes tens of milliseconds: make one a node.

    Raises ListenFailed.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0
    try:
        _load(context, identity)
    except OSError as error:
        folder = tempfile.gettempdir()
        raise ListenFailed(
            f"cannot write to {folder}, where TLS takes its key from: {error.strerror}; make room, "
            "or name another folder in TMPDIR"
        ) from error
    return _strict(context)


def dialler_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the key is pinned instead, by the transport
    return _strict(context)


def _strict(context: ssl.SSLContext) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_COMPRESSION
    context.set_alpn_protocols([ALPN])
    return context


def _load(context: ssl.SSLContext, identity: Identity) -> None:
    """Python's ssl takes a key from a file only: for that moment it is there, encrypted."""
    password = secrets.token_hex(32)
    key = identity.tls_key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(password.encode("ascii")),
    )
    certificate = identity.certificate.public_bytes(serialization.Encoding.PEM)
    descriptor, path = tempfile.mkstemp(prefix="mesh-tls-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(key + certificate)
        context.load_cert_chain(path, password=password)
    finally:
        os.unlink(path)


class Tls:
    """I am one end of one connection. After each call `outgoing` may have bytes to send."""

    def __init__(self, context: ssl.SSLContext, *, listens: bool) -> None:
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_side=listens)
        self.established = False
        self.broken = False  # what came is not what the other end sent

    def feed(self, data: bytes | memoryview) -> None:
        """Bytes came in from the network."""
        self._incoming.write(data)

    def shake_hands(self) -> None:
        """Go on with the TLS handshake. Raises LinkClosed when it cannot succeed."""
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            return
        except (ssl.SSLError, ValueError) as error:
            self.broken = True
            raise LinkClosed(f"the TLS handshake failed: {_why(error)}") from error
        if self._object.selected_alpn_protocol() != ALPN:
            raise LinkClosed("the TLS handshake failed: the other side speaks another protocol")
        self.established = True

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Encrypt all of `data`."""
        try:
            self._object.write(data)
        except ssl.SSLError as error:
            raise LinkClosed(f"the connection broke: {_why(error)}") from error

    def outgoing(self) -> bytes:
        """All there is to send."""
        return self._outgoing.read()

    def read(self) -> bytes:
        """Up to READ_BYTES that arrived; b"" when there is nothing whole yet."""
        pieces: list[bytes] = []
        left = READ_BYTES
        while left > 0:
            try:
                piece = self._object.read(left)
            except ssl.SSLWantReadError:
                break
            except ssl.SSLError as error:
                if not pieces:
                    self.broken = True
                    raise LinkClosed(f"the connection broke: {_why(error)}") from error
                break  # what came before it counts; the error comes again
            if not piece:
                break  # a close_notify, of no meaning here: the connection itself ends next
            pieces.append(piece)
            left -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def read_into(self, view: memoryview) -> int:
        """All that arrived, as far as `view` goes."""
        filled, incoming, connection = 0, self._incoming, self._object
        try:
            # Asking once more than there are records costs an exception, which is dear.
            while incoming.pending or connection.pending():
                room = len(view) - filled
                count = connection.read(room, view[filled:] if filled else view) if room else 0
                if not count:
                    break
                filled += int(count)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            if not filled:
                self.broken = True
                raise LinkClosed(f"the connection broke: {_why(error)}") from error
        return filled

    @property
    def peer_certificate(self) -> x509.Certificate | None:
        """What the other side showed; None for none, or for one that cannot be read."""
        der = self._object.getpeercert(binary_form=True)
        try:
            return x509.load_der_x509_certificate(der) if der else None
        except ValueError:
            return None

    @property
    def fingerprint(self) -> bytes:
        """The same for both ends of this connection, and for no other: the dialler's Finished,
        which covers both sides' randomness and keys (RFC 8446 section 4.4.4)."""
        finished = self._object.get_channel_binding("tls-unique")
        if not finished:
            raise LinkClosed("the connection broke: it has no fingerprint")
        return finished


def _why(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    return str(reason or error).lower().replace("_", " ")
