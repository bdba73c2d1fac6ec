"""Either side of a lease stops at any step: the other is free of it within that step's limit."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import trio
import trio.testing

from meshnode.engine.cache import Engine, load_engine
from meshnode.errors import BadMessage, NetworkError
from meshnode.messages import Message, MessageStream
from meshnode.models.shelf import MAX_DIGESTED, PROGRESS_STEP_BYTES
from meshnode.pipeline import usage
from meshnode.pipeline.borrow import (
    ASK_TIMEOUT_S,
    FACTS_TIMEOUT_S,
    GRANT_TIMEOUT_S,
    MAX_BEGUN_AGAIN,
    SILENCE_S,
    LeaseLost,
    LeaseRefused,
    ask_facts,
    borrow,
)
from meshnode.pipeline.lease import MAX_LEASES_OF_ONE, MAX_UNHEARD, REQUEST_TIMEOUT_S
from meshnode.pipeline.protocol import LeaseRequest, Progress
from meshnode.pipeline.usage import UNUSED_LEASE_S, LeaseUse
from tests.lab.nodes import two_nodes
from tests.lab.stalls import (
    EASY_WINDOW_BYTES,
    framed,
    let_pass,
    open_mute,
    pushed_clock,
    unfinished,
    until,
)
from tests.meshnode.test_lease import MEMORY_BYTES, Scene, scene
from tunnels import Endpoint, Identity, Session, Stream, StreamReset

Clock = trio.testing.MockClock
LATE_S = 1.0
engine_needed = pytest.mark.engine


@pytest.fixture
def clock() -> Clock:
    return pushed_clock()


@pytest.fixture
def engine(engine_bin: Path) -> Engine:
    return load_engine(engine_bin)


@pytest.fixture
def short_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A socket's path is limited to about 100 bytes."""
    return tmp_path_factory.mktemp("l")


def at_worker(stage: Scene) -> Session:
    [session] = stage.worker.sessions()
    return session


# --- the owner stops ------------------------------------------------------------------------


def nothing(_stage: Scene) -> bytes:
    return b""


def half_a_length(_stage: Scene) -> bytes:
    return b"\0\0"


def half_a_request(stage: Scene) -> bytes:
    words = framed(stage.request.to_message())
    return words[: len(words) // 2]


def facts(_stage: Scene) -> bytes:
    return framed({"op": "facts"})


def refusable(stage: Scene) -> bytes:
    return framed(replace(stage.request, engine_key="another").to_message())


@engine_needed
@pytest.mark.parametrize(
    ("words", "takes_bytes"),
    [
        pytest.param(nothing, EASY_WINDOW_BYTES, id="nothing said"),
        pytest.param(half_a_length, EASY_WINDOW_BYTES, id="half a length"),
        pytest.param(half_a_request, EASY_WINDOW_BYTES, id="half a request"),
        pytest.param(facts, 0, id="facts not taken"),
        pytest.param(refusable, 0, id="a refusal not taken"),
    ],
)
async def test_whoever_asks_a_worker_and_stops_is_dropped(
    words: Callable[[Scene], bytes],
    takes_bytes: int,
    short_path: Path,
    engine: Engine,
    clock: Clock,
) -> None:
    async with scene(short_path, engine) as stage:
        mute = await open_mute(stage.session, "control", takes_bytes)
        mute.say(words(stage))
        await let_pass(clock, REQUEST_TIMEOUT_S - LATE_S)
        assert unfinished(at_worker(stage)) == ["control"]
        await let_pass(clock, 2 * LATE_S)
        assert unfinished(at_worker(stage)) == []
        assert (stage.desk._unheard.total(), stage.desk.leases) == (0, ())
        assert (await ask_facts(stage.session)).usable_bytes == 2 * MEMORY_BYTES


@engine_needed
async def test_a_grant_that_is_never_taken_is_taken_back(
    short_path: Path, engine: Engine, clock: Clock
) -> None:
    async with scene(short_path, engine) as stage:
        mute = await open_mute(stage.session, "control", 0)
        mute.say(framed(stage.request.to_message()))
        await until(lambda: bool(stage.desk._server_pids))
        (pid,) = stage.desk._server_pids
        await let_pass(clock, REQUEST_TIMEOUT_S - LATE_S)
        assert len(stage.desk.leases) == 1
        await let_pass(clock, 2 * LATE_S)
        await stage.until_free()
        assert stage.desk.usable_bytes() == 2 * MEMORY_BYTES
        assert not psutil.pid_exists(pid)
        assert unfinished(at_worker(stage)) == []


@engine_needed
async def test_a_granted_lease_that_nobody_uses_ends_with_a_sentence(
    short_path: Path, engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "UNUSED_LEASE_S", 30.0)
    async with scene(short_path, engine) as stage:
        async with borrow(stage.session, stage.request, lambda *_: None) as borrowed:
            async with await stage.session.open(f"rpc/{borrowed.granted.lease}"):
                await let_pass(clock, 30 + LATE_S)
                assert len(stage.desk.leases) == 1, "a stream stands, and that is use"
            await let_pass(clock, 30 - LATE_S)
            assert len(stage.desk.leases) == 1
            await let_pass(clock, 2 * LATE_S)
            with trio.fail_after(20):
                await borrowed.ended.wait()
            assert "nothing used the lease on worker for long" in borrowed.reason
        await stage.until_free()


@engine_needed
async def test_rpc_streams_that_stand_still_end_with_their_lease(
    short_path: Path, engine: Engine
) -> None:
    """One on which nothing was said, and one of whose answers nothing is taken."""
    hello = b"\x0e" + (24).to_bytes(8, "little") + bytes(24)
    async with scene(short_path, engine) as stage:
        async with borrow(stage.session, stage.request, lambda *_: None) as borrowed:
            service = f"rpc/{borrowed.granted.lease}"
            for words in (b"", 1000 * hello):
                mute = await open_mute(stage.session, service, 0)
                mute.say(words)
            await until(lambda: unfinished(at_worker(stage)).count(service) == 2)
        await stage.until_free()
        await until(lambda: not unfinished(at_worker(stage)))
        await until(lambda: stage.worker._services._gates["rpc/"].streams == 0)


async def test_a_lease_is_unused_while_it_has_no_stream(autojump_clock: Clock) -> None:
    use, began_s = LeaseUse(), trio.current_time()

    async def stream() -> None:
        await trio.sleep(UNUSED_LEASE_S / 2)
        with use.stream("a"):
            await trio.sleep(10 * UNUSED_LEASE_S)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream)
        await use.until_unused("a")
    assert trio.current_time() - began_s == pytest.approx(11.5 * UNUSED_LEASE_S)


# --- limits ---------------------------------------------------------------------------------


@asynccontextmanager
async def another(stage: Scene) -> AsyncIterator[Session]:
    endpoint = Endpoint(Identity.generate(), authorize=lambda _peer, _service: False)
    async with trio.open_nursery() as nursery:
        await nursery.start(endpoint.run, "127.0.0.1", 0)
        yield await endpoint.connect(stage.worker.peer, stage.worker.candidates())
        nursery.cancel_scope.cancel()


@engine_needed
async def test_one_peer_has_few_requests_that_still_arrive(
    short_path: Path, engine: Engine
) -> None:
    async with scene(short_path, engine) as stage, another(stage) as other:
        for _ in range(MAX_UNHEARD):
            (await open_mute(stage.session, "control")).say(half_a_request(stage))
        await until(lambda: stage.desk._unheard.total() == MAX_UNHEARD)
        async with await stage.session.open("control") as stream:
            with pytest.raises(StreamReset, match="begins many requests and finishes none"):
                await stream.receive_some()
        assert (await ask_facts(other)).name == "worker", "others are not held up"


@engine_needed
async def test_one_peer_has_few_leases(short_path: Path, engine: Engine) -> None:
    async with scene(short_path, engine) as stage, another(stage) as other:
        small = replace(stage.request, memory_bytes=2**20)
        release = trio.Event()

        async def hold(task_status: trio.TaskStatus[None]) -> None:
            async with borrow(stage.session, small, lambda *_: None):
                task_status.started()
                await release.wait()

        async with trio.open_nursery() as nursery:
            for _ in range(MAX_LEASES_OF_ONE):
                await nursery.start(hold)
            with pytest.raises(LeaseRefused, match="lends to this node 8 times already: end one"):
                async with borrow(stage.session, small, lambda *_: None):
                    pass
            async with borrow(other, small, lambda *_: None):
                assert len(stage.desk.leases) == MAX_LEASES_OF_ONE + 1
            release.set()
        await until(lambda: not stage.desk.leases)
        assert stage.desk.usable_bytes() == 2 * MEMORY_BYTES


# --- the worker stops -----------------------------------------------------------------------

SMALL = LeaseRequest("key", "small", 2**20, bytes(100))
LARGE = replace(SMALL, wanted=bytes(4 << 20))
GRANT: Message = {
    "event": "granted",
    "lease": "1",
    "usable_count": 0,
    "missing_count": 0,
    "differing_count": 0,
    "differing": [],
}

Worker = Callable[[Stream], Awaitable[None]]


async def takes_nothing(_stream: Stream) -> None:
    await trio.sleep_forever()


async def answers_nothing(stream: Stream) -> None:
    async for _ in stream:
        pass


async def half_a_grant(stream: Stream) -> None:
    await stream.send_all(framed(GRANT)[:9])
    await answers_nothing(stream)


def progress(pause_s: float, step_bytes: int, total_bytes: int, start: int = 0) -> Worker:
    async def tells(stream: Stream) -> None:
        messages, done_bytes = MessageStream(stream), start
        while True:
            word = {"event": "progress", "done_bytes": done_bytes, "total_bytes": total_bytes}
            await messages.send(word)
            await trio.sleep(pause_s)
            done_bytes += step_bytes

    return tells


def pull(pause_s: float, parts: int, steps: int) -> Worker:
    """So many parts, each of which begins at nothing; then it stands still."""

    async def tells(stream: Stream) -> None:
        messages = MessageStream(stream)
        for step in [*range(1, steps + 1)] * parts:
            await messages.send(Progress(step << 30, steps << 30, pulls=True).to_message())
            await trio.sleep(pause_s)
        await answers_nothing(stream)

    return tells


@asynccontextmanager
async def worker_that(answers: Worker) -> AsyncIterator[Session]:
    async with two_nodes() as pair:
        pair.bob.endpoint.serve("control", answers)
        yield await pair.connect()


NO_FURTHER = f"got no further with the lease for {SILENCE_S:.0f} s"


@pytest.mark.parametrize(
    ("answers", "request_", "limit_s", "reason"),
    [
        pytest.param(takes_nothing, LARGE, ASK_TIMEOUT_S, "did not take", id="request not taken"),
        pytest.param(answers_nothing, SMALL, SILENCE_S, NO_FURTHER, id="no answer"),
        pytest.param(half_a_grant, SMALL, SILENCE_S, NO_FURTHER, id="half a grant"),
        pytest.param(
            progress(10, 0, 2**40), SMALL, SILENCE_S, NO_FURTHER, id="digests that stand still"
        ),
        pytest.param(
            progress(0.05, 1, 2**40), SMALL, SILENCE_S, NO_FURTHER, id="digests by the byte"
        ),
        pytest.param(
            progress(15, 0, 0),
            SMALL,
            2 * MAX_DIGESTED * 15 + SILENCE_S,
            NO_FURTHER,
            id="no end of files",
        ),
        pytest.param(
            pull(10, 4, 3), SMALL, 11 * 10 + SILENCE_S, NO_FURTHER, id="a pull in four parts"
        ),
        pytest.param(
            pull(1, 10**6, 2),
            SMALL,
            2 * MAX_BEGUN_AGAIN + 1 + SILENCE_S,
            NO_FURTHER,
            id="no end of parts",
        ),
    ],
)
async def test_a_worker_that_stops_loses_the_request(
    answers: Worker, request_: LeaseRequest, limit_s: float, reason: str, autojump_clock: Clock
) -> None:
    async with worker_that(answers) as session:
        began_s = trio.current_time()
        with pytest.raises(LeaseLost, match=reason):
            async with borrow(session, request_, lambda *_: None):
                pass
        assert limit_s - 15 - LATE_S <= trio.current_time() - began_s <= limit_s + LATE_S
        await trio.sleep(LATE_S)
        assert unfinished(session) == []
        assert not session.closed.is_set()


async def test_digests_that_get_on_have_their_time_and_no_more(
    autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshnode.pipeline.borrow.GRANT_TIMEOUT_S", GRANT_TIMEOUT_S / 100)
    async with worker_that(progress(100, PROGRESS_STEP_BYTES, 2**60)) as session:
        began_s = trio.current_time()
        with pytest.raises(LeaseLost, match="granted no lease in"):
            async with borrow(session, SMALL, lambda *_: None):
                pass
        assert trio.current_time() - began_s == pytest.approx(GRANT_TIMEOUT_S / 100, abs=LATE_S)


@pytest.mark.parametrize("answers", [takes_nothing, answers_nothing, half_a_grant])
async def test_a_worker_that_does_not_say_what_it_lends_is_left_out(
    answers: Worker, autojump_clock: Clock
) -> None:
    async with worker_that(answers) as session:
        with trio.fail_after(FACTS_TIMEOUT_S + LATE_S):
            with pytest.raises(NetworkError, match="lends nothing"):
                await ask_facts(session)
        await trio.sleep(LATE_S)
        assert unfinished(session) == []


async def test_a_worker_that_babbles_is_told_apart_from_one_that_stops(
    autojump_clock: Clock,
) -> None:
    async def babbles(stream: Stream) -> None:
        await MessageStream(stream).send({"event": "weather"})

    async with worker_that(babbles) as session:
        with pytest.raises(BadMessage):
            async with borrow(session, SMALL, lambda *_: None):
                pass
