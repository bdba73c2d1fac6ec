"""Pulls, each on a node, told as server-sent events (WHATWG HTML, 9.2).

Each event is named and has one JSON object, which says on which node: `progress` with bytes, and at
the end of each node's pull `held` or `failed`. The answer ends when all of them have. Who reads
slowly is told less often; who leaves ends them all.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict

import trio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from meshnode.errors import MeshError, UsageError
from meshnode.gateway.pull_request import bad_request
from meshnode.gateway.refusal import Refusal
from meshnode.gateway.sending import cancel_when_gone, start_answer, write_answer
from meshnode.models.fetching import OnProgress
from meshnode.models.forecast import Forecast
from meshnode.pipeline.orders import Target

PROGRESS_S = 0.25
KEEPALIVE_S = 15.0
_KEEPALIVE = b": the pull goes on\n\n"
_HEADERS = {"content-type": "text/event-stream", "cache-control": "no-store"}

log = logging.getLogger(__name__)

Work = Callable[[OnProgress], Awaitable[Mapping[str, object]]]
"""A pull, which tells how far it is; what is held then. Raises `MeshError`, `Refusal`."""


class PullEvents(Response):
    """The answer that follows pulls, by the node that each is on."""

    def __init__(self, works: Mapping[Target, Work]) -> None:
        super().__init__()
        self._pulls = [_NodePull(where, work, self._wake) for where, work in works.items()]
        self._news, self._ended = trio.Event(), trio.Event()

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        await start_answer(send, 200, _HEADERS)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cancel_when_gone, receive, nursery.cancel_scope)
            for one in self._pulls:
                nursery.start_soon(one.run)
            await self._follow(send)
            nursery.cancel_scope.cancel()

    def _wake(self, *, has_ended: bool) -> None:
        self._news.set()
        if has_ended:
            self._ended.set()

    async def _follow(self, send: Send) -> None:
        while not all(one.is_told for one in self._pulls):
            with trio.move_on_after(KEEPALIVE_S):
                await self._news.wait()
            self._news = trio.Event()
            events = b"".join(one.take_events() for one in self._pulls)
            await write_answer(send, events or _KEEPALIVE, more=True)
            with trio.move_on_after(PROGRESS_S):
                await self._ended.wait()
            self._ended = trio.Event()
        await write_answer(send, b"", more=False)


class _NodePull:
    """The pull on one node, and what of it has not been told yet. `is_told`: all has."""

    def __init__(self, where: Target, work: Work, wake: Callable[..., None]) -> None:
        self._where = where
        self._work = work
        self._wake = wake
        self._forecast = Forecast()
        self._progress: Mapping[str, object] | None = None
        self._ending: tuple[str, Mapping[str, object]] | None = None
        self.is_told = False

    async def run(self) -> None:
        try:
            self._ending = "held", await self._work(self._tell)
        except Refusal as error:
            self._ending = "failed", error.body()
        except UsageError as error:
            self._ending = "failed", bad_request(str(error)).body()
        except MeshError as error:
            log.info("a pull on %s, asked for over HTTP, failed: %s", self._where.node, error)
            self._ending = "failed", Refusal(502, "pull_failed", str(error)).body()
        self._wake(has_ended=True)

    def _tell(self, done_bytes: int, total_bytes: int) -> None:
        outlook = self._forecast.take(done_bytes, total_bytes, trio.current_time())
        self._progress = asdict(outlook)
        self._wake(has_ended=False)

    def take_events(self) -> bytes:
        """The newest, as they go over the wire; nothing where all was told before."""
        events = b""
        if self._progress is not None:
            events += self._event("progress", self._progress)
            self._progress = None
        if self._ending is not None and not self.is_told:
            events += self._event(*self._ending)
            self.is_told = True
        return events

    def _event(self, name: str, fields: Mapping[str, object]) -> bytes:
        text = json.dumps({**fields, **asdict(self._where)}, ensure_ascii=True, allow_nan=False)
        return f"event: {name}\ndata: {text}\n\n".encode()
