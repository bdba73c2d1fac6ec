"""Pulls from a web server of a test's own."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio

from meshnode.models.pull import client, ranges
from meshnode.models.pull.client import Named
from meshnode.models.pull.http import HttpSource, WebFile, open_http
from meshnode.models.pull.pull import Pull, Supply
from meshnode.models.pull.reach import Reach, welcome
from meshnode.models.pull.url import parse_url
from meshnode.models.spans import Span
from tests.lab.web import Bucket, Web

CONTENT = random.Random(6).randbytes(300_000)
CHUNK = 100_000
WHOLE = Span(0, 0, len(CONTENT))
OPEN = Reach(welcome, welcome, stall_s=20.0)
IMPATIENT = Reach(welcome, welcome, stall_s=0.25)


def shorten_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(ranges, "MAX_PAUSE_S", 0.002)
    monkeypatch.setattr(client, "FIRST_PAUSE_S", 0.001)


async def started(nursery: trio.Nursery, content: bytes = CONTENT) -> Web:
    web = Web(content)
    await nursery.start(web.run)
    return web


@asynccontextmanager
async def opened(url: str, reach: Reach = OPEN, **secrets: str) -> AsyncIterator[HttpSource]:
    file = WebFile(Named(parse_url(url), secrets), "model.gguf")
    async with open_http([file], reach) as source:
        yield source


async def pulled(
    *urls: str,
    wanted: Span = WHOLE,
    reach: Reach = OPEN,
    bucket: Bucket | None = None,
    connections: int = 2,
) -> Bucket:
    """Everything from the first of these; what that has not, or no more, from the next."""
    bucket = bucket or Bucket(CONTENT)
    with trio.fail_after(60):
        async with AsyncExitStack() as stack:
            supplies = [
                Supply(await stack.enter_async_context(opened(url, reach)), connections, rank)
                for rank, url in enumerate(urls)
            ]
            await Pull([wanted], supplies, bucket, chunk_bytes=CHUNK).run()
    return bucket
