"""A real TURN server between two nodes that tell each other no address of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.lab.turn import Coturn, coturn_on_loopback, write_certificate
from tests.lab.webrtc import two_sides
from tunnels.errors import LinkClosed
from tunnels.webrtc import WebRtcChannel
from tunnels.webrtc_description import PlaceKind

NOISE = bytes(range(256)) * 2048  # 512 KiB


@pytest.fixture(scope="module")
def coturn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coturn]:
    with coturn_on_loopback(tmp_path_factory.mktemp("coturn")) as server:
        yield server


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
