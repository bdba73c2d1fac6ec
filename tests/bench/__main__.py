"""`./just bench`: the committed benchmark, in one run, with its machine. `./just bench tunnels`:
what tunnels cost; `./just bench engine`: the engine beside the stock one; `./just bench pull`:
pulling from a web server beside curl; `./just bench plan`: predictions beside measurements."""

from __future__ import annotations

import datetime
import statistics
import tempfile
from pathlib import Path

import click
import trio

from meshnode.cli.engine import build_showing_progress
from meshnode.engine.build import BuildOptions
from tests.bench.benchmarks_page import put
from tests.bench.engine import engine
from tests.bench.engine_tables import machine
from tests.bench.first_light import LAYERS, Bench, Case, bench_model, run_bench, table
from tests.bench.idle import idle
from tests.bench.planned import plan
from tests.bench.pull_speed import pull
from tests.bench.quic_speed import quic
from tests.bench.sandbox_speed import run_pairs
from tests.bench.tunnels import tunnels

PAIRS_A_ROUND = 4


@click.group(invoke_without_command=True)
@click.pass_context
@click.option("--rounds", type=click.IntRange(1), default=5)
@click.option("--tokens", type=click.IntRange(8), default=64)
@click.option("--write", is_flag=True, help="Put the result into docs/benchmarks.md.")
def main(context: click.Context, rounds: int, tokens: int, write: bool) -> None:
    """Alone, stock RPC over TCP, mesh over the link it chooses; or one of the commands."""
    if context.invoked_subcommand is not None:
        return
    patched = build_showing_progress(BuildOptions())
    stock = build_showing_progress(BuildOptions(stock=True))
    with tempfile.TemporaryDirectory(prefix="mesh-bench-") as name:
        folder = Path(name)
        model = bench_model(folder)
        bench = Bench(model, patched, stock, folder, tokens, rounds)
        size_mb = model.stat().st_size / 1e6
        cases = trio.run(run_bench, bench, click.echo)
        pairs = trio.run(run_pairs, bench, PAIRS_A_ROUND * rounds, rounds, click.echo)
    text = report(cases, rounds, tokens, size_mb) + f"\n\n{pairs.describe()}"
    click.echo("\n" + text)
    if write:
        put("result", text)


for command in (tunnels, quic, idle, engine, pull, plan):
    main.add_command(command)


def report(cases: tuple[Case, ...], rounds: int, tokens: int, size_mb: float) -> str:
    mesh = cases[-1]
    loaded = statistics.median(one.sent_bytes or 0 for one in mesh.rounds)
    per_token = statistics.median(one.bytes_per_token or 0 for one in mesh.rounds)
    today = datetime.datetime.now(datetime.UTC).date()
    return "\n".join(
        (
            f"{today}; {machine()}.",
            f"Model: {size_mb:.0f} MB, Q8_0, {LAYERS} layers × 1024; {tokens} tokens, "
            f"median of {rounds} rounds.",
            "",
            table(cases),
            "",
            f"Over the mesh's tunnel: {loaded / 1e6:.2f} MB both ways from start to ready, "
            f"{per_token / 1e3:.1f} kB a token.",
        )
    )


if __name__ == "__main__":
    main()
