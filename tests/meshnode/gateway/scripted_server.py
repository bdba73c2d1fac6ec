"""A real HTTP server on a unix socket that answers by a script: it stalls, tears, dies on cue."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import h11
import trio

STREAM_HEADERS = [
    ("content-type", "text/event-stream"),
    ("transfer-encoding", "chunked"),
    ("access-control-allow-origin", "*"),
    ("server", "llama.cpp"),
]


class Visit:
    """One request, and the means to answer it piece by piece."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._http = h11.Connection(h11.SERVER)
        self.target = ""
        self.headers: dict[str, str] = {}
        self.body = bytearray()

    async def read_request(self) -> None:
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                self._http.receive_data(await self._stream.receive_some())
            elif isinstance(event, h11.Request):
                self.target = event.target.decode()
                self.headers = {name.decode(): value.decode() for name, value in event.headers}
            elif isinstance(event, h11.Data):
                self.body += event.data
            else:
                return

    async def start(
        self, status: int = 200, headers: list[tuple[str, str]] = STREAM_HEADERS
    ) -> None:
        await self._send(h11.Response(status_code=status, headers=headers))

    async def write(self, data: bytes) -> None:
        await self._send(h11.Data(data=data))

    async def end(self) -> None:
        await self._send(h11.EndOfMessage())

    async def answer_json(self, status: int, value: object) -> None:
        data = json.dumps(value).encode()
        headers = [
            ("content-type", "application/json; charset=utf-8"),
            ("content-length", str(len(data))),
            ("access-control-allow-origin", "*"),
        ]
        await self.start(status, headers)
        await self.write(data)
        await self.end()

    async def raw(self, data: bytes) -> None:
        await self._stream.send_all(data)

    async def client_closes(self) -> None:
        """Returns when the other side has closed the connection."""
        with suppress(trio.BrokenResourceError):
            while await self._stream.receive_some():
                pass

    async def _send(self, event: h11.Event) -> None:
        await self._stream.send_all(self._http.send(event) or b"")


Script = Callable[[Visit], Awaitable[None]]


@asynccontextmanager
async def scripted_server(folder: Path, script: Script) -> AsyncIterator[Path]:
    """Runs `script` for each request; the connection breaks off where the script returns."""
    path = folder / "llama.sock"
    sock = trio.socket.socket(trio.socket.AF_UNIX)
    await sock.bind(str(path))
    sock.listen()

    async def visit(stream: trio.SocketStream) -> None:
        async with stream:
            conversation = Visit(stream)
            with suppress(trio.BrokenResourceError):  # the gateway may hang up at any point
                await conversation.read_request()
                await script(conversation)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, visit, [trio.SocketListener(sock)])
        yield path
        nursery.cancel_scope.cancel()
