"""A real TURN server between two nodes that tell each other no address of their own."""

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
from tests.lab.webrtc import LOOPBACK, two_sides
from tunnels.errors import LinkClosed
from tunnels.turn import IceServers, TurnServer
from tunnels.webrtc import WebRtcChannel
from tunnels.webrtc_description import PlaceKind

USER, PASSWORD = "lab", "correct horse"
UP_WITHIN_S = 20.0
NOISE = bytes(range(256)) * 2048  # 512 KiB
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


@pytest.fixture(scope="module")
def coturn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coturn]:
    program = shutil.which("turnserver", path="/usr/bin:/usr/sbin:/usr/local/bin")
    require("coturn", program is not None, "needs turnserver (./just setup)")
    assert program is not None
    folder = tmp_path_factory.mktemp("coturn")
    certificate, key = write_certificate(folder)
    server = Coturn(free_port(), free_port())
    ports = ("-L", LOOPBACK, "-p", str(server.port), "--tls-listening-port", str(server.tls_port))
    files = (
        *(f"--cert={certificate}", f"--pkey={key}"),
        *(f"--userdb={folder / 'turn.db'}", f"--pidfile={folder / 'turn.pid'}"),
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program, *OPTIONS, *ports, *files], stdout=log, stderr=log)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(certificate))
        try:
            await_up(process, server, folder / "log")
            yield server
        finally:
            process.kill()
            process.wait()


def await_up(process: subprocess.Popen[bytes], server: Coturn, log: Path) -> None:
    until_s = time.monotonic() + UP_WITHIN_S
    for port in (server.port, server.tls_port):
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection((LOOPBACK, port)).close()
                break
            if process.poll() is not None or time.monotonic() > until_s:
                raise OSError(log.read_text())
            time.sleep(0.05)


@pytest.mark.parametrize("transport", ["udp", "tcp", "tls"])
async def test_bytes_cross_a_turn_server_and_nothing_else(coturn: Coturn, transport: str) -> None:
    async with two_sides(coturn.over(transport)) as links:
        await links.link()
        for link in (links.near, links.far):
            assert link.is_relayed
            assert {one.kind for one in link.stack.ice.places()} == {PlaceKind.RELAYED}
        near = await links.near.open_channel()
        near.send(b"!")
        far = await links.far.accept_channel()
        assert await far.receive() == b"!"

        async def send() -> None:
            for start in range(0, len(NOISE), 1 << 16):
                near.send(NOISE[start : start + (1 << 16)])
                await near.wait_writable()
            near.finish()

        async def read(channel: WebRtcChannel) -> bytes:
            data = b""
            while piece := await channel.receive():
                data += piece
                links.far.share.earn(len(piece))
            return data

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            assert await read(far) == NOISE


async def test_a_wrong_password_is_a_sentence_that_does_not_hold_it(coturn: Coturn) -> None:
    wrong = "battery staple"
    async with two_sides(coturn.over("udp", wrong)) as links:
        with pytest.raises(LinkClosed, match="refused its user and password") as error:
            await links.alice.dial(links.bob)
        assert wrong not in repr(error.value)


async def test_a_certificate_that_is_not_trusted_is_not_spoken_to(
    coturn: Coturn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other, _ = write_certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(other))
    async with two_sides(coturn.over("tls")) as links:
        with pytest.raises(LinkClosed, match="no address"):
            await links.alice.dial(links.bob)
