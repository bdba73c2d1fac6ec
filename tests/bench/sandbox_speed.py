"""What the sandbox costs: the same model half on a worker with it and half on one without.

Both deployments stand at once, and requests go to them by turns, so that the machine's noise
hits both alike; a figure is the ratio within a pair. `python -m tests.bench.sandbox_speed`.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import httpx
import trio

from meshnode.cli.engine import build_showing_progress
from meshnode.config import SandboxMode
from meshnode.demo.nodes import invite_token, open_node, write_token
from meshnode.engine.build import BuildOptions
from tests.bench.first_light import (
    CTX_TOKENS,
    LOCAL_LAYERS,
    SAME_LAYOUT,
    Bench,
    bench_model,
    tokens_per_s,
)


@dataclass(frozen=True)
class Pairs:
    """Tokens/s with and without, pair by pair."""

    confined: tuple[float, ...]
    free: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        return [one / other for one, other in zip(self.confined, self.free, strict=True)]

    def describe(self) -> str:
        low, middle, high = statistics.quantiles(self.ratios, n=4)
        return (
            f"With the sandbox: {middle:.3f} of the speed without (median of {len(self.ratios)} "
            f"pairs taken by turns, quartiles {low:.3f} to {high:.3f}; medians "
            f"{statistics.median(self.confined):.1f} and {statistics.median(self.free):.1f} tok/s)."
        )


async def run_pairs(bench: Bench, count: int, starts: int, say: Callable[[str], None]) -> Pairs:
    """`count` pairs, shared by `starts` pairs of processes: where a process lies in memory makes it
    faster or slower for as long as it lives, by more than what is looked for."""
    speeds: dict[SandboxMode, list[float]] = {SandboxMode.REQUIRE: [], SandboxMode.OFF: []}
    for start in range(starts):
        modes = list(speeds) if start % 2 else list(reversed(speeds))
        async with _deployment(bench, modes[0]) as one, _deployment(bench, modes[1]) as other:
            clients = dict(zip(modes, (one, other), strict=True))
            for number in range(count // starts + 1):
                for mode in modes if number % 2 else reversed(modes):
                    speed = await tokens_per_s(clients[mode], bench.tokens)
                    if number:
                        speeds[mode].append(speed)
    pairs = Pairs(tuple(speeds[SandboxMode.REQUIRE]), tuple(speeds[SandboxMode.OFF]))
    say(pairs.describe())
    return pairs


@asynccontextmanager
async def _deployment(bench: Bench, mode: SandboxMode) -> AsyncIterator[httpx.AsyncClient]:
    """A worker, an orchestrator that serves with it, and a client of that."""
    name = f"sandbox-{mode.value}"
    local = ("--listen", "127.0.0.1:0", "--threads", "1")
    async with open_node(
        *("worker", *local, "--sandbox", mode.value, "--models", str(bench.model.parent)),
        name=name,
        home=bench.folder / name,
        log_folder=bench.folder,
    ) as worker:
        token = invite_token(await worker.wait_event("invite"))
        token_file = write_token(bench.folder / f"{name}.token", token)
        async with open_node(
            *("serve", *local, "--http", "127.0.0.1:0", "--join-file", str(token_file)),
            *("--model", str(bench.model), "--ctx", str(CTX_TOKENS)),
            *("--layers", f"local=0:{LOCAL_LAYERS - 1},{name}={LOCAL_LAYERS}:output"),
            name=f"to-{name}",
            home=bench.folder / f"to-{name}",
            log_folder=bench.folder,
            engine_options=SAME_LAYOUT,
        ) as node:
            url = (await node.wait_event("ready"))["url"]
            async with httpx.AsyncClient(base_url=url, timeout=600) as client:
                yield client


@click.command()
@click.option("--pairs", type=click.IntRange(4), default=20)
@click.option("--starts", type=click.IntRange(1), default=5)
@click.option("--tokens", type=click.IntRange(8), default=32)
def main(pairs: int, starts: int, tokens: int) -> None:
    """A synthetic model, half of it on a worker."""
    engine = build_showing_progress(BuildOptions())
    with tempfile.TemporaryDirectory(prefix="mesh-bench-") as name:
        folder = Path(name)
        model = bench_model(folder)
        bench = Bench(model, engine, engine, folder, tokens, pairs)
        trio.run(run_pairs, bench, pairs, starts, click.echo)


if __name__ == "__main__":
    main()
