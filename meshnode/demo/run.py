"""The demonstration: two nodes on this machine, one model, one answer, and what it cost.

A worker and an orchestrator, each with a home of its own, are joined by an invite over a QUIC
tunnel on loopback. The model answers with its layers on both; then it answers alone, and the two
are held against each other token by token.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from meshnode.demo.nodes import NodeFailed, NodeProcess, invite_token, open_node, write_token
from meshnode.nurseries import bare_nursery
from meshnode.pipeline.wording import layers_text

QUESTION = "What is mesh?"
COMPARED_TOKENS = 64
REQUEST_TIMEOUT_S = 120.0
# One layout of the weights on both sides, so that the same tokens come out (docs/engine.md).
SAME_LAYOUT = ("--no-repack",)
# Two nodes share this machine: engine threads that outnumber its cores only wait for one another.
THREADS = ("--threads", str(max(1, (os.cpu_count() or 1) // 2)))
ON_LOOPBACK = ("--listen", "127.0.0.1:0", *THREADS)

Say = Callable[[str], None]
SayPart = Callable[[str], None]


@dataclass(frozen=True)
class Greedy:
    """64 greedy tokens: their ids, the speed, and the bytes that crossed the tunnel for each."""

    tokens: tuple[int, ...]
    tokens_per_s: float
    wire_bytes_per_token: float


@dataclass(frozen=True)
class Outcome:
    """What the demo saw. `weight_bytes`: weights that crossed the tunnel."""

    answer: str
    layers: tuple[dict[str, Any], ...]
    weight_bytes: int
    mesh: Greedy
    alone: Greedy

    @property
    def same_tokens(self) -> bool:
        return self.mesh.tokens == self.alone.tokens and len(self.mesh.tokens) == COMPARED_TOKENS

    @property
    def ok(self) -> bool:
        return self.same_tokens and self.weight_bytes == 0 and bool(self.answer.strip())


@asynccontextmanager
async def open_mesh(
    folder: Path, *serve_arguments: str, http: str = "127.0.0.1:0"
) -> AsyncIterator[tuple[NodeProcess, NodeProcess, str]]:
    """A worker, an orchestrator that joined it, and the endpoint's URL, once it is ready."""
    async with open_node(
        "worker", *ON_LOOPBACK, name="worker", home=folder / "worker", log_folder=folder
    ) as worker:
        token = invite_token(await worker.wait_event("invite"))
        token_file = write_token(folder / "token", token)
        async with open_node(
            "serve",
            *ON_LOOPBACK,
            *("--join-file", str(token_file), "--http", http, "--split", "always"),
            *serve_arguments,
            name="orchestrator",
            home=folder / "orchestrator",
            log_folder=folder,
            engine_options=SAME_LAYOUT,
        ) as orchestrator:
            ready = await orchestrator.wait_event("ready")
            yield worker, orchestrator, str(ready["url"])


@asynccontextmanager
async def open_alone(folder: Path) -> AsyncIterator[str]:
    """The same model on one node, and the endpoint's URL."""
    async with open_node(
        "serve",
        *ON_LOOPBACK,
        *("--http", "127.0.0.1:0", "--split", "never"),
        name="alone",
        home=folder / "alone",
        log_folder=folder,
        engine_options=SAME_LAYOUT,
    ) as alone:
        yield str((await alone.wait_event("ready"))["url"])


async def run_demo(say: Say, say_part: SayPart) -> Outcome:
    """Raises `NodeFailed` when a node does not come up."""
    folder = Path(tempfile.mkdtemp(prefix="mesh-demo-"))
    try:
        say("starting a worker, and an orchestrator that joins it with the worker's invite ...")
        async with open_mesh(folder) as (_worker, _orchestrator, url):
            say(f"\n> {QUESTION}")
            answer = await stream_answer(url, QUESTION, say_part)
            say("")
            mesh = await greedy(url)
            status = await fetch_status(url)
        say("\nthe same model alone ...")
        async with open_alone(folder) as url:
            alone = await greedy(url)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Outcome(
        answer=answer,
        layers=tuple(status["layers"]),
        weight_bytes=sum(load["sent_bytes"] for load in status["load"]),
        mesh=mesh,
        alone=alone,
    )


async def stream_answer(url: str, question: str, say_part: SayPart) -> str:
    """Asks as any OpenAI client would and passes each piece on as it comes."""
    body = {
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 160,
        "stream": True,
    }
    answer = ""
    with _told():
        async with (
            httpx.AsyncClient(timeout=REQUEST_TIMEOUT_S) as client,
            client.stream("POST", f"{url}/v1/chat/completions", json=body) as response,
        ):
            if response.status_code != 200:
                await response.aread()
                raise _refusal(response)
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    piece = _piece(json.loads(line.removeprefix("data: ")))
                    say_part(piece)
                    answer += piece
    return answer


@contextmanager
def _told() -> Iterator[None]:
    """Turns what a connection can do into the demo's own error."""
    try:
        yield
    except httpx.HTTPError as error:
        raise NodeFailed(f"the endpoint did not answer ({error!r}): run the demo again") from error


def _refusal(response: httpx.Response) -> NodeFailed:
    return NodeFailed(f"the endpoint answered {response.status_code}: {response.text[:300]}")


def _piece(chunk: dict[str, Any]) -> str:
    if "error" in chunk:
        raise NodeFailed(f"the answer broke off: {chunk['error'].get('message')}")
    choices = chunk.get("choices") or [{}]
    return choices[0].get("delta", {}).get("content") or ""


async def greedy(url: str) -> Greedy:
    """64 tokens, each the most likely one."""
    body = {
        "prompt": "mesh is",
        "temperature": 0,
        "max_tokens": COMPARED_TOKENS,
        "ignore_eos": True,
        "logprobs": 1,
        "cache_prompt": False,
    }
    with _told():
        async with httpx.AsyncClient(timeout=REQUEST_TIMEOUT_S) as client:
            await client.post(f"{url}/v1/completions", json=body | {"max_tokens": 4})  # warm up
            before = await _wire_bytes(url)
            response = await client.post(f"{url}/v1/completions", json=body)
            after = await _wire_bytes(url)
    if response.status_code != 200:
        raise _refusal(response)
    answer = response.json()
    tokens = tuple(token["id"] for token in answer["choices"][0]["logprobs"]["content"])
    return Greedy(
        tokens=tokens,
        tokens_per_s=answer["timings"]["predicted_per_second"],
        wire_bytes_per_token=(after - before) / max(1, len(tokens)),
    )


async def _wire_bytes(url: str) -> int:
    status = await fetch_status(url)
    return sum(peer["bytes_in"] + peer["bytes_out"] for peer in status["peers"])


async def fetch_status(url: str) -> dict[str, Any]:
    with _told():
        async with httpx.AsyncClient(timeout=REQUEST_TIMEOUT_S) as client:
            status: dict[str, Any] = (await client.get(f"{url}/api/v1/status")).json()
    return status


def summary(outcome: Outcome) -> str:
    """The lines the demo ends in."""
    lines = [
        f"layers on {share['node']}: " + layers_text(share["first"], share["last"], share["output"])
        for share in outcome.layers
    ]
    lines += [
        f"weight bytes over the wire: {outcome.weight_bytes}",
        f"wire bytes per token: {outcome.mesh.wire_bytes_per_token:.0f}",
        f"tok/s on the mesh: {outcome.mesh.tokens_per_s:.1f}",
        f"tok/s alone: {outcome.alone.tokens_per_s:.1f}",
        f"same tokens as alone: {'yes' if outcome.same_tokens else 'NO'}",
    ]
    return "\n".join(lines)


async def stay(http: str, say: Say) -> None:
    """The demo's mesh, up until cancelled. Raises `NodeFailed` as soon as one node ends."""
    folder = Path(tempfile.mkdtemp(prefix="mesh-demo-"))
    try:
        async with open_mesh(folder, http=http) as (worker, orchestrator, url):
            say(f"chat endpoint: {url}/v1 - stop with Ctrl-C, or `./just stop` elsewhere")
            async with bare_nursery() as nursery:
                nursery.start_soon(worker.fail_at_end)
                nursery.start_soon(orchestrator.fail_at_end)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
