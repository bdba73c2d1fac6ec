"""MESH_HOME/models: the slices of this node, found by name, source or identity; made and removed.

    <folder>/                  one a model, named after it
        model-00001-of-00002.gguf, …   as long as the model's own, with holes
        slice.cbor             which tensors are there (`document`)
        journal                ranges done in tensors that are not yet (`journal`)
        lock, used             who works on it (`locks`)

A slice appears, and goes, by one rename; what a kill has left half made or half removed bears a
name with a dot and is swept away.
"""

from __future__ import annotations

import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from meshnode.crash_points import reached
from meshnode.errors import ModelError
from meshnode.models.facts import model_name, read_facts, shard_paths, shown_name
from meshnode.models.slice_mark import SLICE_DOCUMENT
from meshnode.models.store.disk import allocated_bytes, check_holes, check_room, told
from meshnode.models.store.document import SliceDocument, is_file_name
from meshnode.models.store.locks import (
    USE_LOCK,
    WRITER_LOCK,
    Lock,
    SliceGone,
    SliceInUse,
    last_used_ns,
)
from meshnode.models.store.slice import (
    Slice,
    is_bare,
    layout_of,
    open_slice,
    read_document,
    save,
    stamps_of,
)
from meshnode.models.store.thinning import thin
from meshnode.state import flush_folder

NEW_PREFIX, GONE_PREFIX = ".new-", ".gone-"
_MAX_FOLDER_CHARS = 120
_SUFFIX_HEX_CHARS = 8
_PLACING = threading.Lock()
BARE_S = 600
"""How long a header may wait for its first tensors."""


@dataclass(frozen=True)
class NewFile:
    """A file of a model to be: `header` is at least all before its first tensor."""

    name: str
    size_bytes: int
    header: bytes


@dataclass(frozen=True)
class Removed:
    """A slice that is there no more, and what it took up."""

    name: str
    freed_bytes: int


@dataclass(frozen=True)
class Collected:
    """What was dropped of slices that stay, what went as a whole, the names of what is in use and
    stays, a sentence for each that could not be removed, and what all that is left takes up."""

    thinned: tuple[Removed, ...]
    removed: tuple[Removed, ...]
    in_use: tuple[str, ...]
    failed: tuple[str, ...]
    left_bytes: int


class Store:
    """I keep the slices below one folder, which is made when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()

    # -- finding ----------------------------------------------------------------------------------

    def folders(self) -> list[Path]:
        """Where slices lie, damaged ones too, by name."""
        try:
            found = [entry for entry in os.scandir(self.folder) if not entry.name.startswith(".")]
        except OSError:
            return []
        paths = (Path(entry.path) for entry in found)
        return sorted(path for path in paths if os.path.lexists(path / SLICE_DOCUMENT))

    def slices(self) -> Iterator[Slice]:
        """Those that can be used. Blocks for their headers."""
        for folder in self.folders():
            try:
                yield open_slice(folder)
            except ModelError:
                continue  # `mesh models` tells of it

    def by_source(self, source: str, validator: str | None = None) -> Slice | None:
        """The slice of these very bytes at this place, or the one that was used last of those that
        came from there."""

        def fits(found: SliceDocument) -> bool:
            return found.source == source and validator in (None, found.validator)

        return self._first(fits, sorted(self.folders(), key=last_used_ns, reverse=True))

    def by_identity(self, identity: str, beside: Path | None = None) -> Slice | None:
        """`identity`: a root, or a provisional one. beside: another slice than this one."""
        folders = [one for one in self.folders() if one != beside]
        return self._first(lambda found: found.identity.is_named(identity), folders)

    def twin_of(self, made: Slice) -> Slice | None:
        """Another one of the same bytes from the same place."""

        def fits(found: SliceDocument) -> bool:
            is_same = found.identity.provisional == made.identity.provisional
            return is_same and found.source == made.document.source

        return self._first(fits, [one for one in self.folders() if one != made.folder])

    def by_name(self, name: str) -> tuple[Slice, ...]:
        """All of that name: the file's, or the folder's, case ignored."""
        wanted = name.casefold()
        return tuple(
            found
            for found in self.slices()
            if wanted in (found.name.casefold(), found.folder.name.casefold())
        )

    def _first(
        self, fits: Callable[[SliceDocument], bool], folders: Sequence[Path] | None = None
    ) -> Slice | None:
        for folder in self.folders() if folders is None else folders:
            try:
                if fits(read_document(folder)):
                    return open_slice(folder)
            except ModelError:
                continue
        return None

    # -- making and removing ----------------------------------------------------------------------

    def create(self, files: Sequence[NewFile], source: str | None, validator: str) -> Slice:
        """A slice that holds no tensor yet, or the one that another task has just made of the same
        source. Raises `ModelError` for headers that make no sense, `NoHoles`, `NoRoom`,
        `DiskFull`."""
        names = _checked_names(files)
        with told(self.folder):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.sweep()
        check_holes(self.folder)
        header_bytes = sum(len(file.header) for file in files)
        check_room(self.folder, header_bytes, f"the header of {model_name(Path(names[0]))}")
        making = self.folder / f"{NEW_PREFIX}{secrets.token_hex(4)}"
        with told(making):
            making.mkdir(mode=0o700)
        lock = Lock(making, WRITER_LOCK)  # so that nobody sweeps it away
        try:
            document = _fill(making, files, source, validator)
            reached("slice.created")
            with _PLACING:
                found = self._first(partial(_is_same, document))
                place = found.folder if found else self._place(document, making)
            if found:
                shutil.rmtree(making, ignore_errors=True)
        except BaseException:
            shutil.rmtree(making, ignore_errors=True)
            raise
        finally:
            lock.close()
        return open_slice(place)

    def _place(self, document: SliceDocument, making: Path) -> Path:
        """Renames the folder to a name that is free."""
        name = model_name(Path(document.files[0][0]))[:_MAX_FOLDER_CHARS]
        suffix = document.identity.provisional[:_SUFFIX_HEX_CHARS]
        for folder in (name, f"{name}-{suffix}", f"{name}-{suffix}-{secrets.token_hex(4)}"):
            try:
                with told(self.folder):
                    if (self.folder / folder).exists():
                        continue  # an empty one would be replaced
                    making.rename(self.folder / folder)
                    flush_folder(self.folder)
            except ModelError:
                if not (self.folder / folder).exists():
                    raise
                continue  # another process was first
            return self.folder / folder
        raise ModelError(f"{self.folder / name} is in the way: move it")

    def remove(self, folder: Path) -> Removed:
        """Removes a slice, damaged or not. Raises `SliceInUse`, `SliceGone`."""
        return self._remove(folder, lambda: None)

    def remove_bare(self, folder: Path) -> Removed:
        """Removes a slice that has no byte of any tensor. Raises `SliceInUse` where it has some
        too."""

        def check() -> None:
            if not is_bare(folder):
                raise SliceInUse(f"{folder.name} has more than its header: it stays")

        return self._remove(folder, check)

    def _remove(self, folder: Path, check: Callable[[], None]) -> Removed:
        if folder.parent != self.folder or folder.name.startswith("."):
            raise ModelError(f"{folder} is none of {self.folder}: it is left alone")
        with told(folder):
            locks = [Lock(folder, WRITER_LOCK)]
            try:
                locks.append(Lock(folder, USE_LOCK))
                check()
                gone = self.folder / f"{GONE_PREFIX}{secrets.token_hex(4)}"
                freed_bytes = allocated_bytes(folder)
                folder.rename(gone)
                shutil.rmtree(gone)
            finally:
                for lock in locks:
                    lock.close()
        return Removed(folder.name, freed_bytes)

    def collect(self, keep_bytes: int) -> Collected:
        """Makes room until the slices take up `keep_bytes` at most, or all that are left are in
        use: first what no plan needs any more is dropped, then whole slices go; those not used for
        longest first. Headers of which nothing has come go in any case, unless they are new."""
        self.sweep()
        removed = self._remove_bare_ones()
        folders = sorted(self.folders(), key=last_used_ns)
        sizes = {folder: allocated_bytes(folder) for folder in folders}
        thinned: list[Removed] = []
        busy: list[str] = []
        failed: list[str] = []
        for folder in folders:
            if sum(sizes.values()) > keep_bytes and (freed_bytes := thin(folder)):
                thinned.append(Removed(folder.name, freed_bytes))
                sizes[folder] = allocated_bytes(folder)
        for folder in folders:
            if sum(sizes.values()) <= keep_bytes:
                break
            try:
                removed.append(self.remove(folder))
            except SliceInUse:
                busy.append(folder.name)
                continue
            except SliceGone:
                pass
            except ModelError as error:
                failed.append(str(error))
                continue
            del sizes[folder]
        left_bytes = sum(sizes.values())
        return Collected(tuple(thinned), tuple(removed), tuple(busy), tuple(failed), left_bytes)

    def _remove_bare_ones(self) -> list[Removed]:
        removed = []
        before_ns = time.time_ns() - BARE_S * 10**9
        for folder in self.folders():
            if last_used_ns(folder) < before_ns and is_bare(folder):
                with suppress(ModelError):  # the caller comes to it again
                    removed.append(self.remove_bare(folder))
        return removed

    def sweep(self) -> None:
        """Removes what a kill has left half made or half removed."""
        for prefix in (NEW_PREFIX, GONE_PREFIX):
            for left in self.folder.glob(f"{prefix}*"):
                try:
                    lock = Lock(left, WRITER_LOCK)
                except (OSError, SliceInUse, SliceGone):
                    continue  # being made, or none of ours
                shutil.rmtree(left, ignore_errors=True)
                lock.close()


def _is_same(one: SliceDocument, other: SliceDocument) -> bool:
    return one.source == other.source and one.identity.is_named(other.identity.provisional)


def _checked_names(files: Sequence[NewFile]) -> list[str]:
    """The files' names, such as a model's shards have them. Raises `ModelError`."""
    names = [file.name for file in files]
    if not names or not all(is_file_name(name) and name.endswith(".gguf") for name in names):
        shown = shown_name(", ".join(names))
        raise ModelError(f"{shown}: not the name of a .gguf file; rename it at its source")
    expected = [path.name for path in shard_paths(Path(names[0]))]
    if names != expected:
        raise ModelError(
            f"{names[0]} is one of {len(expected)} files and {len(names)} are given: give all of "
            "them, the first one first"
        )
    return names


def _fill(
    folder: Path, files: Sequence[NewFile], source: str | None, validator: str
) -> SliceDocument:
    """The document before the files: nothing ever looks like a whole model."""
    document = SliceDocument(
        files=tuple((file.name, file.size_bytes) for file in files),
        source=source,
        validator=validator,
        header_digest=bytes(32),
        layout=bytes(32),
        root=None,
        tensor_count=0,
        weight_bytes=0,
    )
    save(folder, document)
    for file in files:
        path = folder / file.name
        with told(path):
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(fd, "wb") as written:
                written.write(file.header[: file.size_bytes])
                written.truncate(file.size_bytes)
                os.fsync(fd)
    facts = read_facts(folder / files[0].name)
    for index, file in enumerate(files):
        starts = [tensor.offset for tensor in facts.tensors if tensor.file_index == index]
        if len(file.header) < min(starts, default=0):
            raise ModelError(f"the header of {file.name} was cut short: pull it again")
    document = replace(
        document,
        header_digest=facts.header_digest,
        layout=layout_of(facts),
        tensor_count=len(facts.tensors),
        weight_bytes=facts.weight_bytes,
        stamps=stamps_of(facts),
    )
    save(folder, document)
    return document
