"""Web servers that ignore what they are asked, change their mind, stall, or give too little or too
much: each ends in right bytes or in a sentence, and never in wrong bytes that count as there."""

from __future__ import annotations

import pytest
import trio

from meshnode.models.pull.pull import Pull, Supply
from meshnode.models.pull.ranges import MAX_TRIES, Headway
from meshnode.models.pull.source import SourceChanged, SourceError
from meshnode.models.spans import Span
from tests.lab.web import MODIFIED, Bucket, Query, Web
from tests.meshnode.models.pull.from_web import (
    CHUNK,
    CONTENT,
    IMPATIENT,
    opened,
    pulled,
    shorten_pauses,
    started,
)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_pauses(monkeypatch)


@pytest.fixture
async def web(nursery: trio.Nursery) -> Web:
    return await started(nursery)


async def test_an_honest_server_gives_what_is_wanted_over_connections_that_are_kept(
    web: Web,
) -> None:
    told: list[Headway] = []
    bucket = Bucket(CONTENT)
    async with opened(web.url) as source:
        assert source.files[0].size_bytes == len(CONTENT)
        assert source.validator == 'etag:"one"'
        wanted = Span(0, 50_000, 250_000)
        await Pull([wanted], [Supply(source, 2)], bucket, told.append, CHUNK).run()
    assert bucket.data[50_000:250_000] == CONTENT[50_000:250_000]
    assert sorted(bucket.held) == [Span(0, 50_000, 150_000), Span(0, 150_000, 250_000)]
    assert (told[-1].done_bytes, told[-1].eta_s) == (200_000, 0.0)
    assert web.connections <= 2
    assert {query.headers["accept-encoding"] for query in web.queries} == {"identity"}
    assert {query.headers.get("if-range") for query in web.queries[1:]} == {'"one"'}


# --- ranges ignored --------------------------------------------------------------------------


async def ignoring_ranges(web: Web, query: Query, stream: trio.abc.Stream) -> bool:
    await stream.send_all(web.head(200, len(web.content)) + web.content)
    return True


async def test_a_server_without_ranges_gives_the_whole_file_in_one_piece(web: Web) -> None:
    web.behave = lambda query, stream: ignoring_ranges(web, query, stream)
    bucket = await pulled(web.url)
    assert bucket.data == CONTENT
    assert len(web.queries) == 2


async def test_a_server_without_ranges_is_refused_where_a_part_is_wanted(web: Web) -> None:
    web.behave = lambda query, stream: ignoring_ranges(web, query, stream)
    bucket = Bucket(CONTENT)
    with pytest.raises(SourceError, match="only from their beginning"):
        await pulled(web.url, wanted=Span(0, 100, 200), bucket=bucket)
    assert not bucket.written


async def test_the_rest_of_a_file_comes_from_a_server_without_ranges_too(web: Web) -> None:
    web.behave = lambda query, stream: ignoring_ranges(web, query, stream)
    bucket = await pulled(web.url, wanted=Span(0, 123_456, len(CONTENT)))
    assert bucket.held == [Span(0, 123_456, len(CONTENT))]


async def test_a_server_that_forgets_ranges_now_and_then_is_asked_again(web: Web) -> None:
    async def forgetful(query: Query, stream: trio.abc.Stream) -> bool:
        if len(web.queries) == 2:
            return await ignoring_ranges(web, query, stream)
        return await web.honest(query, stream)

    web.behave = forgetful
    assert (await pulled(web.url)).data == CONTENT


# --- another file midway -----------------------------------------------------------------------


@pytest.mark.parametrize("keeps_condition", [True, False])
@pytest.mark.parametrize(("etag", "modified"), [('"one"', None), (None, MODIFIED)])
async def test_a_file_swapped_midway_is_noticed_and_nothing_of_the_new_one_is_used(
    web: Web, etag: str | None, modified: str | None, keeps_condition: bool
) -> None:
    web.etag, web.modified = etag, modified

    async def swapping(query: Query, stream: trio.abc.Stream) -> bool:
        if len(web.queries) == 3:
            web.content = bytes(len(CONTENT))
            web.etag = '"two"' if web.etag else None
            web.modified = "Wed, 15 Nov 2023 22:13:20 GMT" if web.modified else None
        if not keeps_condition:
            query.headers.pop("if-range", None)
        return await web.honest(query, stream)

    web.behave = swapping
    bucket = Bucket(CONTENT)
    with pytest.raises(SourceChanged, match="another file than it was"):
        await pulled(web.url, bucket=bucket, connections=1)
    assert bucket.held == [Span(0, 0, CHUNK)]


async def test_a_file_that_became_longer_is_another_one(web: Web) -> None:
    web.etag = None

    async def growing(query: Query, stream: trio.abc.Stream) -> bool:
        if len(web.queries) == 3:
            web.content += b"more"
        return await web.honest(query, stream)

    web.behave = growing
    with pytest.raises(SourceChanged):
        await pulled(web.url, connections=1)


async def test_a_file_that_became_shorter_is_another_one(web: Web) -> None:
    web.etag = None

    async def shrinking(query: Query, stream: trio.abc.Stream) -> bool:
        if len(web.queries) == 3:
            web.content = web.content[:100]
        return await web.honest(query, stream)

    web.behave = shrinking
    with pytest.raises(SourceChanged):
        await pulled(web.url, connections=1)


async def test_a_condition_that_failed_says_that_the_file_is_another_one(web: Web) -> None:
    async def strict(query: Query, stream: trio.abc.Stream) -> bool:
        if query.is_first_look:
            return await web.honest(query, stream)
        await stream.send_all(web.head(412, 0))
        return True

    web.behave = strict
    with pytest.raises(SourceChanged):
        await pulled(web.url)


# --- stalls -------------------------------------------------------------------------------------


async def test_a_server_that_stalls_is_asked_for_the_rest_on_a_new_connection(web: Web) -> None:
    async def stalling(query: Query, stream: trio.abc.Stream) -> bool:
        if (query.start, query.stop) == (0, CHUNK):
            await stream.send_all(web.part_head(query) + web.content[:30_000])
            await trio.sleep_forever()
        return await web.honest(query, stream)

    web.behave = stalling
    bucket = await pulled(web.url, reach=IMPATIENT, connections=1)
    assert bucket.data == CONTENT
    assert Span(0, 0, 30_000) in bucket.held, "what had come is kept"
    assert any(query.start == 30_000 for query in web.queries)


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 206 So\r\nContent-"])
async def test_a_server_that_never_answers_is_given_up(web: Web, said: bytes) -> None:
    async def silent(query: Query, stream: trio.abc.Stream) -> bool:
        if query.is_first_look:
            return await web.honest(query, stream)
        await stream.send_all(said)
        await trio.sleep_forever()
        return False

    web.behave = silent
    with pytest.raises(SourceError, match=r"not a byte came for 0\.25 s; given up"):
        await pulled(web.url, reach=IMPATIENT, connections=1)
    assert sum(not query.is_first_look for query in web.queries) <= MAX_TRIES


async def test_who_is_cancelled_while_a_server_stalls_is_gone_at_once(web: Web) -> None:
    stalled = trio.Event()

    async def stalling(query: Query, stream: trio.abc.Stream) -> bool:
        if query.is_first_look:
            return await web.honest(query, stream)
        await stream.send_all(web.part_head(query) + web.content[:10])
        stalled.set()
        await trio.sleep_forever()
        return False

    web.behave = stalling
    bucket = Bucket(CONTENT)
    with trio.fail_after(10):  # a server may be silent for twice as long
        async with trio.open_nursery() as nursery:

            async def pull() -> None:
                await pulled(web.url, bucket=bucket)

            nursery.start_soon(pull)
            await stalled.wait()
            nursery.cancel_scope.cancel()
    assert not bucket.held


# --- too little, too much -----------------------------------------------------------------------


async def test_a_body_that_ends_early_is_continued_where_it_ended(web: Web) -> None:
    async def curt(query: Query, stream: trio.abc.Stream) -> bool:
        if query.stop - query.start <= 20_000:
            return await web.honest(query, stream)
        part = web.content[query.start : query.start + 40_000]
        await stream.send_all(web.part_head(query) + part)
        return False

    web.behave = curt
    bucket = await pulled(web.url)
    assert bucket.data == CONTENT


async def test_a_server_that_gives_next_to_nothing_each_time_is_given_up(web: Web) -> None:
    async def stingy(query: Query, stream: trio.abc.Stream) -> bool:
        if query.is_first_look:
            return await web.honest(query, stream)
        await stream.send_all(web.part_head(query) + web.content[query.start : query.start + 1])
        return False

    web.behave = stingy
    with pytest.raises(SourceError, match="ended early; given up"):
        await pulled(web.url)


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK + 1, 10**12])
async def test_a_body_of_another_length_than_asked_for_is_not_read(web: Web, length: int) -> None:
    async def lying(query: Query, stream: trio.abc.Stream) -> bool:
        if query.is_first_look:
            return await web.honest(query, stream)
        await stream.send_all(web.part_head(query, length) + web.content)
        return True

    web.behave = lying
    bucket = Bucket(CONTENT)
    with pytest.raises(SourceError, match="other bytes than were asked for"):
        await pulled(web.url, bucket=bucket)
    assert not bucket.written


@pytest.mark.parametrize("is_chunked", [True, False])
async def test_more_bytes_than_asked_for_are_not_used(web: Web, is_chunked: bool) -> None:
    async def generous(query: Query, stream: trio.abc.Stream) -> bool:
        if query.is_first_look:
            return await web.honest(query, stream)
        part = web.content[query.start : query.stop] + b"!"
        if is_chunked:
            framed = b"%x\r\n%b\r\n0\r\n\r\n" % (len(part), part)
            told = web.part_head(query).replace(
                b"Content-Length", b"Transfer-Encoding: chunked\r\nX"
            )
            await stream.send_all(told + framed)
        else:
            told = web.part_head(query).replace(b"Content-Length", b"Connection: close\r\nX")
            await stream.send_all(told + part)
        return False

    web.behave = generous
    bucket = Bucket(CONTENT)
    if is_chunked:
        with pytest.raises(SourceError, match="more bytes than were asked for"):
            await pulled(web.url, bucket=bucket)
        assert not bucket.held
    else:  # nobody reads on, so nobody can say
        await pulled(web.url, bucket=bucket)


async def test_bodies_in_chunks_are_read(web: Web) -> None:
    async def chunked(query: Query, stream: trio.abc.Stream) -> bool:
        told = web.part_head(query).replace(b"Content-Length", b"Transfer-Encoding: chunked\r\nX")
        await stream.send_all(told)
        for at in range(query.start, query.stop, 7_777):
            part = web.content[at : min(at + 7_777, query.stop)]
            await stream.send_all(b"%x\r\n%b\r\n" % (len(part), part))
        await stream.send_all(b"0\r\n\r\n")
        return True

    web.behave = chunked
    assert (await pulled(web.url)).data == CONTENT
    assert web.connections <= 2
