"""`mesh pull` from a web server that goes away, changes its file, or has its bytes changed on their
way: each ends in right bytes or in a sentence, and nothing wrong is ever held."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import trio

from discovery.token import parse_untrusted
from meshnode.crash_points import CRASH_AT_VARIABLE
from meshnode.engine.cache import load_engine
from meshnode.messages import MessageStream
from meshnode.models.facts import read_facts
from meshnode.models.store.slice import Slice, open_slice
from meshnode.models.store.writer import SliceWriter
from tests.conftest import require
from tests.e2e.conftest import World
from tests.e2e.test_hostile_worker import liar
from tests.e2e.test_pulled_model import rot
from tests.engine.synthetic import make_model_of_size
from tests.lab.nginx import nginx_program, running_nginx
from tests.lab.pulling import Puller
from tests.lab.web import Query, Web

OK, NETWORK, MODEL, KILLED = 0, 4, 6, -9
MODEL_BYTES = 80 * 10**6  # five pieces or so
CHUNK_BYTES, CONNECTIONS = 16 << 20, 4
SLACK_BYTES = 4 << 20
"""Of headers, and of what a connection had in it when it broke."""
FIRST_DONE = "slice.journalled:1"
"""Four pieces have come then, or are coming, and the fifth was not asked for yet."""
ROTTEN = "blk.3.ffn_up.weight"


@dataclass
class Served:
    """A model behind an nginx that can be stopped, and started again at the same address."""

    folder: Path
    model: Path
    program: str
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/{self.model.name}"

    @contextmanager
    def running(self) -> Iterator[str]:
        scratch = self.folder / "nginx"
        scratch.mkdir(exist_ok=True)
        with running_nginx(
            self.program, self.model.parent, scratch, port=self.port or None
        ) as address:
            self.port = int(address.rstrip("/").rpartition(":")[2])
            yield self.url

    @property
    def sent_bytes(self) -> int:
        """By all that ran until now."""
        lines = (self.folder / "nginx" / "sent").read_text().split()
        return sum(map(int, lines))

    def replace(self) -> bytes:
        """Another model of the same shape is there from now on; its bytes."""
        new = make_model_of_size(self.folder / "new.gguf", size_bytes=MODEL_BYTES, seed=2)
        os.utime(new, (self.model.stat().st_mtime + 5,) * 2)  # nginx tells files apart by seconds
        new.replace(self.model)
        return self.model.read_bytes()


@pytest.fixture
def served(tmp_path: Path) -> Served:
    program = nginx_program()
    require("nginx", program is not None, "needs nginx (./just setup)")
    assert program is not None
    (tmp_path / "served").mkdir()
    model = make_model_of_size(tmp_path / "served" / "big.gguf", size_bytes=MODEL_BYTES, seed=1)
    return Served(tmp_path, model, program)


@pytest.fixture
def puller(tmp_path: Path) -> Puller:
    return Puller(tmp_path / "home")


def slices(puller: Puller) -> list[Slice]:
    return [open_slice(folder) for folder in puller.folders()]


def check_whole(found: Slice, truth: bytes) -> None:
    assert found.complete
    assert found.facts.path.read_bytes() == truth


# -- the server goes away -------------------------------------------------------------------------


@asynccontextmanager
async def nobody_at(port: int) -> AsyncIterator[trio.Event]:
    """Who asks there is hung up on; the event says that somebody did."""
    asked = trio.Event()

    async def hang_up(stream: trio.SocketStream) -> None:
        asked.set()
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        serve = partial(trio.serve_tcp, hang_up, port, host="127.0.0.1")
        await nursery.start(serve)
        yield asked
        nursery.cancel_scope.cancel()


async def test_a_server_that_goes_away_midway_and_comes_back_is_waited_for(
    served: Served, puller: Puller
) -> None:
    truth = served.model.read_bytes()
    with ExitStack() as server:
        url = server.enter_context(served.running())
        async with puller.held(FIRST_DONE, "pull", url) as (command, gate):
            server.close()
            async with nobody_at(served.port) as asked:
                await gate.release()
                with trio.fail_after(30):
                    await asked.wait()
            server.enter_context(served.running())
            (await command.end()).check(OK)
    check_whole(slices(puller)[0], truth)
    assert served.sent_bytes < len(truth) + SLACK_BYTES, "nothing came twice"


async def test_a_server_that_does_not_come_back_is_given_up_and_what_came_is_kept(
    served: Served, puller: Puller
) -> None:
    truth = served.model.read_bytes()
    with ExitStack() as server:
        url = server.enter_context(served.running())
        async with puller.held(FIRST_DONE, "pull", url, patient=False) as (command, gate):
            server.close()
            await gate.release()
            words = ("cannot be reached", "what has come is kept: pull again")
            (await command.end()).check(NETWORK, *words)
    (await puller.run("pull", url, patient=False)).check(NETWORK, "cannot be reached")
    with served.running():
        (await puller.run("pull", url)).check(OK)
    check_whole(slices(puller)[0], truth)
    assert served.sent_bytes < len(truth) + SLACK_BYTES, "nothing came twice"


@pytest.mark.parametrize("seed", [1, 2])
async def test_kills_at_drawn_moments_cost_a_piece_a_connection_each(
    served: Served, puller: Puller, seed: int
) -> None:
    drawn = random.Random(seed)
    truth = served.model.read_bytes()
    points = ["slice.created", "slice.written", "slice.flushed", "slice.journalled"]
    points += ["slice.digested", "slice.held"]
    names = [tensor.name for tensor in read_facts(served.model).tensors]
    with served.running() as url:
        for point in drawn.sample(points, 3):
            at = f"{point}:{1 if point in ('slice.created', 'slice.held') else drawn.randint(1, 2)}"
            before_bytes = served.sent_bytes
            missing_bytes = missing_of(puller, names, len(truth))
            ended = await puller.run("pull", url, environment={CRASH_AT_VARIABLE: at})
            assert ended.exit_code in (KILLED, OK), ended.said  # not all are met by what is left
            lost = missing_of(puller, names, len(truth)) - missing_bytes
            came = served.sent_bytes - before_bytes
            assert came + lost <= CONNECTIONS * CHUNK_BYTES + SLACK_BYTES, at
        (await puller.run("pull", url)).check(OK)
    check_whole(slices(puller)[0], truth)


def missing_of(puller: Puller, names: list[str], whole_bytes: int) -> int:
    """What a pull has still to fetch, by what the disk tells after its end."""
    folders = puller.folders()
    if not folders:
        return whole_bytes
    with SliceWriter(folders[0]) as writer:
        return writer.missing_bytes(names)


# -- the file is replaced -------------------------------------------------------------------------


async def test_a_file_replaced_midway_is_never_mixed_with_the_old_one(
    served: Served, puller: Puller
) -> None:
    with served.running() as url:
        async with puller.held(FIRST_DONE, "pull", url) as (command, gate):
            new = served.replace()
            await gate.release()
            (await command.end()).check(NETWORK, "another file", "mesh models rm big")
        (old,) = slices(puller)
        assert 0 < len(old.held) < len(old.facts.tensors)
        (await puller.run("pull", url)).check(OK)
        assert len(slices(puller)) == 2, "the old one is there until it is removed"
        (await puller.run("models", "rm", "big")).check(OK)
        (left,) = slices(puller)
        check_whole(left, new)
        (await puller.run("pull", url)).check(OK, "nothing had to come")


async def test_mesh_serve_does_not_wait_for_a_file_that_is_gone(
    served: Served, puller: Puller
) -> None:
    local = ("--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--split", "never")
    with served.running() as url:
        async with puller.held(FIRST_DONE, "serve", "--model", url, *local) as (command, gate):
            new = served.replace()
            await gate.release()
            (await command.end()).check(
                NETWORK, "another file", "start again", "mesh models rm big"
            )
        (await puller.run("pull", url)).check(OK)
    check_whole(next(one for one in slices(puller) if one.complete), new)


REPLACED = "big is another file at its source than the one begun here: start again for the new one"


async def refuse_as_if_replaced(messages: MessageStream) -> None:
    await messages.send({"event": "refused", "reason": REPLACED})


@pytest.mark.engine
async def test_mesh_serve_believes_its_source_that_the_file_is_gone_and_no_worker(
    served: Served, world: World, engine_bin: Path
) -> None:
    """It has its own part already, so only a worker is there to say so, first as a lie."""
    with served.running() as url:
        (await Puller(world.folder / "node").run("pull", url)).check(OK)
        async with world.serve("--model", url, "--split=always", name="node") as node:
            token = parse_untrusted(await world.token_of(node))
            key = load_engine(engine_bin).key
            async with liar(world.folder / "liar", token, key, refuse_as_if_replaced):
                told = await node.wait_event("warning", containing=REPLACED)
                assert told["text"].endswith("trying again")
                await trio.to_thread.run_sync(served.replace)
                assert await node.wait_exit() == NETWORK
    said = node.last_lines[-1]
    assert REPLACED in said
    assert "mesh models rm big" in said, "its own words, not the worker's"


async def test_a_file_replaced_between_two_starts_is_pulled_as_the_other_model_it_is(
    served: Served, puller: Puller
) -> None:
    with served.running() as url:
        ended = await puller.run("pull", url, environment={CRASH_AT_VARIABLE: "slice.journalled:2"})
        assert ended.exit_code == KILLED
        new = served.replace()
        (await puller.run("pull", url)).check(OK)
    check_whole(next(one for one in slices(puller) if one.complete), new)


# -- bytes are changed on their way ---------------------------------------------------------------


@dataclass
class Meddled(Web):
    """Somebody between the server and us turns one bit of the file, as long as `flipped` says
    where. sha256: what a hub says of it."""

    flipped: int | None = None
    sha256: str | None = None

    def head(self, status: int, length: int | None, *lines: str) -> bytes:
        known = () if self.sha256 is None else (f"X-Linked-ETag: {self.sha256}",)
        return super().head(status, length, *lines, *known)

    async def meddle(self, query: Query, stream: trio.abc.Stream) -> bool:
        at = self.flipped
        if at is None or not query.start <= at < query.stop:
            return await self.honest(query, stream)
        part = bytearray(self.content[query.start : query.stop])
        part[at - query.start] ^= 1
        await stream.send_all(self.part_head(query) + part)
        return True


@asynccontextmanager
async def meddled(model: Path, tensor: str, *, is_known: bool) -> AsyncIterator[Meddled]:
    content = model.read_bytes()
    place = next(one for one in read_facts(model).tensors if one.name == tensor)
    web = Meddled(content, flipped=place.offset + 1000)
    web.behave = web.meddle
    web.sha256 = hashlib.sha256(content).hexdigest() if is_known else None
    async with trio.open_nursery() as nursery:
        await nursery.start(web.run)
        yield web
        nursery.cancel_scope.cancel()


async def test_a_whole_model_that_is_not_what_its_source_says_is_thrown_away(
    served: Served, puller: Puller
) -> None:
    async with meddled(served.model, ROTTEN, is_known=True) as web:
        pull = partial(
            puller.run,
            "pull",
            "hf:org/repo/big.gguf",
            environment={"HF_ENDPOINT": f"http://127.0.0.1:{web.port}"},
        )
        for _ in range(2):
            (await pull()).check(MODEL, "not what its source says it is (sha256)", "pull it again")
            (left,) = slices(puller)
            assert left.held == ()
            assert left.identity.root is None
        web.flipped = None
        (await pull()).check(OK, "sha256")
        check_whole(slices(puller)[0], web.content)
        web.queries.clear()
        (await pull()).check(OK, "nothing had to come")


async def test_a_tensor_whose_digest_is_known_is_never_taken_from_who_changes_it(
    served: Served, puller: Puller
) -> None:
    async with meddled(served.model, ROTTEN, is_known=False) as web:
        place, web.flipped = web.flipped, None
        assert place is not None
        (await puller.run("pull", web.url)).check(OK)
        (found,) = slices(puller)
        rot(found.facts.path, place)
        (await puller.run("models", "verify", "model")).check(MODEL, ROTTEN)

        web.flipped = place
        (await puller.run("pull", web.url)).check(NETWORK, "127.0.0.1", "other bytes", "not used")
        assert ROTTEN not in slices(puller)[0].document.held
        web.flipped = None
        (await puller.run("pull", web.url)).check(OK)
        check_whole(slices(puller)[0], web.content)


async def test_where_nobody_vouches_for_the_bytes_that_is_said(
    served: Served, puller: Puller
) -> None:
    """What came over plain http, and has no digest anywhere, may be what somebody made of it."""
    async with meddled(served.model, ROTTEN, is_known=False) as web:
        ended = await puller.run("pull", web.url, "--layers", "3:3")
        ended.check(OK, "warning: ", "without TLS", "no digest")
        said = json.loads((await puller.run("pull", web.url, "--json")).said)
        assert said["proof"] == "word"
