"""What the gateway costs: `mesh serve` alone beside its own llama-server, asked directly.

One llama-server for both, since two differ by a few percent wherever their memory came to lie. It
is asked by turns at the gateway's port and at its socket, as streams, each time over a new
connection (llama-server ends an idle one at a moment of its own). The client is a bare socket on
both sides, and the prompt one word: what a client's library or a prompt's own noise adds would be
told as the gateway's.
"""

from __future__ import annotations

import json
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from urllib.parse import urlsplit

import psutil
import trio

from meshnode.demo.nodes import NodeProcess, open_node
from tests.bench.engine_chapter import Chapter, Run, verdict
from tests.bench.engine_model import SMALL, written_model

WHOLE_A_ROUND = 4
"""Answers of as many tokens as the command line asked for, for their speed."""
SHORT_A_ROUND = 20
"""Answers of two tokens, for the time to the first: it needs more of them, and they are cheap."""
SHORT_TOKENS = 2
CTX_TOKENS = 512
SPEED_TO_REACH = 0.98
FIRST_TOKEN_TO_REACH_S = 0.003
READ_BYTES = 65536
ANSWER_LIMIT_S = 600.0

Place = str | tuple[str, int]
"""A unix socket's path, or a host and port."""


@dataclass(frozen=True)
class Answer:
    """When it was asked for, and when each token came."""

    asked_at_s: float
    tokens_at_s: tuple[float, ...]

    @property
    def first_token_s(self) -> float:
        return self.tokens_at_s[0] - self.asked_at_s

    @property
    def tokens_per_s(self) -> float:
        return (len(self.tokens_at_s) - 1) / (self.tokens_at_s[-1] - self.tokens_at_s[0])


@dataclass(frozen=True)
class Pair:
    """Two answers, one right after the other: a drift of the machine's speed meets both."""

    direct: Answer
    through: Answer


def tell_gateway(run: Run) -> str:
    if run.mesh is None:
        return ""
    with tempfile.TemporaryDirectory(prefix="mesh-b-", dir="/tmp") as name:
        whole, short = trio.run(_compare, run, written_model(SMALL, run.models), Path(name))
    speeds = [(pair.direct.tokens_per_s, pair.through.tokens_per_s) for pair in whole]
    firsts = [(pair.direct.first_token_s, pair.through.first_token_s) for pair in short]
    ratios = [far / near for near, far in speeds]
    added_ms = [(far - near) * 1e3 for near, far in firsts]
    is_fast = median(ratios) >= SPEED_TO_REACH
    is_prompt = median(added_ms) <= FIRST_TOKEN_TO_REACH_S * 1e3
    near_speed, far_speed = (median(side) for side in zip(*speeds, strict=True))
    near_ms, far_ms = (median(side) * 1e3 for side in zip(*firsts, strict=True))
    return "\n".join(
        (
            f"Through the gateway, no worker ({SMALL.describe()}), pair by pair, in brackets the "
            f"middle half: {len(whole)} pairs of answers for the speed, {len(short)} of "
            f"{SHORT_TOKENS} tokens for the first:",
            "",
            "| | llama-server directly | through `mesh serve` | | to reach | |",
            "|---|---|---|---|---|---|",
            f"| tok/s | {near_speed:.1f} | {far_speed:.1f} "
            f"| {median(ratios):.3f} × ({_middle_half(ratios, '.3f')}) "
            f"| ≥ {SPEED_TO_REACH} × | {verdict(is_fast)} |",
            f"| time to the first token | {near_ms:.1f} ms | {far_ms:.1f} ms "
            f"| {median(added_ms):+.1f} ms ({_middle_half(added_ms, '+.1f')}) "
            f"| ≤ {FIRST_TOKEN_TO_REACH_S * 1e3:.0f} ms more | {verdict(is_prompt)} |",
        )
    )


def _middle_half(values: Sequence[float], form: str) -> str:
    low, _, high = quantiles(values, n=4)
    return f"{low:{form}} to {high:{form}}"


async def _compare(run: Run, model: Path, folder: Path) -> tuple[list[Pair], list[Pair]]:
    whole: list[Pair] = []
    short: list[Pair] = []
    async with _mesh_serve(model, folder) as node:
        url = urlsplit((await node.wait_event("ready"))["url"])
        through = (str(url.hostname), int(url.port or 0))
        ask = partial(_ask_both, _llama_server_socket(node), through)
        await ask(run.tokens, direct_first=True)
        for _ in range(run.rounds):
            for number in range(SHORT_A_ROUND):
                short.append(await ask(SHORT_TOKENS, direct_first=number % 2 == 0))
            for number in range(WHOLE_A_ROUND):
                whole.append(await ask(run.tokens, direct_first=number % 2 == 0))
            last = whole[-1]
            speeds = f"{last.direct.tokens_per_s:.1f}, {last.through.tokens_per_s:.1f}"
            run.say(f"gateway: {speeds} tok/s")
    return whole, short


@asynccontextmanager
async def _mesh_serve(model: Path, folder: Path) -> AsyncIterator[NodeProcess]:
    async with open_node(
        *("serve", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--threads", "1"),
        *("--model", str(model), "--ctx", str(CTX_TOKENS), "--split", "never", "--no-mdns"),
        name="orchestrator",
        home=folder / "home",
        log_folder=folder,
    ) as node:
        yield node


def _llama_server_socket(node: NodeProcess) -> str:
    children = psutil.Process(node.pid).children(recursive=True)
    command = next(child for child in children if child.name() == "llama-server").cmdline()
    return command[command.index("--host") + 1]


async def _ask_both(direct: str, through: Place, tokens: int, *, direct_first: bool) -> Pair:
    """Who is asked second finds the processor as the first left it: they change places."""
    if direct_first:
        near = await _ask(direct, tokens)
        return Pair(near, await _ask(through, tokens))
    far = await _ask(through, tokens)
    return Pair(await _ask(direct, tokens), far)


async def _ask(place: Place, tokens: int) -> Answer:
    """In a thread: what else this program does is not to be waited for."""
    return await trio.to_thread.run_sync(_answer, place, tokens)


def _answer(place: Place, tokens: int) -> Answer:
    body = {
        "prompt": "one",
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": False,
        "stream": True,
    }
    request = _request(json.dumps(body).encode())
    came: list[float] = []
    began = time.perf_counter()
    with socket.socket(socket.AF_UNIX if isinstance(place, str) else socket.AF_INET) as client:
        client.settimeout(ANSWER_LIMIT_S)
        client.connect(place)
        client.sendall(request)
        status = unfinished = b""
        while data := client.recv(READ_BYTES):
            now = time.perf_counter()
            *lines, unfinished = (unfinished + data).split(b"\n")
            status = status or lines[0]
            came += [now for line in lines if b'"finish_reason":null' in line]
    assert b" 200 " in status, status
    assert len(came) == tokens, f"{len(came)} tokens came of {tokens}"
    return Answer(began, tuple(came))


def _request(body: bytes) -> bytes:
    lines = (
        "POST /v1/completions HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
    )
    return "\r\n".join((*lines, "", "")).encode() + body


GATEWAY = Chapter("gateway", "mesh serve alone beside its llama-server directly", tell_gateway)
