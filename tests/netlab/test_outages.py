"""Faults of the network and of processes while an answer is under way: it completes, and is the
undisturbed one. `./just outages` repeats them at their full length."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil
import pytest
import trio

from meshnode.demo.nodes import NodeProcess, invite_token, open_node, write_token
from tests.engine.synthetic import make_model
from tests.netlab.lan import NETWORK, LanHost, lan

pytestmark = [pytest.mark.engine, pytest.mark.netlab]

OUTAGE_S = float(os.environ.get("MESH_TEST_OUTAGE_S", "6"))
STOPPED_S = float(os.environ.get("MESH_TEST_STOPPED_S", "8"))
FLAPS = int(os.environ.get("MESH_TEST_FLAPS", "6"))
FLOWS_WITHIN_S = 0.5  # and two round trips, which take nothing here
MOVED_WITHIN_S = 1.2  # until it is noticed, doubted, and dialled again
SLACK_S = 0.3  # of a busy machine
TOKENS = 600
BEFORE = 100  # tokens, until the fault
URL = "http://127.0.0.1:8090"


@pytest.fixture
def hosts() -> Iterator[list[LanHost]]:
    with lan(2) as machines:
        yield machines


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, engine_bin: Path) -> Path:
    folder = tmp_path_factory.mktemp("outages")
    return make_model(folder / "small.gguf", layers=8, width=128, ffn=256, seed=1, name="small")


@dataclass
class Answer:
    """As it comes."""

    tokens: list[str] = field(default_factory=list)
    heard_at_s: list[float] = field(default_factory=list)  # time.monotonic
    news: trio.lowlevel.ParkingLot = field(default_factory=trio.lowlevel.ParkingLot)

    def take(self, line: bytes) -> None:
        at_s, _, event = line.decode().partition(" ")
        if event == "[DONE]":
            return
        said = json.loads(event)
        assert "error" not in said, said
        self.tokens.append(said["choices"][0]["text"])
        self.heard_at_s.append(float(at_s))
        self.news.unpark_all()

    async def has(self, count: int) -> None:
        while len(self.tokens) < count:
            await self.news.park()

    async def said_after(self, moment_s: float) -> float:
        while not self.heard_at_s or self.heard_at_s[-1] <= moment_s:
            await self.news.park()
        return next(at_s for at_s in self.heard_at_s if at_s > moment_s)


@dataclass
class Scene:
    here: LanHost
    there: LanHost
    node: NodeProcess
    worker: NodeProcess

    async def ask(self, answer: Answer) -> list[str]:
        body = {
            "prompt": "one two three",
            "max_tokens": TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "cache_prompt": False,
        }
        script = str(Path(__file__).with_name("stream.py"))
        command = [*self.here.prefix, sys.executable, script, f"{URL}/v1/completions"]
        run = partial(trio.run_process, [*command, json.dumps(body)], stdout=subprocess.PIPE)
        async with trio.open_nursery() as nursery:
            process: trio.Process = await nursery.start(run)
            assert process.stdout is not None
            rest = b""
            async for chunk in process.stdout:
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    answer.take(line)
        return answer.tokens


@asynccontextmanager
async def scene(hosts: list[LanHost], model: Path, folder: Path, kind: str) -> AsyncIterator[Scene]:
    here, there = hosts
    common = ("--threads", "1", "--transport", kind)
    async with open_node(
        *("worker", *common, "--models", str(model.parent)),
        name="worker",
        home=folder / "worker",
        log_folder=folder,
        prefix=there.prefix,
    ) as worker:
        token = write_token(folder / "token", invite_token(await worker.wait_event("invite")))
        async with open_node(
            *("serve", *common, "--model", str(model), "--split", "always"),
            *("--join-file", str(token), "--ctx", "1024"),
            name="orchestrator",
            home=folder / "orchestrator",
            log_folder=folder,
            engine_options=("--no-repack",),
            prefix=here.prefix,
        ) as node:
            await node.wait_event("ready")
            yield Scene(here, there, node, worker)


Fault = Callable[[Scene], Awaitable[None]]


async def cable_out(scene: Scene) -> None:
    scene.there.ip("link", "set", "e0", "down")
    await trio.sleep(OUTAGE_S)
    scene.there.ip("link", "set", "e0", "up")


async def packets_dropped(scene: Scene) -> None:
    rules = "table inet cut {\n chain in {\n type filter hook input priority 0\n drop\n }\n }\n"
    nft = (*scene.there.prefix, "nft")
    await trio.run_process([*nft, rules])
    await trio.sleep(OUTAGE_S)
    await trio.run_process([*nft, "delete", "table", "inet", "cut"])


async def flaps(scene: Scene) -> None:
    for number in range(FLAPS):
        scene.there.ip("link", "set", "e0", "down")
        await trio.sleep((0.2, 1.5, 4.5)[number % 3])
        scene.there.ip("link", "set", "e0", "up")
        await trio.sleep((1.0, 0.1, 0.4)[number % 3])


async def orchestrator_moves(scene: Scene) -> None:
    scene.here.move_to(f"{NETWORK}.101")


async def worker_moves(scene: Scene) -> None:
    scene.there.move_to(f"{NETWORK}.102")


def stopped(who: str) -> Fault:
    async def stop(scene: Scene) -> None:
        node = scene.worker if who == "worker" else scene.node
        pids = [node.pid, *(one.pid for one in psutil.Process(node.pid).children(recursive=True))]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        await trio.sleep(STOPPED_S)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)

    return stop


FAULTS: dict[str, tuple[Fault, float | None]] = {
    # And within which the next token comes.
    "cable out": (cable_out, FLOWS_WITHIN_S),
    "packets dropped": (packets_dropped, FLOWS_WITHIN_S),
    "flaps": (flaps, None),
    "orchestrator moves": (orchestrator_moves, MOVED_WITHIN_S),
    "worker moves": (worker_moves, MOVED_WITHIN_S),
    "worker stopped": (stopped("worker"), None),
    "orchestrator stopped": (stopped("orchestrator"), None),
}
KINDS = ("quic", "tcp")
A_FEW = (
    ("cable out", "quic"),
    ("cable out", "tcp"),
    ("orchestrator moves", "quic"),
    ("worker stopped", "tcp"),
)
ALL = [(fault, kind) for fault in FAULTS for kind in KINDS]


@pytest.mark.parametrize(("fault", "kind"), ALL if "MESH_TEST_ALL_OUTAGES" in os.environ else A_FEW)
async def test_an_answer_under_way_survives(
    hosts: list[LanHost],
    model: Path,
    tmp_path: Path,
    fault: str,
    kind: str,
) -> None:
    happen, within_s = FAULTS[fault]
    async with scene(hosts, model, tmp_path, kind) as place:
        undisturbed = await place.ask(Answer())
        answer = Answer()
        seen = len(place.node.events)
        with trio.fail_after(120 + OUTAGE_S + STOPPED_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(place.ask, answer)
                await answer.has(BEFORE)
                await happen(place)
                healed_s = time.monotonic()
                took_s = await answer.said_after(healed_s) - healed_s
                print(f"{kind}: the next token after {took_s:.3f} s")  # pytest -s shows it
        assert answer.tokens == undisturbed
        told = [one["text"] for one in place.node.events[seen:] if one["event"] != "path"]
        assert not any("ready" in text or "lost" in text for text in told), told
        if within_s is not None:
            pause_s = statistics.median(
                b - a for a, b in zip(answer.heard_at_s[:50], answer.heard_at_s[1:51], strict=True)
            )
            assert took_s <= within_s + SLACK_S + pause_s
