"""A file of a model, open for reading: only what is surely the model's, and never zeros."""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack
from pathlib import Path

from meshnode.errors import ModelError
from meshnode.models.manifest import FileChanged
from meshnode.models.peers.offers import held_spans
from meshnode.models.registry import KnownModel, ModelChanging, Registry
from meshnode.models.slice_mark import hole_in
from meshnode.models.spans import Span, joined, without
from meshnode.models.store.slice import in_use, is_as_told


class ModelFile:
    """I read one file of a model, which stays what it is while I am open: a slice is neither
    removed nor made smaller, and a whole file that is written to is not read any further."""

    def __init__(self, registry: Registry, model: KnownModel, index: int) -> None:
        """Raises `ModelError`, among them `ModelChanging`."""
        self.size_bytes = model.sizes[index]
        self._path = model.facts.files[index]
        self._is_slice = model.part is not None
        self._open = ExitStack()
        try:
            self._open.enter_context(in_use([self._path]))
            self._fd = _open_file(self._path)
            self._open.callback(os.close, self._fd)
            self._before = self._stamp()
            # After the lock, so that nothing of what is told can be gone by now.
            if not registry.is_as_found(model) or (model.part and not is_as_told(model.part)):
                raise ModelChanging(
                    f"{model.entry.name} is being written to: try again when that is done, or run "
                    "`mesh models verify` on the node's machine"
                )
            self._missing = self._find_missing(model, index)
        except BaseException:
            self.close()
            raise

    def first_missing(self, wanted: Span) -> Span | None:
        """The first bytes of these that are not here."""
        there = without([wanted], self._missing)
        return next(iter(without([wanted], there)), None)

    def read(self, start: int, size_bytes: int) -> bytes:
        """At least a byte of it. Raises `ModelError`."""
        try:
            data = os.pread(self._fd, size_bytes, start)
        except OSError as error:
            raise ModelError(f"{self._path} cannot be read: {error.strerror}") from error
        if not data or (not self._is_slice and self._stamp() != self._before):
            raise FileChanged(f"{self._path} was written to while it was read")
        return data

    def close(self) -> None:
        self._open.close()

    def _stamp(self) -> tuple[int, int]:
        found = os.fstat(self._fd)
        return found.st_mtime_ns, found.st_size

    def _find_missing(self, model: KnownModel, index: int) -> tuple[Span, ...]:
        if model.part is not None:
            # Between tensors there are zeros, to the next multiple of the alignment.
            padding = model.alignments[index] - 1
            held = joined([*held_spans(model.part), *self._tail(model, index, padding)], padding)
            return without([Span(index, 0, self.size_bytes)], held)
        return joined(
            Span(index, tensor.offset, tensor.offset + tensor.nbytes)
            for tensor in model.facts.tensors
            if tensor.file_index == index
            and hole_in(self._fd, tensor.offset, tensor.offset + tensor.nbytes)
        )

    def _tail(self, model: KnownModel, index: int, padding: int) -> list[Span]:
        ends = [t.offset + t.nbytes for t in model.facts.tensors if t.file_index == index]
        end = max(ends, default=self.size_bytes)
        return [Span(index, end, self.size_bytes)] if 0 < self.size_bytes - end <= padding else []


def _open_file(path: Path) -> int:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ModelError(f"{path} is no file any more")
    return descriptor
