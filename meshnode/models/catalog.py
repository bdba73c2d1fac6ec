"""The models in the folders given with --models, by name.

A model's name is its file's, without `.gguf` and shard number; `general.name` inside the file
works too. Folders are walked a few levels deep, links followed, no folder twice.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from meshnode.errors import ModelError
from meshnode.models.facts import ModelFacts, model_name, read_facts, shard_paths, shown_name
from meshnode.models.header import read_header
from meshnode.models.manifest import Wanted

MAX_DEPTH = 8
MAX_FOLDERS = 10_000
MAX_MODELS = 2_000
_SUGGESTIONS = 5


class UnknownModel(ModelError):
    """No model has that name, or more than one."""


@dataclass(frozen=True)
class CatalogEntry:
    """One model found: its first file, all its files that are there, their bytes together.

    `complete` is False while shards are missing.
    """

    name: str
    path: Path
    files: tuple[Path, ...]
    size_bytes: int
    complete: bool


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
        firsts = sorted(_first_files(self._folders), key=lambda path: (model_name(path), path))
        self._entries = tuple(_entry(first) for first in firsts)
        return self._entries

    def models(self) -> tuple[CatalogEntry, ...]:
        """What the last scan found, by name."""
        return self._entries

    def resolve(self, text: str) -> Path:
        """The first file of the model that `text` names or points to. Raises `ModelError`.

        A path that exists wins; then names as files have them, then `general.name`, case ignored.
        """
        expanded = os.path.expanduser(text)
        if os.path.isfile(expanded):
            return shard_paths(Path(expanded))[0]
        if os.sep in text or text.lower().endswith(".gguf"):
            raise ModelError(f"there is no file {text}: check its path")
        wanted = text.casefold()
        for found in (
            [entry for entry in self._entries if entry.name.casefold() == wanted],
            [entry for entry in self._entries if _title(entry).casefold() == wanted],
        ):
            if len(found) == 1:
                return found[0].path
            if found:
                places = ", ".join(str(entry.path) for entry in found)
                raise UnknownModel(f"several models are named {text!r}: give one by path: {places}")
        raise UnknownModel(self._unknown(text))

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


def _entry(first: Path) -> CatalogEntry:
    shards = shard_paths(first)
    sizes = {path: os.path.getsize(path) for path in shards if os.path.isfile(path)}
    return CatalogEntry(
        name=shown_name(model_name(first)),
        path=first,
        files=tuple(sizes),
        size_bytes=sum(sizes.values()),
        complete=len(sizes) == len(shards),
    )


def _first_files(folders: Sequence[Path]) -> set[Path]:
    """The first file of each model; one that several links lead to is found once."""
    found: set[Path] = set()
    seen: set[str] = set()
    for path in _gguf_files(folders):
        real = os.path.realpath(path)
        if real in seen:
            continue
        seen.add(real)
        try:
            found.add(shard_paths(path)[0])
        except ModelError:
            continue  # a name no model has
        if len(found) >= MAX_MODELS:
            break
    return found


def _gguf_files(folders: Sequence[Path]) -> Iterator[Path]:
    """GGUF files below the folders, in a stable order; unreadable folders are passed over."""
    seen: set[tuple[int, int]] = set()
    waiting = [(folder.absolute(), 0) for folder in reversed(folders)]
    while waiting and len(seen) < MAX_FOLDERS:
        folder, depth = waiting.pop()
        try:
            found = folder.stat()
            children = sorted(os.scandir(folder), key=lambda child: child.name)
        except OSError:
            continue
        if (found.st_dev, found.st_ino) in seen:
            continue
        seen.add((found.st_dev, found.st_ino))
        for child in children:
            if child.name.startswith("mmproj"):
                continue  # an image encoder beside its model
            try:
                is_file, is_folder = child.is_file(), child.is_dir()
            except OSError:
                continue  # a link to itself
            if is_file and child.name.endswith(".gguf"):
                yield Path(child.path)
            elif depth < MAX_DEPTH and is_folder:
                waiting.append((Path(child.path), depth + 1))
