"""The node key: made once, kept in one file, used only to sign and for the TLS certificate.

The certificate is self-signed, carries nothing but the key, and is the same bytes every time:
Ed25519 signatures are deterministic, its serial number is a hash of the key, and its dates are
fixed, because its lifetime is the key's and clocks of home machines are often wrong.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import secrets
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import NameOID

from tunnels.errors import IdentityError
from tunnels.peer import PeerId

SIGNATURE_BYTES = 64
_SIGN_PREFIX = b"mesh signature v1\x00"
_VALID_FROM = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
_VALID_UNTIL = datetime.datetime(9999, 12, 31, tzinfo=datetime.UTC)


class Identity:
    """I hold the private key. `repr` and `str` show the public half only."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.peer = PeerId(key.public_key().public_bytes_raw())
        self._certificate = _self_signed(key, self.peer)

    @classmethod
    def generate(cls) -> Identity:
        """A new identity that lives in memory only."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path) -> Identity:
        """The identity kept at `path`. Raises IdentityError: missing, unreadable, not a key."""
        try:
            pem = path.read_bytes()
        except OSError as error:
            raise IdentityError(f"cannot read the node key {path}: {error.strerror}") from error
        try:
            key = serialization.load_pem_private_key(pem, password=None)
        except Exception as error:  # odd keys raise many kinds, of OpenSSL's too
            raise IdentityError(_damaged(path)) from error
        if not isinstance(key, Ed25519PrivateKey):
            raise IdentityError(_damaged(path))
        return cls(key)

    @classmethod
    def load_or_create(cls, path: Path) -> Identity:
        """The identity kept at `path`, made there (0600, atomically) when there is none.

        A damaged file raises IdentityError: replacing it silently would make the node
        somebody else for everyone who knows it.
        """
        if path.exists():
            return cls.load(path)
        identity = cls.generate()
        try:
            identity._save(path)
        except FileExistsError:
            return cls.load(path)  # another process was first: its key is the node's
        except OSError as error:
            raise IdentityError(
                f"cannot write the node key {path}: {error.strerror}; "
                "check that its folder exists and is writable"
            ) from error
        return identity

    def sign(self, label: str, payload: bytes) -> bytes:
        """64 bytes over (label, payload). The label keeps one use's signatures out of another."""
        return self._key.sign(_signed_bytes(label, payload))

    @property
    def tls_key(self) -> Ed25519PrivateKey:
        return self._key

    @property
    def certificate(self) -> x509.Certificate:
        return self._certificate

    @property
    def certificate_hash(self) -> bytes:
        """SHA-256 of the certificate's DER bytes."""
        return certificate_hash(self._certificate)

    def __repr__(self) -> str:
        return f"Identity({self.peer.short})"

    def _save(self, path: Path) -> None:
        pem = self._key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(pem)
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, path)  # unlike rename, never replaces a key already there
        finally:
            temporary.unlink()
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def verify(peer: PeerId, label: str, payload: bytes, signature: bytes) -> bool:
    """True when `signature` is `peer`'s over (label, payload)."""
    try:
        key = Ed25519PublicKey.from_public_bytes(peer.key)
        key.verify(signature, _signed_bytes(label, payload))
    except (InvalidSignature, ValueError):
        return False
    return True


def certificate_hash(certificate: x509.Certificate) -> bytes:
    return hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).digest()


def certificate_peer(certificate: x509.Certificate) -> PeerId | None:
    """The PeerId whose key the certificate carries; None for any other kind of key."""
    try:
        key = certificate.public_key()
    except Exception:  # malformed keys raise many kinds; none of them is a peer
        return None
    return PeerId(key.public_bytes_raw()) if isinstance(key, Ed25519PublicKey) else None


def _signed_bytes(label: str, payload: bytes) -> bytes:
    name = label.encode("utf-8")
    return _SIGN_PREFIX + len(name).to_bytes(2, "big") + name + payload


def _damaged(path: Path) -> str:
    return (
        f"the node key {path} is damaged or not an Ed25519 key; restore it from a backup, "
        "or move it away to start as a new node (invites and grants of the old one are lost)"
    )


def _self_signed(key: Ed25519PrivateKey, peer: PeerId) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "mesh")])
    serial = int.from_bytes(hashlib.sha256(peer.key).digest()[:16], "big") >> 1 | 1
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(_VALID_FROM)
        .not_valid_after(_VALID_UNTIL)
        .sign(key, None)
    )
