"""Load time and speed: alone, with stock RPC over TCP, with mesh over its links, in one run.

They take turns, round by round, so that a drift of the machine's speed hits them alike; each
figure is the median over the rounds. One thread per engine process. Half of the layers and the
output are on the second process in both distributed cases.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from meshnode.demo.nodes import invite_token, open_node, write_token
from meshnode.engine.cache import Engine
from meshnode.engine.children import child_environment, open_child
from meshnode.engine.llama_server import LlamaServerOptions, open_llama_server
from tests.engine.synthetic import make_model

LINKS = ("quic", "tcp", "webrtc")
ALONE, STOCK = "alone", "stock RPC, TCP"
LAYERS = 16
LOCAL_LAYERS = 8
REMOTE_LAYERS = LAYERS - LOCAL_LAYERS + 1  # with the output
CTX_TOKENS = 512
SAME_LAYOUT = ("--no-repack",)
PROMPT = "one two three four five"


@dataclass(frozen=True)
class Bench:
    """Where to find what, and how much of it to do."""

    model: Path
    engine: Engine
    stock: Engine
    folder: Path
    tokens: int
    rounds: int


@dataclass(frozen=True)
class Round:
    """One round of one case. `sent_bytes`: to the second process, None where nobody counted."""

    load_s: float
    tokens_per_s: float
    sent_bytes: int | None = None
    bytes_per_token: float | None = None


@dataclass(frozen=True)
class Case:
    name: str
    rounds: tuple[Round, ...]

    def median(self, figure: Callable[[Round], float]) -> float:
        return statistics.median(figure(one) for one in self.rounds)


def bench_model(folder: Path, vocab: int = 32000) -> Path:
    """The model of all benchmarks, in a folder of its own. vocab: what a row of logits weighs."""
    models = folder / "models"
    models.mkdir()
    return make_model(
        models / "bench.gguf", layers=LAYERS, width=1024, vocab=vocab, heads=16, ffn=2816
    )


async def run_bench(bench: Bench, say: Callable[[str], None]) -> tuple[Case, ...]:
    cases: dict[str, list[Round]] = {ALONE: [], STOCK: []}
    cases |= {f"mesh, {kind}": [] for kind in LINKS}
    async with _worker(bench) as token:
        for number in range(bench.rounds + 1):
            for name, run in (
                (ALONE, _alone(bench)),
                (STOCK, _stock(bench)),
                *((f"mesh, {kind}", _mesh(bench, token, kind)) for kind in LINKS),
            ):
                result = await run
                warm = "" if number else " (warm-up, not counted)"
                say(f"{name}: load {result.load_s:.2f} s, {result.tokens_per_s:.1f} tok/s{warm}")
                if number:
                    cases[name].append(result)
    return tuple(Case(name, tuple(rounds)) for name, rounds in cases.items())


async def _alone(bench: Bench) -> Round:
    options = _options(bench, "alone", gpu_layers=0)
    started = time.perf_counter()
    async with open_llama_server(bench.stock, options, log=bench.folder / "alone.log") as server:
        load_s = time.perf_counter() - started
        async with server.client() as client:
            return Round(load_s, await tokens_per_s(client, bench.tokens))


async def _stock(bench: Bench) -> Round:
    port = _free_port()
    argv = [str(bench.stock.binary("ggml-rpc-server")), "-p", str(port), "-t", "1"]
    async with open_child(
        argv, env=child_environment(), log=bench.folder / "stock-rpc.log", name="stock rpc-server"
    ):
        await _until_listening(port)
        options = _options(bench, "stock", gpu_layers=REMOTE_LAYERS, rpc=f"127.0.0.1:{port}")
        log = bench.folder / "stock.log"
        started = time.perf_counter()
        async with open_llama_server(bench.stock, options, log=log) as server:
            load_s = time.perf_counter() - started
            async with server.client() as client:
                return Round(load_s, await tokens_per_s(client, bench.tokens))


@asynccontextmanager
async def _worker(bench: Bench) -> AsyncIterator[Path]:
    """One mesh worker for all rounds; yields the file with its token."""
    async with open_node(
        *("worker", "--listen", "127.0.0.1:0", "--threads", "1"),
        *("--models", str(bench.model.parent)),
        name="worker",
        home=bench.folder / "worker",
        log_folder=bench.folder,
    ) as worker:
        token = invite_token(await worker.wait_event("invite"))
        yield write_token(bench.folder / "token", token)


async def _mesh(bench: Bench, token: Path, kind: str) -> Round:
    started = time.perf_counter()
    async with open_node(
        *(
            "serve",
            "--transport",
            kind,
            "--listen",
            "127.0.0.1:0",
            "--http",
            "127.0.0.1:0",
            "--threads",
            "1",
        ),
        *("--model", str(bench.model), "--ctx", str(CTX_TOKENS), "--join-file", str(token)),
        *("--layers", f"local=0:{LOCAL_LAYERS - 1},worker={LOCAL_LAYERS}:output"),
        name="orchestrator",
        home=bench.folder / "orchestrator",
        log_folder=bench.folder,
        engine_options=SAME_LAYOUT,
    ) as node:
        url = (await node.wait_event("ready"))["url"]
        load_s = time.perf_counter() - started
        async with httpx.AsyncClient(base_url=url, timeout=600) as client:
            loaded = await _wire_bytes(client)
            speed = await tokens_per_s(client, bench.tokens)
            total = await _wire_bytes(client)
        per_token = (total - loaded) / (bench.tokens + WARM_UP_TOKENS)
        return Round(load_s, speed, loaded, per_token)


WARM_UP_TOKENS = 8


async def _wire_bytes(client: httpx.AsyncClient) -> int:
    status: dict[str, Any] = (await client.get("/api/v1/status")).json()
    return sum(peer["bytes_in"] + peer["bytes_out"] for peer in status["peers"])


async def tokens_per_s(client: httpx.AsyncClient, tokens: int) -> float:
    for count in (WARM_UP_TOKENS, tokens):
        response = await client.post(
            "/v1/completions",
            json={
                "prompt": PROMPT,
                "max_tokens": count,
                "temperature": 0,
                "ignore_eos": True,
                "cache_prompt": False,
            },
        )
        response.raise_for_status()
    return float(response.json()["timings"]["predicted_per_second"])


def _options(
    bench: Bench, name: str, *, gpu_layers: int, rpc: str | None = None
) -> LlamaServerOptions:
    return LlamaServerOptions(
        model=bench.model,
        socket_path=bench.folder / f"{name}.sock",
        ctx_tokens=CTX_TOKENS,
        rpc=(rpc,) if rpc else (),
        gpu_layers=gpu_layers,
        devices=("RPC0",) if rpc else (),
        tensor_split=(gpu_layers,) if rpc else (),
        threads=1,
        extra=SAME_LAYOUT,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def _until_listening(port: int) -> None:
    import trio

    with trio.fail_after(30):
        while True:
            try:
                stream = await trio.open_tcp_stream("127.0.0.1", port)
            except OSError:
                await trio.sleep(0.02)
            else:
                await stream.aclose()
                return


def table(cases: tuple[Case, ...]) -> str:
    """Markdown: one row a case, ratios against alone and against stock RPC."""
    alone, stock = cases[:2]
    lines = [
        "| case | load, s | load vs stock RPC | tok/s | vs alone | vs stock RPC |",
        "|---|---|---|---|---|---|",
    ]
    for case in cases:
        load_s = case.median(lambda one: one.load_s)
        speed = case.median(lambda one: one.tokens_per_s)
        lines.append(
            f"| {case.name} | {load_s:.2f} | {load_s / stock.median(lambda o: o.load_s):.2f} "
            f"| {speed:.1f} | {speed / alone.median(lambda o: o.tokens_per_s):.2f} "
            f"| {speed / stock.median(lambda o: o.tokens_per_s):.2f} |"
        )
    return "\n".join(lines)
