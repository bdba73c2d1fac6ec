"""The outermost layer of the gateway's application: who comes in, and how an answer leaves."""

from __future__ import annotations

import trio
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from meshnode.gateway.refusal import Refusal
from meshnode.gateway.rules import HostRule, is_own_origin

LINGER_S = 5.0


class Door:
    """I turn away strangers, and let nobody miss the answer while still sending a body.

    An early answer (413, say) must reach a client that is still sending: the rest of its body is
    read and thrown away for up to `LINGER_S` before the connection is closed, else the kernel
    resets it and the answer is lost. It also keeps hypercorn's queue of body messages, which
    blocks when full, from blocking the answer itself.
    """

    def __init__(self, app: ASGIApp, rule: HostRule) -> None:
        self._app = app
        self._rule = rule

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
            return
        body = _BodyWatch(receive)

        async def send_politely(message: Message) -> None:
            if message["type"] == "http.response.start":
                _add_safety_headers(message)
            last = message["type"] == "http.response.body" and not message.get("more_body", False)
            if last and not body.done:
                await send({**message, "more_body": True})
                await _drain_then_end(body, send)
            else:
                await send(message)

        refusal = self._refuse(Headers(scope=scope))
        app = refusal.response() if refusal else self._app
        await app(scope, body.receive, send_politely)

    def _refuse(self, headers: Headers) -> Refusal | None:
        host = headers.get("host", "")
        if not self._rule.allows(host):
            return Refusal(
                403,
                "forbidden_host",
                f"the Host header {host[:100]!r} is not a name of this gateway: use localhost or "
                "127.0.0.1, or start with `--http NAME:PORT` to bind that name",
            )
        origins = headers.getlist("origin")
        if not all(is_own_origin(origin, host) for origin in origins):
            return Refusal(
                403,
                "forbidden_origin",
                f"web pages of {', '.join(origins)[:100]!r} may not use this gateway: only its "
                "own origin may",
            )
        return None


class _BodyWatch:
    """I see whether the request has been read to its end."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.done = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            self.done = True
        return message


async def _drain_then_end(body: _BodyWatch, send: Send) -> None:
    drained = trio.Event()

    async def drain() -> None:
        while not body.done:
            await body.receive()
        drained.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(drain)
        with trio.move_on_after(LINGER_S):
            await drained.wait()
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        nursery.cancel_scope.cancel()


def _add_safety_headers(start: Message) -> None:
    """No other origin may read, embed or run what we answer, even where CORS does not apply."""
    headers = MutableHeaders(raw=list(start.get("headers", [])))
    headers["x-content-type-options"] = "nosniff"
    headers["cross-origin-resource-policy"] = "same-origin"
    start["headers"] = headers.raw
