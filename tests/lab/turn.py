"""A real TURN server on loopback: coturn."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.conftest import require
from tests.lab.webrtc import LOOPBACK
from tunnels.binding import Address
from tunnels.turn import IceServers, TurnServer

USER, PASSWORD = "lab", "correct horse"
UP_WITHIN_S = 20.0
OPTIONS = (
    *("-n", "--no-cli", "-a", "-r", "lab", "-u", f"{USER}:{PASSWORD}", "-m", "1"),
    *("--allow-loopback-peers", "--log-file=stdout", "--no-dtls"),
)


@dataclass
class Coturn:
    port: int
    tls_port: int

    def over(self, transport: str, password: str = PASSWORD) -> IceServers:
        port = self.tls_port if transport == "tls" else self.port
        server = TurnServer(LOOPBACK, port, transport, USER, password)
        return IceServers(turn=server, relay_only=True)


def is_taken(place: Address) -> bool:
    """Whether somebody on this machine, a TURN server say, has a socket of UDP there."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(place)
        except OSError:
            return True
    return False


async def until_free(place: Address) -> None:
    while is_taken(place):  # noqa: ASYNC110 - no system tells
        await trio.sleep(0.02)


def write_certificate(folder: Path) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "turn lab")])
    now = datetime.datetime.now(tz=datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(LOOPBACK))]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    pem, none = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, pem, none))
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return folder / "cert.pem", folder / "key.pem"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def coturn_on_loopback(folder: Path, *more: str) -> Iterator[Coturn]:
    """Its certificate is trusted while the block lasts. more: options of coturn's."""
    program = shutil.which("turnserver", path="/usr/bin:/usr/sbin:/usr/local/bin")
    require("coturn", program is not None, "needs turnserver (./just setup)")
    assert program is not None
    certificate, key = write_certificate(folder)
    server = Coturn(free_port(), free_port())
    ports = ("-L", LOOPBACK, "-p", str(server.port), "--tls-listening-port", str(server.tls_port))
    files = (
        *(f"--cert={certificate}", f"--pkey={key}"),
        *(f"--userdb={folder / 'turn.db'}", f"--pidfile={folder / 'turn.pid'}"),
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [program, *OPTIONS, *ports, *files, *more], stdout=log, stderr=log
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(certificate))
        try:
            _await_up(process, server, folder / "log")
            yield server
        finally:
            process.kill()
            process.wait()


def _await_up(process: subprocess.Popen[bytes], server: Coturn, log: Path) -> None:
    until_s = time.monotonic() + UP_WITHIN_S
    for port in (server.port, server.tls_port):
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection((LOOPBACK, port)).close()
                break
            if process.poll() is not None or time.monotonic() > until_s:
                raise OSError(log.read_text())
            time.sleep(0.05)
