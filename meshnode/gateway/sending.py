"""An answer on its way out, for routes that send it bit by bit."""

from __future__ import annotations

from collections.abc import Mapping

import trio
from starlette.types import Message, Receive, Send


async def start_answer(send: Send, status: int, headers: Mapping[str, str]) -> None:
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await _emit(send, {"type": "http.response.start", "status": status, "headers": raw})


async def write_answer(send: Send, data: bytes, *, more: bool) -> None:
    await _emit(send, {"type": "http.response.body", "body": data, "more_body": more})


async def cancel_when_gone(receive: Receive, scope: trio.CancelScope) -> None:
    """For a task of its own: nobody works for a client that has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


async def _emit(send: Send, message: Message) -> None:
    """Shielded: a message that hypercorn has framed but not sent would tear the answer."""
    with trio.CancelScope(shield=True):
        await send(message)
