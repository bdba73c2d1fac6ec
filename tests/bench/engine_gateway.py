"""What the gateway costs: `mesh serve` alone beside llama-server alone, same model and options.

Both stay up and are asked by turns, as streams, over a new connection each time (llama-server ends
an idle one at a moment of its own); the one that is not asked computes nothing.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import httpx
import trio

from meshnode.demo.nodes import open_node
from meshnode.engine.llama_server import LlamaServerOptions, open_llama_server
from tests.bench.engine_chapter import Chapter, Run, verdict
from tests.bench.engine_model import SMALL, written_model
from tests.bench.engine_sides import Side

ASKED_A_ROUND = 4
CTX_TOKENS = 512
SPEED_TO_REACH = 0.98
FIRST_TOKEN_TO_REACH_S = 0.003
SAME_LAYOUT = ("--no-repack",)


@dataclass(frozen=True)
class Answer:
    tokens_per_s: float
    first_token_s: float


def tell_gateway(run: Run) -> str:
    if run.mesh is None:
        return ""
    with tempfile.TemporaryDirectory(prefix="mesh-b-", dir="/tmp") as name:
        model = written_model(SMALL, run.models)
        direct, through = trio.run(_compare, run, run.mesh, model, Path(name))
    speeds = [median(one.tokens_per_s for one in side) for side in (direct, through)]
    firsts = [median(one.first_token_s for one in side) for side in (direct, through)]
    # Pair by pair, so that a drift of the machine's speed meets both.
    pairs = tuple(zip(direct, through, strict=True))
    ratio = median(far.tokens_per_s / near.tokens_per_s for near, far in pairs)
    added_s = median(far.first_token_s - near.first_token_s for near, far in pairs)
    return "\n".join(
        (
            f"Through the gateway, no worker ({SMALL.describe()}), {len(direct)} answers each:",
            "",
            "| | llama-server directly | through `mesh serve` | | to reach | |",
            "|---|---|---|---|---|---|",
            f"| tok/s | {speeds[0]:.1f} | {speeds[1]:.1f} | {ratio:.3f} × "
            f"| ≥ {SPEED_TO_REACH} × | {verdict(ratio >= SPEED_TO_REACH)} |",
            f"| time to the first token | {firsts[0] * 1e3:.1f} ms | {firsts[1] * 1e3:.1f} ms "
            f"| {added_s * 1e3:+.1f} ms | ≤ {FIRST_TOKEN_TO_REACH_S * 1e3:.0f} ms more "
            f"| {verdict(added_s <= FIRST_TOKEN_TO_REACH_S)} |",
        )
    )


async def _compare(
    run: Run, side: Side, model: Path, folder: Path
) -> tuple[list[Answer], list[Answer]]:
    direct: list[Answer] = []
    through: list[Answer] = []
    async with _llama_server(side, model, folder) as near, _mesh_serve(model, folder) as far:
        for client in (near, far):
            await _ask(client, run.tokens)
        for number in range(run.rounds * ASKED_A_ROUND):
            # Who is asked second finds the processor as the first left it: they change places.
            pairs = ((near, direct), (far, through))
            for client, answers in pairs if number % 2 else pairs[::-1]:
                answers.append(await _ask(client, run.tokens))
            run.say(f"gateway: {direct[-1].tokens_per_s:.1f}, {through[-1].tokens_per_s:.1f} tok/s")
    return direct, through


@asynccontextmanager
async def _llama_server(side: Side, model: Path, folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    options = LlamaServerOptions(
        model=model,
        socket_path=folder / "direct.sock",
        ctx_tokens=CTX_TOKENS,
        threads=1,
        extra=SAME_LAYOUT,
    )
    async with (
        open_llama_server(side.engine, options, log=folder / "direct.log") as server,
        server.client() as client,
    ):
        yield client


@asynccontextmanager
async def _mesh_serve(model: Path, folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with open_node(
        *("serve", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--threads", "1"),
        *("--model", str(model), "--ctx", str(CTX_TOKENS), "--split", "never", "--no-mdns"),
        name="orchestrator",
        home=folder / "home",
        log_folder=folder,
        engine_options=SAME_LAYOUT,
    ) as node:
        url = (await node.wait_event("ready"))["url"]
        async with httpx.AsyncClient(base_url=url, timeout=600, trust_env=False) as client:
            yield client


async def _ask(client: httpx.AsyncClient, tokens: int) -> Answer:
    body = {
        "prompt": "one two three four five",
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": False,
        "stream": True,
    }
    began = time.perf_counter()
    moments: list[float] = []
    headers = {"Connection": "close"}
    async with client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"]:
                moments.append(time.perf_counter())
    return Answer((len(moments) - 1) / (moments[-1] - moments[0]), moments[0] - began)


GATEWAY = Chapter("gateway", "mesh serve alone beside llama-server directly", tell_gateway)
