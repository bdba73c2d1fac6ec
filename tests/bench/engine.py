"""`./just bench engine [ROW…]`: ours beside the stock engine, in one run, over the same links."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from meshnode.cli.engine import build_showing_progress
from meshnode.engine.build import BuildOptions
from meshnode.engine.cache import load_engine
from tests.bench.engine_measures import Sample
from tests.bench.engine_rows import Row, rows
from tests.bench.engine_sides import MESH, STOCK, Side, deployment
from tests.bench.engine_tables import Outcome, commands_table, machine, results_table
from tests.engine.processes import EngineFailed

RESULT = Path(__file__).parents[2] / "docs" / "benchmarks.md"


@click.command()
@click.argument("names", metavar="[ROW]…", nargs=-1)
@click.option("--rounds", type=click.IntRange(1), default=5)
@click.option("--tokens", type=click.IntRange(8), default=64)
@click.option("--models", type=click.Path(path_type=Path), help="Default: in MESH_CACHE.")
@click.option("--side", type=click.Choice((STOCK, MESH)), multiple=True, help="Default: both.")
@click.option("--engine", type=click.Path(path_type=Path), help="Another patched bin folder.")
@click.option("--list", "lists", is_flag=True, help="Name the rows.")
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
    chosen = choose(rows(models), names)
    if lists:
        for row in chosen:
            click.echo(f"{row.name:14} {row.title} (to reach: {row.goal.text})")
        return
    sides = [one for one in find_sides(engine) if not side or one.name in side]
    outcomes = tuple(run_row(row, sides, rounds, tokens) for row in chosen)
    text = report(outcomes, rounds, tokens)
    click.echo("\n" + text)
    if write:
        put("engine", text)


def choose(known: tuple[Row, ...], names: tuple[str, ...]) -> tuple[Row, ...]:
    unknown = set(names) - {row.name for row in known}
    if unknown:
        raise click.UsageError(
            f"no row is called {', '.join(sorted(unknown))}: ask `./just bench engine --list`"
        )
    return tuple(row for row in known if not names or row.name in names)


def find_sides(patched: Path | None) -> list[Side]:
    ours = load_engine(patched) if patched else build_showing_progress(BuildOptions())
    return [Side(STOCK, build_showing_progress(BuildOptions(stock=True))), Side(MESH, ours)]


def run_row(row: Row, sides: list[Side], rounds: int, tokens: int) -> Outcome:
    samples: dict[str, list[Sample]] = {side.name: [] for side in sides}
    _warm(row.setup.model)
    for number in range(rounds):
        for side in sides:
            with _explained(row, side), deployment(side, row.setup) as deployed:
                sample = row.measure(deployed, tokens)
            samples[side.name].append(sample)
            figures = [f"{sample.figure:.2f} {row.unit}"]
            figures += [f"{name} {value:.3g}" for name, value in sample.notes.items()]
            click.echo(f"{row.name}, round {number + 1}, {side.name}: {', '.join(figures)}")
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


def _warm(model: Path) -> None:
    """What both sides read is in memory."""
    with model.open("rb") as file:
        while file.read(16 << 20):
            pass


def report(outcomes: tuple[Outcome, ...], rounds: int, tokens: int) -> str:
    today = datetime.datetime.now(datetime.UTC).date()
    plural = "rounds" if rounds > 1 else "round"
    parts = [
        f"{today}; {machine()}. Median of {rounds} {plural}, {tokens} tokens a measurement.",
        results_table(outcomes),
        *(commands_table(outcome) for outcome in outcomes),
    ]
    return "\n\n".join(part for part in parts if part)


def put(name: str, text: str) -> None:
    """Between the markers of `name` in docs/benchmarks.md."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, found, rest = RESULT.read_text().partition(begin)
    if not found:
        raise click.ClickException(f"{RESULT.name} has no {begin}: put both markers there first")
    RESULT.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}")
