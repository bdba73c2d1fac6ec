"""`./just bench engine [ROW…]`: ours beside the stock engine, in one run, over the same links."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from meshnode.cli.engine import build_showing_progress
from meshnode.engine.build import BuildOptions
from meshnode.engine.cache import load_engine
from tests.bench.benchmarks_page import has, part, put
from tests.bench.engine_chapter import Chapter, Run
from tests.bench.engine_gateway import GATEWAY
from tests.bench.engine_large import LARGE_LOAD
from tests.bench.engine_latency import LATENCY
from tests.bench.engine_measures import Sample
from tests.bench.engine_ngram import NGRAM_COST
from tests.bench.engine_reading import READING
from tests.bench.engine_rows import Row, rows
from tests.bench.engine_sides import MESH, STOCK, Side, deployment
from tests.bench.engine_tables import (
    Outcome,
    commands_table,
    count_rounds,
    machine,
    result_line,
    results_table,
    with_line,
)
from tests.bench.engine_wire_types import WIRE_TYPES
from tests.engine.processes import EngineFailed

CHAPTERS = (GATEWAY, LATENCY, READING, LARGE_LOAD, NGRAM_COST, WIRE_TYPES)


@click.command()
@click.argument("names", metavar="[ROW]…", nargs=-1)
@click.option("--rounds", type=click.IntRange(1), default=5)
@click.option("--tokens", type=click.IntRange(8), default=64)
@click.option("--models", type=click.Path(path_type=Path), help="Default: in MESH_CACHE.")
@click.option("--side", type=click.Choice((STOCK, MESH)), multiple=True, help="Default: both.")
@click.option("--engine", type=click.Path(path_type=Path), help="Another patched bin folder.")
@click.option("--list", "lists", is_flag=True, help="Name the rows and tables.")
@click.option("--write", is_flag=True, help="Put the tables into docs/benchmarks.md.")
def engine(
    names: tuple[str, ...],
    rounds: int,
    tokens: int,
    models: Path | None,
    side: tuple[str, ...],
    engine: Path | None,
    lists: bool,
    write: bool,
) -> None:
    """Load, tokens and prefill over links with a delay: stock RPC and ours by turns."""
    chosen = choose((*rows(models), *CHAPTERS), names)
    if lists:
        for one in chosen:
            click.echo(f"{one.name:14} {one.title}")
        return
    sides = tuple(one for one in find_sides(engine) if not side or one.name in side)
    run = Run(sides, rounds, tokens, models, click.echo)
    outcomes = [run_row(run, one) for one in chosen if isinstance(one, Row)]
    told = {one.name: one.tell(run) for one in chosen if isinstance(one, Chapter)}
    described = describe(run)
    click.echo(f"\n{described}")
    if outcomes:
        click.echo("\n" + results_table([result_line(outcome) for outcome in outcomes]))
    for text in (*(commands_table(outcome) for outcome in outcomes), *told.values()):
        if text:
            click.echo(f"\n{text}")
    if write:
        put_rows(outcomes)
        put_parts({name: f"{described}\n\n{text}" for name, text in told.items()})


def choose(known: tuple[Row | Chapter, ...], names: tuple[str, ...]) -> list[Row | Chapter]:
    unknown = set(names) - {one.name for one in known}
    if unknown:
        raise click.UsageError(
            f"no row is called {', '.join(sorted(unknown))}: ask `./just bench engine --list`"
        )
    return [one for one in known if not names or one.name in names]


def find_sides(patched: Path | None) -> list[Side]:
    ours = load_engine(patched) if patched else build_showing_progress(BuildOptions())
    return [Side(STOCK, build_showing_progress(BuildOptions(stock=True))), Side(MESH, ours)]


def run_row(run: Run, row: Row) -> Outcome:
    samples: dict[str, list[Sample]] = {side.name: [] for side in run.sides}
    for number in range(run.rounds):
        for side in run.sides:
            with _explained(row, side), deployment(side, row.setup) as deployed:
                sample = row.measure(deployed, run.tokens)
            samples[side.name].append(sample)
            figures = [f"{sample.figure:.2f} {row.unit}"]
            figures += [f"{name} {value:.3g}" for name, value in sample.notes.items()]
            run.say(f"{row.name}, round {number + 1}, {side.name}: {', '.join(figures)}")
    return Outcome(row, {name: tuple(found) for name, found in samples.items()})


@contextmanager
def _explained(row: Row, side: Side) -> Iterator[None]:
    try:
        yield
    except EngineFailed as failure:
        last = "\n".join(failure.log.splitlines()[-15:])
        raise click.ClickException(
            f"{row.name}: the {side.name} engine ended with status {failure.returncode}:\n{last}"
        ) from failure


def describe(run: Run) -> str:
    today = datetime.datetime.now(datetime.UTC).date()
    measured = f"Median of {count_rounds(run.rounds)}, {run.tokens} tokens a measurement."
    return f"{today}; {machine()}. {measured}"


def put_rows(outcomes: Sequence[Outcome]) -> None:
    """Each line of the table for itself, so that rows can be measured at different times."""
    for outcome in outcomes:
        put("engine", with_line(part("engine"), result_line(outcome)))
    put_parts({outcome.row.name: commands_table(outcome) for outcome in outcomes})


def put_parts(texts: Mapping[str, str]) -> None:
    """What has a place of its own there; the other rows' commands are only printed."""
    for name, text in texts.items():
        if text and has(name):
            put(name, text)
