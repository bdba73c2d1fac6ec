"""One request passed on to llama-server, and its answer passed back."""

from __future__ import annotations

import json
import logging
from enum import Enum

import trio
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from meshnode.gateway.body import BodyRoom, read_body, read_json_body
from meshnode.gateway.events import EventGate, Timings, find_timings
from meshnode.gateway.refusal import Refusal
from meshnode.gateway.routes import Passed
from meshnode.gateway.upstream import (
    Answer,
    UpstreamBroken,
    UpstreamRequest,
    UpstreamUnreachable,
    open_answer,
)
from meshnode.gateway.view import Health, NodeView, Stage, Upstream

DEFAULT_RETRY_AFTER_S = 5
VERDICT_TIMEOUT_S = 5.0

_PASSED_HEADERS = ("content-type", "cache-control")
_log = logging.getLogger(__name__)


def not_ready(health: Health) -> Refusal:
    """The 503 of a node with no model to answer: what is going on, and when to ask again."""
    message = health.message
    if health.stage is Stage.READY:
        message = "the model's server has just stopped: see the node's own output"
    return Refusal(503, "not_ready", message, retry_headers(health))


def retry_headers(health: Health) -> dict[str, str]:
    wait_s = DEFAULT_RETRY_AFTER_S if health.retry_after_s is None else health.retry_after_s
    return {"retry-after": str(wait_s)}


class Relay:
    """I pass one route on: the ASGI application of a `Passed` entry.

    Three ends are watched at once. The client's: when it leaves, the connection to llama-server is
    closed, and with it the generation. The node's word that a worker or the server is gone. The
    server's own end of the answer.
    """

    def __init__(self, route: Passed, view: NodeView, room: BodyRoom) -> None:
        self._route = route
        self._view = view
        self._room = room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        self._present_upstream()  # no use in taking a long body while nothing is ready
        read = read_json_body if self._route.method == "POST" else read_body
        with self._room.place() as place:
            body = await read(request, place)
            refusal = await self._exchange(body, receive, send)
        if refusal:
            raise refusal

    async def _exchange(self, body: bytes, receive: Receive, send: Send) -> Refusal | None:
        upstream = self._present_upstream()
        refusal: Refusal | None = None
        self._view.begin_request()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_when_gone, receive, nursery.cancel_scope)
                exchange = _Exchange(self._route, self._view, upstream, send)
                refusal = await exchange.run(body)
                nursery.cancel_scope.cancel()
        finally:
            self._view.end_request()
        return refusal

    def _present_upstream(self) -> Upstream:
        health, upstream = self._view.health(), self._view.upstream()
        if health.stage is Stage.LENDING:
            raise Refusal(501, "not_served", health.message)
        if upstream is None or health.stage is not Stage.READY:
            raise not_ready(health)
        self._route.check(upstream)
        return upstream


async def _cancel_when_gone(receive: Receive, scope: trio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


class _Ending(Enum):
    """How the server's part of an exchange ended."""

    COMPLETE = "complete"
    UNREACHABLE = "unreachable"
    BROKEN = "broken"


class _Exchange:
    """One request and its answer. Errors before the answer began are returned as `Refusal`."""

    def __init__(self, route: Passed, view: NodeView, upstream: Upstream, send: Send) -> None:
        self._route = route
        self._view = view
        self._upstream = upstream
        self._send = send
        self._loss = view.loss()
        self._begun = False
        self._finished = False

    async def run(self, body: bytes) -> Refusal | None:
        ending = _Ending.BROKEN  # what remains when the node says that the server is lost
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_when_set, self._loss.happened, nursery.cancel_scope)
            ending = await self._pass_or_tell(body)
            nursery.cancel_scope.cancel()
        if ending is _Ending.COMPLETE or self._finished:
            return None
        health = await self._verdict()
        if ending is _Ending.UNREACHABLE:
            return not_ready(health)
        refusal = self._broken(health)
        if not self._begun:
            return refusal
        # The 200 has been sent; a last event is the only word left that clients understand.
        event = b"event: error\ndata: " if self._route.path == "/v1/messages" else b"data: "
        text = json.dumps({"type": "error", **refusal.body()}).encode()
        await self._write(event + text + b"\n\n", more=False)
        return None

    async def _pass_or_tell(self, body: bytes) -> _Ending:
        try:
            return _Ending.COMPLETE if await self._pass(body) else _Ending.BROKEN
        except UpstreamUnreachable:
            return _Ending.UNREACHABLE
        except UpstreamBroken as error:
            _log.info("an answer was broken off: %s", error)
            return _Ending.BROKEN

    async def _pass(self, body: bytes) -> bool:
        """Passes the request on and the answer back; False for a stream without its end."""
        request = UpstreamRequest(self._route.method, self._route.path, body)
        async with open_answer(self._upstream.socket, request) as answer:
            headers = {
                name: answer.headers[name] for name in _PASSED_HEADERS if name in answer.headers
            }
            if answer.headers.get("content-type", "").startswith("text/event-stream"):
                return await self._pass_events(answer, headers)
            content = b"".join([piece async for piece in answer.pieces])
        if answer.status == 503:
            headers |= retry_headers(self._view.health())
        headers["content-length"] = str(len(content))
        await self._start(answer.status, headers)
        self._record(find_timings(content))
        await self._write(content, more=False)
        return True

    async def _pass_events(self, answer: Answer, headers: dict[str, str]) -> bool:
        gate = EventGate()
        await self._start(answer.status, headers)
        async for piece in answer.pieces:
            if passed := gate.feed(piece):
                await self._write(passed, more=True)
        mark = self._route.end_mark
        if mark is not None and not gate.ended_with(mark):
            return False
        self._record(gate.timings())
        await self._write(gate.flush(), more=False)
        return True

    async def _verdict(self) -> Health:
        """What the node says about it. The socket may break before the node has noticed."""
        with trio.move_on_after(VERDICT_TIMEOUT_S):
            await self._loss.happened.wait()
        return self._loss.health or self._view.health()

    def _broken(self, health: Health) -> Refusal:
        message = f"the model stopped in the middle of this answer: {health.message}"
        if health.stage is Stage.READY:
            message = "the model's server broke off this answer: send the request again"
        return Refusal(502, "upstream_lost", message, retry_headers(health))

    async def _start(self, status: int, headers: dict[str, str]) -> None:
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        self._begun = True
        await self._emit({"type": "http.response.start", "status": status, "headers": raw})

    async def _write(self, data: bytes, *, more: bool) -> None:
        self._finished = not more
        await self._emit({"type": "http.response.body", "body": data, "more_body": more})

    async def _emit(self, message: Message) -> None:
        """Shielded: a message that hypercorn has framed but not sent would tear the answer."""
        with trio.CancelScope(shield=True):
            await self._send(message)

    def _record(self, timings: Timings | None) -> None:
        if timings and timings.tokens > 0 and timings.seconds > 0:
            self._view.record_generation(timings.tokens, timings.seconds)


async def _cancel_when_set(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()
