"""Web servers that give a byte now and then, so that no limit for silence ever runs out."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import count

import pytest
import trio

from meshnode.models.pull import client, lanes, ranges
from meshnode.models.pull.client import Named
from meshnode.models.pull.http import HttpSource, WebFile, open_http
from meshnode.models.pull.pull import Pull, Supply
from meshnode.models.pull.reach import Reach, welcome
from meshnode.models.pull.source import SourceError, SourceFault
from meshnode.models.pull.url import parse_url
from meshnode.models.spans import Span
from tests.lab.web import Bucket, Query, Web

CONTENT = random.Random(7).randbytes(300_000)
STALL_S = 0.25
EVERY_S = 0.02


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(ranges, "MAX_PAUSE_S", 0.002)
    monkeypatch.setattr(client, "FIRST_PAUSE_S", 0.001)


@pytest.fixture
async def web(nursery: trio.Nursery) -> Web:
    web = Web(CONTENT)
    await nursery.start(web.run)
    return web


@asynccontextmanager
async def opened(web: Web) -> AsyncIterator[HttpSource]:
    file = WebFile(Named(parse_url(web.url)), "model.gguf")
    async with open_http([file], Reach(welcome, welcome, stall_s=STALL_S)) as source:
        yield source


async def trickle(stream: trio.abc.Stream, data: bytes) -> None:
    for at in range(len(data)):
        await stream.send_all(data[at : at + 1])
        await trio.sleep(EVERY_S)


async def pulled(web: Web) -> Bucket:
    bucket = Bucket(CONTENT)
    with trio.fail_after(60):
        async with opened(web) as source:
            wanted = [Span(0, 0, len(CONTENT))]
            await Pull(wanted, [Supply(source, 2)], bucket, chunk_bytes=100_000).run()
    return bucket


async def test_the_rest_of_what_a_connection_trickles_is_asked_for_on_another(web: Web) -> None:
    numbers: Iterator[int] = count()

    async def tired(query: Query, stream: trio.abc.Stream) -> bool:
        if query.is_first_look or next(numbers):
            return await web.honest(query, stream)
        await stream.send_all(web.part_head(query) + web.content[query.start : query.start + 50])
        await trickle(stream, web.content[query.start + 50 : query.stop])
        return False

    web.behave = tired
    assert (await pulled(web)).data == CONTENT


async def test_what_one_connection_would_be_at_for_hours_another_takes_over(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "TAKEN_OVER_AFTER_S", 0.1)
    monkeypatch.setattr(lanes, "TAKEN_OVER_LEFT_S", 1.0)
    numbers: Iterator[int] = count()

    async def uneven(query: Query, stream: trio.abc.Stream) -> bool:
        if query.is_first_look or next(numbers):
            return await web.honest(query, stream)
        await stream.send_all(web.part_head(query))
        for at in range(query.start, query.stop, 100):  # enough not to count as stalled
            await stream.send_all(web.content[at : min(at + 100, query.stop)])
            await trio.sleep(EVERY_S)
        return True

    web.behave = uneven
    with trio.fail_after(10):  # it would take twenty seconds
        assert (await pulled(web)).data == CONTENT
    assert next(numbers) == 4


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_a_server_that_only_trickles_is_given_up_with_a_sentence(
    web: Web, is_chunked: bool
) -> None:
    async def trickling(query: Query, stream: trio.abc.Stream) -> bool:
        if query.is_first_look:
            return await web.honest(query, stream)
        head, data = web.part_head(query), web.content[query.start : query.stop]
        if is_chunked:
            lines = [line for line in head.split(b"\r\n") if not line.startswith(b"Content-Length")]
            head = b"\r\n".join([lines[0], b"Transfer-Encoding: chunked", *lines[1:]])
            data = b"".join(b"1\r\n%c\r\n" % byte for byte in data)
        await stream.send_all(head)
        await trickle(stream, data)
        return False

    web.behave = trickling
    with pytest.raises(SourceError, match=r"less than 1\.0 KiB a second came .* given up"):
        await pulled(web)


async def test_a_head_that_trickles_is_not_waited_for(web: Web) -> None:
    async def trickling(query: Query, stream: trio.abc.Stream) -> bool:
        if query.is_first_look:
            return await web.honest(query, stream)
        await trickle(stream, b"HTTP/1.1 206 So\r\nX-Long: " + b"x" * 60_000)
        return False

    async with opened(web) as source:
        web.behave = trickling
        with trio.fail_after(20), pytest.raises(SourceFault, match="had not begun after"):
            await source.read(0, 0, 1000, lambda _data: None)
