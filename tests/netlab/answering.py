"""A worker and an orchestrator on hosts of the lab, and an answer under way between them."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import trio

from meshnode.demo.nodes import NodeProcess, invite_token, open_node, write_token
from tests.engine.synthetic import make_model

TOKENS = 600
BEFORE = 100  # tokens, until the fault
URL = "http://127.0.0.1:8090"


class Host(Protocol):
    @property
    def prefix(self) -> tuple[str, ...]:
        """What to put before a command to run it there."""


@dataclass
class Answers:
    """As they come, one after another."""

    each: list[list[str]] = field(default_factory=list)  # its tokens
    heard_at_s: list[float] = field(default_factory=list)  # each token; time.monotonic
    news: trio.lowlevel.ParkingLot = field(default_factory=trio.lowlevel.ParkingLot)

    def take(self, line: bytes) -> None:
        at_s, _, event = line.decode().partition(" ")
        if event == "[DONE]":
            return
        said = json.loads(event)
        assert "error" not in said, said
        self.each[-1].append(said["choices"][0]["text"])
        self.heard_at_s.append(float(at_s))
        self.news.unpark_all()

    async def has(self, count: int) -> None:
        while len(self.heard_at_s) < count:
            await self.news.park()

    async def said_after(self, moment_s: float) -> float:
        while not self.heard_at_s or self.heard_at_s[-1] <= moment_s:
            await self.news.park()
        return next(at_s for at_s in self.heard_at_s if at_s > moment_s)

    @property
    def pause_s(self) -> float:
        """Between two tokens, as long as nothing happened."""
        return statistics.median(b - a for a, b in pairwise(self.heard_at_s[:50]))


@dataclass
class Scene:
    """here: the orchestrator `node`. there: the worker."""

    here: Host
    there: Host
    node: NodeProcess
    worker: NodeProcess

    async def ask(self, answers: Answers) -> list[str]:
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
        tokens: list[str] = []
        answers.each.append(tokens)
        async with trio.open_nursery() as nursery:
            process: trio.Process = await nursery.start(run)
            assert process.stdout is not None
            rest = b""
            async for chunk in process.stdout:
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    answers.take(line)
        return tokens

    async def survives(self, happen: Fault, within_s: float) -> tuple[Answers, float]:
        """An answer completes during which this happens, and is the undisturbed one, and so do
        those asked for until it is over. Nobody is told that the worker is lost, and nothing is
        planned anew. Also how long after the fault the next token came."""
        undisturbed = await self.ask(Answers())
        answers, is_over, seen = Answers(), trio.Event(), len(self.node.events)

        async def keep_asking() -> None:
            while not is_over.is_set():
                await self.ask(answers)

        with trio.fail_after(within_s):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(keep_asking)
                await answers.has(BEFORE)
                await happen(self)
                healed_s = time.monotonic()
                took_s = await answers.said_after(healed_s) - healed_s
                is_over.set()
                print(f"the next token after {took_s:.3f} s")  # pytest -s shows it
        assert all(tokens == undisturbed for tokens in answers.each)
        told = [one["text"] for one in self.node.events[seen:] if one["event"] != "path"]
        assert not any("ready" in text or "lost worker" in text for text in told), told
        return answers, took_s


Fault = Callable[[Scene], Awaitable[None]]


@asynccontextmanager
async def open_scene(
    here: Host,
    there: Host,
    model: Path,
    folder: Path,
    options: Sequence[str],
    *,
    token: Path | None = None,
    environments: Sequence[Mapping[str, str]] = ({}, {}),
) -> AsyncIterator[Scene]:
    """options: of both nodes. token: of another node, by which both join; otherwise the worker's.
    environments: of the orchestrator and of the worker."""
    common = ("--threads", "1", *options)
    join = () if token is None else ("--join-file", str(token))
    async with open_node(
        *("worker", *common, *join, "--models", str(model.parent)),
        name="worker",
        home=folder / "worker",
        log_folder=folder,
        prefix=there.prefix,
        environment=environments[1],
    ) as worker:
        if token is None:
            token = write_token(folder / "token", invite_token(await worker.wait_event("invite")))
        async with open_node(
            *("serve", *common, "--model", str(model), "--ctx", "1024"),
            *("--join-file", str(token), "--layers", "local=0:3,worker=4:output"),
            name="orchestrator",
            home=folder / "orchestrator",
            log_folder=folder,
            engine_options=("--no-repack",),
            prefix=here.prefix,
            environment=environments[0],
        ) as node:
            await node.wait_event("ready", timeout_s=300)
            yield Scene(here, there, node, worker)


def small_model(folder: Path) -> Path:
    return make_model(folder / "small.gguf", layers=8, width=128, ffn=256, seed=1, name="small")
