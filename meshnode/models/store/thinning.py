"""What a slice holds and no plan needs any more: known, and given back."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from meshnode.errors import MeshError, ResourceError
from meshnode.models.slice_mark import slice_folder
from meshnode.models.store.disk import allocated_bytes, can_punch
from meshnode.models.store.document import SliceDocument
from meshnode.models.store.locks import USE_LOCK, WRITER_LOCK, Lock, last_used_ns
from meshnode.models.store.slice import Slice, open_slice, read_document, save
from meshnode.models.store.writer import SliceWriter


class NoRoomBack(ResourceError):
    """The file system gives room back only with a whole file."""


def note_needed(paths: Iterable[Path], names: Collection[str]) -> None:
    """These tensors are what the plan of now computes with, of the slices that these files belong
    to. A note that cannot be made costs no more than a pull."""
    needed = frozenset(names)
    for folder in {found for path in paths if (found := slice_folder(path))}:
        annotate(folder, lambda document: replace(document, needed=needed))


def annotate(folder: Path, change: Callable[[SliceDocument], SliceDocument]) -> None:
    """Replaces the document by what `change` makes of it, unless it is damaged, or somebody writes
    to the slice, who would write over it. Holds nothing against anybody's reading."""
    with suppress(MeshError, OSError):
        lock = Lock(folder, WRITER_LOCK)
        try:
            document = read_document(folder)
            changed = change(document)
            # What a disk has damaged is a claim, which a new seal would make the truth.
            if document.sealed and changed != document:
                save(folder, changed)
        finally:
            lock.close()


def unneeded(found: Slice) -> tuple[str, ...]:
    """What it holds beyond the last plan, where one is known. A model that is all here is nobody's
    part: it stays whole."""
    needed = found.document.needed
    if needed is None or found.complete:
        return ()
    return tuple(tensor.name for tensor in found.held if tensor.name not in needed)


def thin(folder: Path) -> int:
    """Drops what is not needed; how many bytes that gave back. What is in use, damaged, or on a
    disk too full to tell of it, is left as it is."""
    with suppress(MeshError):
        names = unneeded(open_slice(folder))
        return drop_tensors(folder, names) if names else 0
    return 0


def drop_tensors(folder: Path, names: Collection[str]) -> int:
    """These are held no more; how many bytes that gave back. Raises `NoRoomBack`, `SliceInUse`,
    `SliceGone`, another `ModelError`, `DiskFull`; what was held is held then."""
    if not can_punch(folder):
        raise NoRoomBack(
            f"the file system of {folder} gives no room back within a file: remove the whole "
            f"(`mesh models rm {folder.name}`)"
        )
    used_ns = last_used_ns(folder)
    before_bytes = allocated_bytes(folder)
    try:
        with SliceWriter(folder) as writer:
            writer.drop(names)
    finally:
        with suppress(OSError):  # that was no use of it
            os.utime(folder / USE_LOCK, ns=(used_ns, used_ns))
    return max(0, before_bytes - allocated_bytes(folder))
