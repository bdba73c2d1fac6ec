"""`mesh engine`: build it, say what it is, say where it is."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from meshnode.cli.settings import OFFLINE_VARIABLE
from meshnode.engine import patch_tree, patch_trial
from meshnode.engine.build import BuildOptions, build_engine, find_built
from meshnode.engine.cache import Engine
from meshnode.engine.errors import EngineMissing, PatchFailed
from meshnode.engine.info import EngineInfo, engine_info
from meshnode.engine.source import Progress as OnProgress
from meshnode.engine.toolchain import Backend

_PLAIN_EVERY_STEPS = 20
_MAX_STEP_CHARS = 40

backend_option = click.option(
    "--backend", type=click.Choice([str(backend) for backend in Backend]), help="Default: detected."
)
stock_option = click.option("--stock", is_flag=True, help="llama.cpp without mesh's patches.")
fetch_option = click.option(
    "--offline/--no-offline",
    envvar=OFFLINE_VARIABLE,
    default=False,
    help="Fetch no source: build from what is here, or not at all.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object.")
tree_argument = click.argument("tree", type=click.Path(path_type=Path), default=".engine-tree")


@click.group()
def engine_group() -> None:
    """The patched llama.cpp that computes."""


@engine_group.command()
@backend_option
@click.option(
    "--source",
    type=click.Path(exists=True, path_type=Path),
    help="A llama.cpp checkout, or the pinned sdist as a file. Default: fetched with pip.",
)
@click.option("--jobs", type=click.IntRange(1), help="Compilers at once. Default: one a core.")
@stock_option
@fetch_option
@json_option
def build(
    backend: str | None,
    source: Path | None,
    jobs: int | None,
    stock: bool,
    offline: bool,
    as_json: bool,
) -> None:
    """Build the engine; at once when nothing changed since the last time."""
    options = BuildOptions(backend=backend, source=source, jobs=jobs, stock=stock, offline=offline)
    engine = build_showing_progress(options)
    if as_json:
        click.echo(json.dumps(_engine_facts(engine)))
    else:
        click.echo(f"engine {engine.key} ({engine.backend}) in {engine.bin_dir}")


@engine_group.command()
@backend_option
@stock_option
@json_option
def info(backend: str | None, stock: bool, as_json: bool) -> None:
    """Show the built engine: backend, key, versions, devices."""
    facts = engine_info(stock=stock, backend=backend)
    if as_json:
        click.echo(json.dumps(_info_facts(facts)))
        return
    for line in _info_lines(facts):
        click.echo(line)


@engine_group.command()
@backend_option
@stock_option
@json_option
def path(backend: str | None, stock: bool, as_json: bool) -> None:
    """Print the folder of the engine's binaries."""
    engine = find_built(stock=stock, backend=backend)
    if engine is None:
        raise EngineMissing(stock=stock)
    click.echo(json.dumps({"path": str(engine.bin_dir)}) if as_json else str(engine.bin_dir))


@engine_group.command()
@tree_argument
@fetch_option
def edit(tree: Path, offline: bool) -> None:
    """Lay the source out as a git tree with one commit a patch."""
    with _shown_progress() as progress:
        commits = patch_tree.edit(tree, progress, offline=offline)
    click.echo(f"{tree}: the tag upstream, then one commit a patch ({commits})")
    click.echo(f"edit and commit there, then: mesh engine export {tree}")


@engine_group.command()
@tree_argument
def export(tree: Path) -> None:
    """Write the commits of an edited tree back as the patch series."""
    for line in patch_tree.export(tree):
        click.echo(line)


@engine_group.command("check-patches")
@fetch_option
def check_patches(offline: bool) -> None:
    """Show that laying the patches out and writing them back changes no byte."""
    with _shown_progress() as progress:
        count = patch_tree.check_round_trip(progress, offline=offline)
    click.echo(f"{count} patches: the round trip changed no byte")


@engine_group.command("try-patches")
@click.argument("version")
@click.option(
    "--tree",
    type=click.Path(path_type=Path),
    help="Keep the git tree in this new folder: to carry over what does not apply.",
)
@click.option("--build", "compiles", is_flag=True, help="Compile it too, and keep nothing of that.")
@fetch_option
def try_patches(version: str, tree: Path | None, compiles: bool, offline: bool) -> None:
    """Try the patches on another VERSION of the source."""
    with tempfile.TemporaryDirectory(prefix="mesh-try-") as scratch:
        place = tree or Path(scratch) / "tree"
        with _shown_progress() as progress:
            tried = patch_trial.try_series(version, place, progress, offline=offline)
        for one in tried:
            click.echo(_tried_line(one))
        failed = sum(one.fit is patch_trial.Fit.FAILED for one in tried)
        if failed:
            raise PatchFailed(
                f"{failed} of {len(tried)} patches do not apply to {version}: carry them over in a "
                "tree that --tree FOLDER keeps, beginning with the first"
            )
        if compiles:
            with _shown_progress() as progress:
                patch_trial.compile_tried(place, progress)
            click.echo(f"with {len(tried)} patches {version} compiles")


def _tried_line(one: patch_trial.Tried) -> str:
    places = [f"{file} ({count})" if count else f"{file} (all)" for file, count in one.places]
    return f"{one.patch}: {one.fit.value}" + (f", {', '.join(places)}" if places else "")


def ensure_engine(*, offline: bool) -> Engine:
    """The engine for this machine, built first if there is none; when `offline`, of a source that
    is here."""
    return find_built() or build_showing_progress(BuildOptions(offline=offline))


def build_showing_progress(options: BuildOptions) -> Engine:
    with _shown_progress() as progress:
        return build_engine(options, progress)


@contextmanager
def _shown_progress() -> Iterator[OnProgress]:
    """A bar that moves, or a plain line now and then. On stderr: stdout is for the result."""
    if not sys.stderr.isatty():
        yield _PlainProgress().show
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("engine", total=None)

        def show(done: int, total: int, line: str) -> None:
            words = Path(line.split()[-1]).name if total else line
            bar.update(
                task,
                completed=done,
                total=total or None,
                description=words if not total else words[:_MAX_STEP_CHARS].ljust(_MAX_STEP_CHARS),
            )

        yield show


class _PlainProgress:
    """I print each stage once, and of the compile steps every twentieth."""

    def __init__(self) -> None:
        self._stage = ""

    def show(self, done: int, total: int, line: str) -> None:
        if total == 0:
            if line != self._stage:
                click.echo(line, err=True)
            self._stage = line
        elif done % _PLAIN_EVERY_STEPS == 0 or done == total:
            click.echo(f"[{done}/{total}] {line}", err=True)


def _engine_facts(engine: Engine) -> dict[str, object]:
    return {**asdict(engine), "bin_dir": str(engine.bin_dir)}


def _info_facts(info: EngineInfo) -> dict[str, object]:
    return {
        **_engine_facts(info.engine),
        "upstream": info.upstream,
        "patches": list(info.patches),
        "stock_bin_dir": str(info.stock) if info.stock else None,
        "devices": [asdict(device) for device in info.devices],
        "cache": str(info.cache),
    }


def _info_lines(info: EngineInfo) -> Iterator[str]:
    engine = info.engine
    yield f"key        {engine.key}"
    yield f"backend    {engine.backend}"
    yield f"path       {engine.bin_dir}"
    yield f"source     {engine.source}"
    yield f"patches    {', '.join(info.patches) or 'none'}"
    yield f"compiler   {engine.compiler}"
    yield f"stock      {info.stock or 'not built (mesh engine build --stock)'}"
    yield f"cache      {info.cache}"
    for device in info.devices:
        total, free = device.total_bytes / 2**30, device.free_bytes / 2**30
        yield (
            f"device     {device.name}: {device.description}, {total:.1f} GiB, {free:.1f} GiB free"
        )
