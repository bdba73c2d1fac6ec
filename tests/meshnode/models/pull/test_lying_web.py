"""Web servers that lie, refuse or lead astray, and what others give in their place: right bytes, or
a sentence, and never wrong bytes that count as there."""

from __future__ import annotations

import pytest
import trio

from meshnode.errors import DiskFull
from meshnode.models.pull import client
from meshnode.models.pull.pull import Pull, Supply
from meshnode.models.pull.source import SourceChanged, SourceError, SourceFault
from meshnode.models.spans import Span, joined
from tests.lab.web import Bucket, Query, Web, redirect
from tests.meshnode.models.pull.from_web import (
    CHUNK,
    CONTENT,
    WHOLE,
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


# --- lies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "told",
    ["bytes 1-100000/300000", "bytes 0-99998/300000", "bytes */300000", "lines 0-9/10", "bytes 0-"],
)
async def test_other_bytes_than_asked_for_are_not_used(web: Web, told: str) -> None:
    async def lying(query: Query, stream: trio.abc.Stream) -> bool:
        if query.is_first_look:
            return await web.honest(query, stream)
        await stream.send_all(web.head(206, CHUNK, f"Content-Range: {told}") + bytes(CHUNK))
        return True

    web.behave = lying
    bucket = Bucket(CONTENT)
    with pytest.raises(SourceError, match=r"other bytes than|does not say which part"):
        await pulled(web.url, bucket=bucket, connections=1)
    assert not bucket.written


@pytest.mark.parametrize("told", ["bytes 0-0/*", "bytes 0-1/300000", "bytes 5-5/300000", ""])
async def test_a_server_that_does_not_say_how_long_a_file_is_is_refused(
    web: Web, told: str
) -> None:
    async def vague(query: Query, stream: trio.abc.Stream) -> bool:
        await stream.send_all(web.head(206, 1, f"Content-Range: {told}") + b"G")
        return True

    web.behave = vague
    with pytest.raises(SourceError, match=r"how long it is|which part"):
        await pulled(web.url)


async def test_a_length_that_was_a_lie_ends_in_a_sentence(web: Web) -> None:
    async def boasting(query: Query, stream: trio.abc.Stream) -> bool:
        if not query.is_first_look:
            return await web.honest(query, stream)
        await stream.send_all(web.head(206, 1, "Content-Range: bytes 0-0/900000") + b"G")
        return True

    web.behave = boasting
    with pytest.raises(SourceChanged):
        await pulled(web.url, wanted=Span(0, 0, 900_000), bucket=Bucket(CONTENT))


async def test_an_empty_file_and_a_compressed_one_are_refused(web: Web) -> None:
    web.content = b""
    with pytest.raises(SourceError, match="416"):
        await pulled(web.url)

    async def zipped(query: Query, stream: trio.abc.Stream) -> bool:
        told = web.part_head(query).replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n")
        await stream.send_all(told + b"z")
        return True

    web.content, web.behave = CONTENT, zipped
    with pytest.raises(SourceError, match="compressed"):
        await pulled(web.url)


@pytest.mark.parametrize(
    "said",
    [
        b"SSH-2.0-OpenSSH_9.9\r\n",
        b"HTTP/1.1 206 So\r\nno header\r\n\r\n",
        b"HTTP/1.1 200 So\r\nX: " + b"x" * 100_000,
        b"HTTP/1.1 100 Go on\r\n\r\n" * 50,
        b"HTTP/1.1 206 So\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"HTTP/1.1 206 So\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"\x00" * 70_000,
    ],
)
async def test_what_is_no_http_is_refused_after_a_few_tries(web: Web, said: bytes) -> None:
    async def strange(query: Query, stream: trio.abc.Stream) -> bool:
        await stream.send_all(said)
        return False

    web.behave = strange
    with pytest.raises(SourceFault, match=r"no HTTP|connection broke"):
        await pulled(web.url)
    assert len(web.queries) == client.TRIES


# --- statuses ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "sentence"),
    [(404, "there is no"), (410, "there is no"), (401, "not for everybody"), (418, "of no use")],
)
async def test_a_refusal_is_told_once_and_in_words(web: Web, status: int, sentence: str) -> None:
    async def refusing(query: Query, stream: trio.abc.Stream) -> bool:
        await stream.send_all(web.head(status, 0))
        return True

    web.behave = refusing
    with pytest.raises(SourceError, match=sentence):
        await pulled(web.url)
    assert len(web.queries) == 1


async def test_a_busy_server_is_asked_again_when_it_says(web: Web) -> None:
    async def busy(query: Query, stream: trio.abc.Stream) -> bool:
        if len(web.queries) in (1, 4):
            await stream.send_all(web.head(503, 0, "Retry-After: 0"))
            return True
        if len(web.queries) in (2, 5):
            await stream.send_all(web.head(429, 0))
            return True
        return await web.honest(query, stream)

    web.behave = busy
    assert (await pulled(web.url, connections=1)).data == CONTENT


async def test_an_idle_connection_that_the_server_closed_costs_no_try(web: Web) -> None:
    async def closing(query: Query, stream: trio.abc.Stream) -> bool:
        await web.honest(query, stream)
        return False

    web.behave = closing
    assert (await pulled(web.url, connections=1)).data == CONTENT
    assert len(web.queries) == 4


async def test_a_kept_connection_that_ends_at_the_next_question_costs_no_try(web: Web) -> None:
    async def leaving(query: Query, stream: trio.abc.Stream) -> bool:
        return len(web.queries) != 2 and await web.honest(query, stream)

    web.behave = leaving
    taken = bytearray()
    async with opened(web.url) as source:
        await source.read(0, 0, CHUNK, taken.extend)
    assert taken == CONTENT[:CHUNK]
    assert [query.stop for query in web.queries] == [1, CHUNK, CHUNK]


# --- elsewhere -----------------------------------------------------------------------------------


async def test_a_circle_of_redirects_is_noticed(web: Web) -> None:
    async def circling(query: Query, stream: trio.abc.Stream) -> bool:
        await stream.send_all(redirect("/two" if query.target == "/one" else "/one"))
        return True

    web.behave = circling
    with pytest.raises(SourceError, match="in a circle"):
        await pulled(web.url)
    assert len(web.queries) == 3


async def test_a_row_of_redirects_without_an_end_has_one(web: Web) -> None:
    async def onward(query: Query, stream: trio.abc.Stream) -> bool:
        await stream.send_all(redirect(f"/{len(web.queries)}"))
        return True

    web.behave = onward
    with pytest.raises(SourceError, match="on and on"):
        await pulled(web.url)


@pytest.mark.parametrize(
    "location", ["ftp://127.0.0.1/x", "https://:80/", "http://[", "file:///etc/x"]
)
async def test_a_redirect_to_what_is_not_the_web_is_not_followed(web: Web, location: str) -> None:
    async def elsewhere(query: Query, stream: trio.abc.Stream) -> bool:
        await stream.send_all(redirect(location))
        return True

    web.behave = elsewhere
    with pytest.raises(SourceError, match="no address of the web"):
        await pulled(web.url)


async def test_a_place_that_is_good_for_a_while_is_found_again(
    web: Web, nursery: trio.Nursery
) -> None:
    """As with a hub, whose links to its storage carry a signature that ends."""
    hub = await started(nursery)
    linked = "a" * 64

    async def sending_on(query: Query, stream: trio.abc.Stream) -> bool:
        place = f"http://127.0.0.1:{web.port}/blob?signature={len(hub.queries)}"
        await stream.send_all(redirect(place, f'X-Linked-ETag: "{linked}"'))
        return True

    async def expiring(query: Query, stream: trio.abc.Stream) -> bool:
        if len(web.queries) > 2 and query.target.endswith("=1"):
            await stream.send_all(web.head(403, 0))
            return True
        return await web.honest(query, stream)

    hub.behave, web.behave = sending_on, expiring
    bucket = Bucket(CONTENT)
    async with opened(hub.url) as source:
        assert source.validator == f"sha256:{linked}"
        await Pull([WHOLE], [Supply(source, 2)], bucket, chunk_bytes=CHUNK).run()
    assert bucket.data == CONTENT
    assert len(hub.queries) == 2


async def test_a_place_found_again_with_another_file_is_not_used(
    web: Web, nursery: trio.Nursery
) -> None:
    hub = await started(nursery)

    async def sending_on(query: Query, stream: trio.abc.Stream) -> bool:
        linked = "ab"[len(hub.queries) > 1] * 64
        place = f"http://127.0.0.1:{web.port}/blob"
        await stream.send_all(redirect(place, f'X-Linked-ETag: "{linked}"'))
        return True

    async def expiring(query: Query, stream: trio.abc.Stream) -> bool:
        if len(web.queries) == 3:
            await stream.send_all(web.head(403, 0))
            return True
        return await web.honest(query, stream)

    hub.behave, web.behave = sending_on, expiring
    with pytest.raises(SourceChanged):
        await pulled(hub.url, connections=1)


# --- more than one source, and a disk ---------------------------------------------------------


async def test_what_one_source_gives_no_more_comes_from_the_next(
    web: Web, nursery: trio.Nursery
) -> None:
    other = await started(nursery)

    async def dying(query: Query, stream: trio.abc.Stream) -> bool:
        if len(web.queries) > 2:
            await stream.send_all(web.head(404, 0))
            return True
        return await web.honest(query, stream)

    web.behave = dying
    bucket = await pulled(web.url, other.url, connections=1)
    assert bucket.data == CONTENT
    assert bucket.held_bytes == len(CONTENT)


async def test_a_source_of_another_model_is_not_mixed_in(web: Web, nursery: trio.Nursery) -> None:
    other = await started(nursery, CONTENT + b"more")

    async def gone(query: Query, stream: trio.abc.Stream) -> bool:
        if query.is_first_look:
            return await web.honest(query, stream)
        await stream.send_all(web.head(404, 0))
        return True

    web.behave = gone
    with pytest.raises(SourceError, match="there is no"):
        await pulled(web.url, other.url)
    assert all(query.is_first_look for query in other.queries)


async def test_all_of_what_a_lying_source_had_begun_comes_from_the_next(
    web: Web, nursery: trio.Nursery
) -> None:
    other = await started(nursery)

    async def generous(query: Query, stream: trio.abc.Stream) -> bool:
        if query.is_first_look:
            return await web.honest(query, stream)
        part = web.content[query.start : query.stop] + b"!"
        told = web.part_head(query).replace(b"Content-Length", b"Transfer-Encoding: chunked\r\nX")
        await stream.send_all(told + b"%x\r\n%b\r\n0\r\n\r\n" % (len(part), part))
        return True

    web.behave = generous
    bucket = await pulled(web.url, other.url)
    assert joined(bucket.held) == (WHOLE,)


async def test_what_the_disk_says_comes_out_as_it_is(web: Web) -> None:
    class Full(Bucket):
        def write(self, file_index: int, offset: int, data: memoryview) -> None:
            raise DiskFull("no room")

    with pytest.raises(DiskFull, match="no room"):
        await pulled(web.url, bucket=Full(CONTENT))


async def test_bytes_of_a_wrong_digest_are_fetched_anew(web: Web) -> None:
    class Checking(Bucket):
        def done(self, file_index: int, start: int, stop: int) -> tuple[Span, ...]:
            first_time = not self.held
            super().done(file_index, start, stop)
            return (Span(0, 0, 50_000),) if first_time else ()

    bucket = await pulled(web.url, bucket=Checking(CONTENT), connections=1)
    assert Span(0, 0, 50_000) in bucket.held
