"""The models in the node's own folder and those given with --models, by name.

A model's name is its file's, without `.gguf` and shard number, or what a cache of another program
calls it (`meshnode.models.caches`); `publisher/repo/file` works too, and so does `general.name`
inside the file. Folders are walked a few levels deep, links followed, no folder twice.
"""

from __future__ import annotations

import difflib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from meshnode.errors import AmbiguousModel, ModelError, NoSuchModel
from meshnode.models.caches import HUB, OLLAMA, hub_repo, hub_snapshots, is_ollama, ollama_models
from meshnode.models.facts import ModelFacts, model_name, read_facts, shard_paths, shown_name
from meshnode.models.header import read_header
from meshnode.models.manifest import Wanted
from meshnode.models.slice_mark import is_slice
from meshnode.models.store.slice import read_document
from meshnode.models.store.store import GONE_PREFIX, NEW_PREFIX

MAX_DEPTH = 8
MAX_FOLDERS = 10_000
MAX_MODELS = 2_000
_SUGGESTIONS = 5
_LEFT_OUT = ("mmproj", NEW_PREFIX, GONE_PREFIX)
"""An image encoder beside its model; a slice that is being made or removed."""


@dataclass(frozen=True)
class CatalogEntry:
    """One model found: its first file, all its files that are there, their bytes together.

    `complete` is False while shards are missing, and of a slice until all is held. `held_bytes` is
    a slice's, None where whole files are there. `aliases` are further names; `place` is like
    `publisher/repo`, or empty;
    `source`: where a slice comes from, or whose cache it is; `trouble`: why it cannot be used.
    """

    name: str
    path: Path
    files: tuple[Path, ...]
    size_bytes: int
    complete: bool
    held_bytes: int | None = None
    aliases: tuple[str, ...] = ()
    place: str = ""
    source: str | None = None
    trouble: str | None = None

    @property
    def names(self) -> frozenset[str]:
        """All that it is called, case folded."""
        names = (self.name, *self.aliases, f"{self.place}/{self.name}")
        return frozenset(name.casefold() for name in names)


class Catalog:
    """I know the models of some folders, as they were when last scanned."""

    def __init__(self, folders: Sequence[Path] = ()) -> None:
        self._folders = tuple(folders)
        self._entries: tuple[CatalogEntry, ...] = ()

    def scan(self) -> tuple[CatalogEntry, ...]:
        """Looks again. Blocks for the walk; headers are not read. Raises `ModelError` for a folder
        that is not there."""
        for folder in self._folders:
            if not folder.is_dir():
                raise ModelError(f"there is no folder {folder}: check --models")
        entries = (_entry(found) for found in _first_files(self._folders))
        self._entries = tuple(sorted(entries, key=lambda entry: (entry.name, entry.path)))
        return self._entries

    def models(self) -> tuple[CatalogEntry, ...]:
        """What the last scan found, by name."""
        return self._entries

    def resolve(self, text: str) -> Path:
        """The first file of the model that `text` names or points to. Raises `ModelError`.

        A path that exists wins; then names, then what is alone in a place, then `general.name`,
        case ignored. Of two of one name, one a slice that is not complete, it is the other.
        """
        expanded = os.path.expanduser(text)
        if os.path.isfile(expanded):
            return shard_paths(Path(expanded))[0]
        return self.named(text).path

    def named(self, text: str) -> CatalogEntry:
        """The one model of that name. Raises `NoSuchModel`, `AmbiguousModel`, or `ModelError`
        for what looks like a path."""
        wanted = text.casefold()
        for fits in (
            lambda entry: wanted in entry.names,
            lambda entry: entry.place.casefold() == wanted != "",
            lambda entry: _title(entry).casefold() == wanted,
        ):
            found = [entry for entry in self._entries if fits(entry)]
            found = [entry for entry in found if entry.complete] or found
            if len(found) == 1:
                return found[0]
            if found:
                places = ", ".join(str(entry.path) for entry in found)
                raise AmbiguousModel(
                    f"several models are named {text!r}: give one by path: {places}"
                )
        if os.sep in text or wanted.endswith(".gguf"):
            raise ModelError(f"there is no file {text}: check its path")
        raise NoSuchModel(self._unknown(text))

    def holding(self, wanted: Sequence[Wanted]) -> tuple[ModelFacts, ...]:
        """The models whose headers have most of the wanted bytes (by name, type, shape), those with
        the most of them first. Reads every header; digests tell whether the bytes agree."""
        wanted_bytes = sum(tensor.nbytes for tensor in wanted)
        shapes = {(tensor.name, tensor.type, tensor.ne) for tensor in wanted}
        ranked: list[tuple[int, ModelFacts]] = []
        for entry in self._entries:
            try:
                facts = read_facts(entry.path)
            except ModelError:
                continue  # named with its reason when somebody asks for this one
            shared_bytes = sum(
                tensor.nbytes
                for tensor in facts.tensors
                if (tensor.name, tensor.type, tensor.ne) in shapes
            )
            if shared_bytes and 2 * shared_bytes >= wanted_bytes:
                ranked.append((shared_bytes, facts))
        ranked.sort(key=lambda pair: -pair[0])
        return tuple(facts for _, facts in ranked)

    def _unknown(self, text: str) -> str:
        names = [entry.name for entry in self._entries]
        if not names:
            return (
                f"no model is named {text!r}, and no folder with models is known: give a file, or "
                "a folder with --models"
            )
        lower = {name.casefold(): name for name in names}
        near = [lower[key] for key in lower if text.casefold() in key]
        close = difflib.get_close_matches(text.casefold(), lower, _SUGGESTIONS, cutoff=0.4)
        near += [lower[key] for key in close if lower[key] not in near]
        shown = ", ".join((near or names)[:_SUGGESTIONS])
        return f"no model is named {text!r}: " + (
            f"did you mean {shown}?" if near else f"there are {shown}"
        )


def _title(entry: CatalogEntry) -> str:
    try:
        name = read_header(entry.path).metadata.get("general.name")
    except ModelError:
        return ""
    return shown_name(name) if isinstance(name, str) else ""


def _entry(found: _Found) -> CatalogEntry:
    shards = shard_paths(found.path)
    sizes = dict(_sizes(shards))
    entry = CatalogEntry(
        name=shown_name(found.names[0] if found.names else model_name(found.path)),
        path=found.path,
        files=tuple(sizes),
        size_bytes=sum(sizes.values()),
        complete=len(sizes) == len(shards),
        aliases=tuple(map(shown_name, found.names[1:])),
        place=shown_name(found.place),
        source=found.source,
    )
    return _slice_entry(entry) if is_slice(found.path) else entry


def _sizes(paths: Sequence[Path]) -> Iterator[tuple[Path, int]]:
    """Of those that are files now: one may be removed while we look."""
    for path in paths:
        try:
            found = path.stat()
        except OSError:
            continue
        if stat.S_ISREG(found.st_mode):
            yield path, found.st_size


def _slice_entry(entry: CatalogEntry) -> CatalogEntry:
    entry = replace(entry, place="", complete=False, held_bytes=0)
    try:
        document = read_document(entry.path.parent)
    except ModelError as error:
        return replace(entry, trouble=str(error))
    return replace(
        entry,
        complete=document.complete,
        held_bytes=document.held_bytes,
        source=document.source,
        size_bytes=document.size_bytes,
    )


@dataclass(frozen=True)
class _Found:
    """A file on the way, with names where its own says nothing."""

    path: Path
    place: str = ""
    names: tuple[str, ...] = ()
    source: str | None = None


@dataclass(frozen=True)
class _Folder:
    """One still to be looked into."""

    path: Path
    depth: int
    place: tuple[str, ...] = ()
    source: str | None = None


def _first_files(folders: Sequence[Path]) -> list[_Found]:
    """The first file of each model; one that several links lead to is found once, and of a
    repository's revisions the first that has it."""
    firsts: dict[Path, _Found] = {}
    revisions: set[tuple[str, str]] = set()
    seen: set[str] = set()
    for found in _walk(folders):
        real = os.path.realpath(found.path)
        if real in seen:
            continue
        seen.add(real)
        if is_slice(found.path):
            found = replace(found, path=Path(real))  # it says what of it is here, no link does
        try:
            first = shard_paths(found.path)[0]
        except ModelError:
            continue  # a name no model has
        revision = (found.place, first.name)
        if found.source == HUB and first not in firsts and revision in revisions:
            continue
        revisions.add(revision)
        firsts.setdefault(first, replace(found, path=first))
        if len(firsts) >= MAX_MODELS:
            break
    return list(firsts.values())


def _walk(folders: Sequence[Path]) -> Iterator[_Found]:
    """Models' files below the folders, in a stable order; unreadable folders are passed over."""
    seen: set[tuple[int, int]] = set()
    waiting = [_Folder(folder.absolute(), 0) for folder in reversed(folders)]
    while waiting and len(seen) < MAX_FOLDERS:
        folder = waiting.pop()
        try:
            found = folder.path.stat()
            children = sorted(os.scandir(folder.path), key=lambda child: child.name)
        except OSError:
            continue
        if (found.st_dev, found.st_ino) in seen:
            continue
        seen.add((found.st_dev, found.st_ino))
        if is_ollama({child.name for child in children}):
            for named in ollama_models(folder.path):
                yield _Found(named.path, names=named.names, source=OLLAMA)
        elif (repo := hub_repo(folder.path)) is not None:
            snapshots = hub_snapshots(folder.path)
            waiting += [
                _Folder(path, folder.depth + 2, (repo,), HUB) for path in reversed(snapshots)
            ]
        else:
            yield from _gguf_files(folder, children, waiting)


def _gguf_files(
    folder: _Folder, children: Sequence[os.DirEntry[str]], waiting: list[_Folder]
) -> Iterator[_Found]:
    for child in children:
        if child.name.startswith(_LEFT_OUT):
            continue
        try:
            is_file, is_folder = child.is_file(), child.is_dir()
        except OSError:
            continue  # a link to itself
        if is_file and child.name.endswith(".gguf"):
            yield _Found(Path(child.path), "/".join(folder.place), source=folder.source)
        elif folder.depth < MAX_DEPTH and is_folder:
            place = folder.place if folder.source == HUB else (*folder.place, child.name)
            waiting.append(_Folder(Path(child.path), folder.depth + 1, place, folder.source))
