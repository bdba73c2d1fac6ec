"""`mesh models`: what lies on this machine's disks, and how to look into it, check it, remove it.

It needs no running node: what others work on is locked, and left alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from meshnode.cli.convert import convert
from meshnode.cli.members import json_option, table
from meshnode.cli.model_facts import facts_json, facts_lines
from meshnode.cli.progress import shown_bytes
from meshnode.cli.settings import home_option
from meshnode.cli.shown import shown
from meshnode.config import human_bytes, parse_size
from meshnode.errors import AmbiguousModel, ModelError, NoSuchModel, UsageError
from meshnode.models.cache import ManifestCache
from meshnode.models.catalog import Catalog, CatalogEntry
from meshnode.models.facts import read_facts
from meshnode.models.identity import Identity
from meshnode.models.slice_mark import is_slice
from meshnode.models.store.slice import open_slice, slice_of
from meshnode.models.store.store import Collected, Store
from meshnode.models.store.thinning import drop_tensors
from meshnode.models.verify import NOTHING, Verdict, verify_files, verify_slice
from meshnode.pipeline.layer_range import own_tensors
from meshnode.state import default_home, subfolder_beside_node

MODELS_FOLDER, DIGESTS_FOLDER = "models", "manifests"
_TITLES = ("name", "size", "here", "where", "source")
_SHOWN_TENSORS = 5

folder_option = click.option(
    "--models",
    "folders",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A further folder with models, read only; repeatable.",
)


@click.group(invoke_without_command=True)
@home_option
@folder_option
@json_option
@click.pass_context
def models(
    context: click.Context, home: Path | None, folders: tuple[Path, ...], as_json: bool
) -> None:
    """List the models on this machine's disks, and the parts of models."""
    if context.invoked_subcommand is not None:
        if home is not None or folders or as_json:
            raise UsageError(f"give options after the command: mesh models {_example(context)} …")
        return
    entries = _catalog(home, folders).models()
    if as_json:
        click.echo(json.dumps({"models": [_entry_json(entry) for entry in entries]}))
    elif not entries:
        click.echo(
            f"no models in {_models_folder(home)}: `mesh serve --model FILE` serves any GGUF file, "
            "`--models FOLDER` adds a folder"
        )
    else:
        click.echo(table(_TITLES, [_cells(entry) for entry in entries]))


def _example(context: click.Context) -> str:
    return str(context.invoked_subcommand)


@models.command()
@click.argument("name")
@home_option
@folder_option
@json_option
def info(name: str, home: Path | None, folders: tuple[Path, ...], as_json: bool) -> None:
    """Show what a model's header says: layers, widths, bytes, KV cache, identity."""
    path = _catalog(home, folders).resolve(name)
    facts, found = read_facts(path), slice_of(path)
    identity = found.identity if found else None
    if found is None:
        kept = ManifestCache(_home(home) / DIGESTS_FOLDER).get(facts)
        identity = Identity(facts.header_digest, "", kept.root) if kept else None
    if as_json:
        click.echo(json.dumps(facts_json(facts, identity, found)))
    else:
        click.echo("\n".join(facts_lines(facts, identity, found)))


@models.command()
@click.argument("name")
@home_option
@folder_option
@json_option
def verify(name: str, home: Path | None, folders: tuple[Path, ...], as_json: bool) -> None:
    """Read every digest of a model again.

    What is damaged in a slice is dropped from it, and pulled again at the next need. Ends with exit
    code 6 when anything is damaged.
    """
    path = _catalog(home, folders).resolve(name)
    found = slice_of(path)
    cache = ManifestCache(subfolder_beside_node(_home(home), DIGESTS_FOLDER))
    with shown_bytes("reading", quiet=as_json) as progress:
        if found is not None:
            verdict = verify_slice(found, progress)
        else:
            verdict = verify_files(read_facts(path), cache, progress)
    if as_json:
        click.echo(json.dumps({"name": name, "path": str(path), **_verdict_json(verdict)}))
    elif not verdict.wrong:
        click.echo(shown(_all_well(name, verdict)))
    if verdict.wrong:
        raise ModelError(_damage(name, path, verdict, is_slice=found is not None))


@models.command()
@click.argument("name")
@click.option("--layers", metavar="FIRST:LAST", help="Of a slice, these alone, like 27:52.")
@home_option
@json_option
def rm(name: str, layers: str | None, home: Path | None, as_json: bool) -> None:
    """Remove a model from the node's own folder, or some layers of it; never what is in use."""
    store = Store(_models_folder(home))
    if layers is not None:
        freed_bytes = _remove_layers(store, name, layers)
    else:
        freed = _remove_slice(store, name)
        freed_bytes = _remove_files(store, name) if freed is None else freed
    if as_json:
        click.echo(json.dumps({"name": name, "freed_bytes": freed_bytes}))
    else:
        what = f"{name} is" if layers is None else f"layers {layers} of {name} are"
        click.echo(f"{shown(what)} removed: {human_bytes(freed_bytes)} are free again")


@models.command()
@click.option("--keep", required=True, metavar="SIZE", help="What slices may take up, like 50G.")
@home_option
@json_option
def gc(keep: str, home: Path | None, as_json: bool) -> None:
    """Make room until slices take up SIZE at most: what no plan needs any more is dropped first,
    then those slices go that were not used for longest."""
    keep_bytes = 0 if keep.strip() == "0" else parse_size(keep)
    found = Store(_models_folder(home)).collect(keep_bytes)
    if as_json:
        told = {
            "thinned": [asdict(one) for one in found.thinned],
            "removed": [asdict(one) for one in found.removed],
            "in_use": list(found.in_use),
            "failed": list(found.failed),
            "left_bytes": found.left_bytes,
        }
        click.echo(json.dumps(told))
    else:
        _show_collected(found)
    if found.failed:
        raise ModelError("; ".join(found.failed))


def _show_collected(found: Collected) -> None:
    for one in found.thinned:
        size = human_bytes(one.freed_bytes)
        click.echo(f"what no plan needs of {one.name} any more is dropped: {size} are free again")
    for one in found.removed:
        click.echo(f"{one.name} is removed: {human_bytes(one.freed_bytes)} are free again")
    for name in found.in_use:
        click.echo(f"{name} is in use and stays")
    click.echo(f"slices take up {human_bytes(found.left_bytes)}")


models.add_command(convert)


# -- where ----------------------------------------------------------------------------------------


def _home(home: Path | None) -> Path:
    return (home or default_home()).absolute()


def _models_folder(home: Path | None) -> Path:
    return _home(home) / MODELS_FOLDER


def _catalog(home: Path | None, folders: Sequence[Path]) -> Catalog:
    """Scanned. Raises `ModelError` for a folder that is not there."""
    own = _models_folder(home)
    catalog = Catalog([*([own] if own.is_dir() else []), *folders])
    catalog.scan()
    return catalog


# -- words ----------------------------------------------------------------------------------------


def _cells(entry: CatalogEntry) -> tuple[str, ...]:
    return (
        entry.name,
        human_bytes(entry.size_bytes),
        _here(entry),
        str(entry.path.parent if entry.held_bytes is not None else entry.path),
        entry.source or "-",
    )


def _here(entry: CatalogEntry) -> str:
    if entry.trouble is not None:
        return "damaged"
    if entry.complete:
        return "all"
    if entry.held_bytes is None:
        return "some of its files"
    return human_bytes(entry.held_bytes)


def _entry_json(entry: CatalogEntry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "aliases": list(entry.aliases),
        "place": entry.place or None,
        "path": str(entry.path),
        "files": [str(path) for path in entry.files],
        "size_bytes": entry.size_bytes,
        "held_bytes": entry.size_bytes if entry.held_bytes is None else entry.held_bytes,
        "complete": entry.complete,
        "slice": entry.held_bytes is not None,
        "source": entry.source,
        "trouble": entry.trouble,
    }


def _verdict_json(verdict: Verdict) -> dict[str, Any]:
    return {
        "tensors": verdict.tensors,
        "bytes": verdict.size_bytes,
        "wrong": list(verdict.wrong),
        "compared_with": verdict.by,
        "root": verdict.root,
    }


def _all_well(name: str, verdict: Verdict) -> str:
    read = f"{verdict.tensors} tensors, {human_bytes(verdict.size_bytes)}"
    if verdict.by == NOTHING:
        return f"{name}: {read} read for the first time; their digests are kept for the next"
    return f"{name}: {read} read, all as they were (compared with the {verdict.by})"


def _damage(name: str, path: Path, verdict: Verdict, *, is_slice: bool) -> str:
    shown = ", ".join(verdict.wrong[:_SHOWN_TENSORS])
    if len(verdict.wrong) > _SHOWN_TENSORS:
        shown += f" and {len(verdict.wrong) - _SHOWN_TENSORS} more"
    if is_slice:
        return (
            f"{name} was damaged on the disk, in {shown}: that is dropped, and pulled again when "
            "it is next needed; look after the disk"
        )
    return (
        f"{name} is damaged on the disk, in {shown}: download or copy {path} again, and look "
        "after the disk"
    )


# -- removing -------------------------------------------------------------------------------------


def _remove_layers(store: Store, name: str, layers: str) -> int:
    """Bytes that came free. What the other layers compute with too stays."""
    folder = _slice_folder(store, name)
    if folder is None:
        raise NoSuchModel(
            f"no part of a model named {name!r} lies in {store.folder}: `mesh models` lists what "
            "does, and a file that was put there goes as a whole"
        )
    found = open_slice(folder)
    names = set(own_tensors(found.facts, layers, what="--layers"))
    held = [tensor.name for tensor in found.held if tensor.name in names]
    return drop_tensors(folder, held) if held else 0


def _slice_folder(store: Store, name: str) -> Path | None:
    """Of the one slice of that name, or None."""
    folders = [store.folder / name] if store.folder / name in store.folders() else []
    folders = folders or [found.folder for found in store.by_name(name)]
    if len(folders) > 1:
        names = ", ".join(folder.name for folder in folders)
        raise AmbiguousModel(f"several slices are named {name!r}: name one by its folder: {names}")
    return folders[0] if folders else None


def _remove_slice(store: Store, name: str) -> int | None:
    """Bytes that came free; None where no slice has the name."""
    folder = _slice_folder(store, name)
    return store.remove(folder).freed_bytes if folder else None


def _remove_files(store: Store, name: str) -> int:
    catalog = Catalog([store.folder] if store.folder.is_dir() else [])
    catalog.scan()
    try:
        entry = catalog.named(name)
    except ModelError as error:
        raise NoSuchModel(
            f"no model named {name!r} lies in {store.folder}: `mesh models` lists what does; files "
            "in other folders are only read, so remove them there"
        ) from error
    if is_slice(entry.path):  # a damaged one, named after its file
        return store.remove(entry.path.parent).freed_bytes
    own = store.folder.resolve()
    freed_bytes = 0
    for path in entry.files:
        # A link leads out of here perhaps: it is taken away, what it leads to stays.
        if own not in path.parent.resolve().parents and path.parent.resolve() != own:
            raise ModelError(f"{path} leads out of {store.folder}: remove it where it lies")
        freed_bytes += path.lstat().st_blocks * 512
        _unlink(path)
    return freed_bytes


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise ModelError(f"{path} cannot be removed: {error.strerror}") from error
    if path.parent.name != MODELS_FOLDER:
        with suppress(OSError):  # not empty, or gone already
            path.parent.rmdir()
