"""`/api/v1/models/{id}/data`: the bytes of a model's files, whole or in ranges (RFC 9110, 13, 14).

The ETag is made of the provisional identity, which names the very bytes; a root names a model in
whatever files, so two with one root may differ byte for byte.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from urllib.parse import quote

import trio
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from meshnode.errors import ModelError
from meshnode.gateway.ranges import (
    MAX_RANGES,
    NoSuchBytes,
    Parts,
    TooManyRanges,
    content_range,
    parse_ranges_untrusted,
)
from meshnode.gateway.refusal import Refusal
from meshnode.gateway.sending import cancel_when_gone, start_answer, write_answer
from meshnode.models.facts import shown_name
from meshnode.models.model_file import ModelFile
from meshnode.models.registry import KnownModel, Registry
from meshnode.models.spans import Span

PIECE_BYTES = 1 << 20
MAX_STREAMS = 32
RETRY_AFTER = {"retry-after": "5"}
_TAG_CHARS = 32

log = logging.getLogger(__name__)


def file_index(request: Request, model: KnownModel) -> int:
    """Which file `?file=` asks for. Raises `Refusal`."""
    text = request.query_params.get("file", "0")
    count = len(model.facts.files)
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise Refusal(400, "bad_request", f"file={text[:20]!r} is no number: files count from 0")
    if int(text) >= count:
        files = "one file, number 0" if count == 1 else f"the files 0 to {count - 1}"
        raise Refusal(404, "unknown_file", f"{model.entry.name} has {files}, and none {int(text)}")
    return int(text)


class Streams:
    """I count the answers under way, so that readers of models leave the gateway to others too."""

    def __init__(self) -> None:
        self._under_way = 0
        self.disk = trio.CapacityLimiter(4)

    @contextmanager
    def one(self) -> Iterator[None]:
        """Raises `Refusal`."""
        if self._under_way >= MAX_STREAMS:
            text = f"{MAX_STREAMS} readers take models' bytes already: ask again in a moment"
            raise Refusal(503, "gateway_busy", text, RETRY_AFTER)
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1


class ModelData(Response):
    """The answer to one request for bytes."""

    def __init__(self, registry: Registry, streams: Streams, model: KnownModel, index: int) -> None:
        super().__init__()
        self._registry = registry
        self._streams = streams
        self._model = model
        self._index = index
        self._size_bytes = model.sizes[index]
        self._etag = f'"{model.identity.provisional[:_TAG_CHARS]}-{index}"'

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        matches = _tags(headers, "if-match")
        if matches and not {"*", self._etag} & matches:
            text = f"{self._model.entry.name} has other bytes now than those begun with: begin anew"
            raise Refusal(412, "other_bytes", text)
        if {"*", self._etag, f"W/{self._etag}"} & _tags(headers, "if-none-match"):
            await _answer_without_body(send, 304, self._answer_headers(None))
        elif scope["method"] == "HEAD":
            await _answer_without_body(send, 200, self._answer_headers(self._size_bytes))
        else:
            with self._streams.one():
                await self._give(self._spans(headers), receive, send)

    def _spans(self, headers: Headers) -> tuple[Span, ...]:
        """What is asked for; empty: the whole file. Raises `Refusal`."""
        if headers.get("if-range", self._etag) != self._etag:
            return ()  # of other bytes: all of these are sent instead
        unsatisfied = {"content-range": f"bytes */{self._size_bytes}"}
        try:
            return parse_ranges_untrusted(headers.get("range", ""), self._index, self._size_bytes)
        except TooManyRanges:
            text = f"more than {MAX_RANGES} ranges at once: ask for fewer"
            raise Refusal(416, "too_many_ranges", text, unsatisfied) from None
        except NoSuchBytes:
            text = f"the file has {self._size_bytes} bytes, and the range is beyond them"
            raise Refusal(416, "no_such_bytes", text, unsatisfied) from None

    async def _give(self, spans: tuple[Span, ...], receive: Receive, send: Send) -> None:
        file = await self._in_thread(partial(ModelFile, self._registry, self._model, self._index))
        try:
            for span in spans or (Span(self._index, 0, self._size_bytes),):
                self._refuse_missing(file.first_missing(span))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(cancel_when_gone, receive, nursery.cancel_scope)
                try:
                    await self._stream(file, spans, send)
                except ModelError as error:  # the connection ends under a body that is not whole
                    log.warning("an answer was broken off: %s", error)
                nursery.cancel_scope.cancel()
        finally:
            file.close()

    def _refuse_missing(self, missing: Span | None) -> None:
        if missing is not None:
            raise Refusal(
                404,
                "not_here",
                f"bytes {missing.start} to {missing.stop - 1} of {self._model.entry.name} are not "
                "on this node, which holds a part of it: /api/v1/models/registry?mesh=1 says who "
                "holds what",
            )

    async def _stream(self, file: ModelFile, spans: tuple[Span, ...], send: Send) -> None:
        if len(spans) > 1:
            await self._send_parts(
                file, Parts(spans, self._size_bytes, secrets.token_hex(16)), send
            )
            return
        whole = Span(self._index, 0, self._size_bytes)
        span = spans[0] if spans else whole
        headers = self._answer_headers(span.size_bytes)
        if spans:
            headers["content-range"] = content_range(span, self._size_bytes)
        await start_answer(send, 206 if spans else 200, headers)
        await self._send_bytes(file, span, send)
        await write_answer(send, b"", more=False)

    async def _send_parts(self, file: ModelFile, parts: Parts, send: Send) -> None:
        headers = self._answer_headers(parts.content_bytes) | {"content-type": parts.content_type}
        await start_answer(send, 206, headers)
        for head, span in zip(parts.heads(), parts.spans, strict=True):
            await write_answer(send, head, more=True)
            await self._send_bytes(file, span, send)
        await write_answer(send, parts.tail, more=False)

    async def _send_bytes(self, file: ModelFile, span: Span, send: Send) -> None:
        at = span.start
        while at < span.stop:
            size_bytes = min(PIECE_BYTES, span.stop - at)
            data = await trio.to_thread.run_sync(
                file.read, at, size_bytes, limiter=self._streams.disk
            )
            await write_answer(send, data, more=True)
            at += len(data)

    def _answer_headers(self, content_bytes: int | None) -> dict[str, str]:
        name = quote(shown_name(self._model.facts.files[self._index].name), safe="")
        headers = {
            "etag": self._etag,
            "accept-ranges": "bytes",
            "cache-control": "private, no-cache",
        }
        if content_bytes is not None:
            headers["content-length"] = str(content_bytes)
            headers["content-type"] = "application/octet-stream"
            headers["content-disposition"] = f"attachment; filename*=UTF-8''{name}"
        return headers

    async def _in_thread(self, work: partial[ModelFile]) -> ModelFile:
        try:
            return await trio.to_thread.run_sync(work, limiter=self._streams.disk)
        except ModelError as error:
            log.info("the bytes of %s are not given: %s", self._model.entry.name, error)
            raise Refusal(
                503,
                "model_changing",
                f"{self._model.entry.name} is being written to or moved: ask again in a moment, or "
                "run `mesh models verify` on the node's machine",
                RETRY_AFTER,
            ) from None


def _tags(headers: Headers, name: str) -> set[str]:
    return {tag.strip() for value in headers.getlist(name) for tag in value.split(",")} - {""}


async def _answer_without_body(send: Send, status: int, headers: dict[str, str]) -> None:
    await start_answer(send, status, headers)
    await write_answer(send, b"", more=False)
