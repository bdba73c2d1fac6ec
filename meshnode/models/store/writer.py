"""Bytes into a slice: from a range that was received to a tensor that is held.

A range counts once it was flushed and the journal tells of it; a tensor is held once all its ranges
count, its bytes were read back and digested, and `slice.cbor` was replaced. A kill or a power cut
at any moment costs the ranges that were not done, and nothing that was told to be there.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from meshnode.crash_points import reached
from meshnode.errors import DiskFull, ModelError
from meshnode.models.facts import TensorFacts
from meshnode.models.identity import Identity
from meshnode.models.manifest import Progress, digest_tensors
from meshnode.models.spans import Span, joined, size_of
from meshnode.models.store.byte_set import ByteSet
from meshnode.models.store.disk import Reserve, check_room, data_in, punch_hole, told
from meshnode.models.store.journal import Journal
from meshnode.models.store.layout import FileLayout, place_of
from meshnode.models.store.locks import USE_LOCK, WRITER_LOCK, Lock, SliceInUse
from meshnode.models.store.slice import (
    Cancelled,
    Slice,
    confirmed,
    open_slice,
    restated,
    save,
    stamps_of,
)

SAVE_EVERY_BYTES = 64 * 2**20
"""Of whole tensors, between two replacements of the document."""
_RESERVE_BYTES = 64 * 1024  # beside 256 a tensor: the document and the journal, twice


class SliceWriter:
    """I fill one slice, and I am the only one who does.

    All of it may block on a disk, so it belongs in threads; several may call at once, each for
    other bytes. `lost`: tensors that were held, and were found to be others when read again.
    """

    def __init__(
        self,
        folder: Path,
        expected: Mapping[str, bytes] | None = None,
        progress: Progress | None = None,
        cancelled: Cancelled | None = None,
        *,
        verify: bool = False,
        root: str | None = None,
    ) -> None:
        """Takes up what is there. `expected`: digests that what comes is to have. `root`: the
        model's, where `expected` proves it: all digests are there, and make it up.

        Blocks, for long where a kill has left it unclear what is held, or with `verify`: all that
        is held is read again then, of which `progress` tells. Raises `SliceInUse`, `SliceGone`,
        another `ModelError`, or `DigestCancelled`.
        """
        self._lock = threading.Lock()
        self._fds: list[int] = []
        self._journal: Journal | None = None
        self._reserve: Reserve | None = None
        self._held_locks: list[Lock] = []
        self._proven_root = root
        self.lost: tuple[TensorFacts, ...] = ()
        try:
            with told(folder):
                self._held_locks = [Lock(folder, WRITER_LOCK)]
                self._use = Lock(folder, USE_LOCK, shared=True)
                self._held_locks.append(self._use)
                self._use.touch()
            found = open_slice(folder)
            still = confirmed(found, progress, cancelled, anyway=verify)
            self._take_up(found, still, expected or {})
        except BaseException:
            self._let_go()
            raise

    def _take_up(self, found: Slice, slice_: Slice, expected: Mapping[str, bytes]) -> None:
        """`slice_` is what has been `found`, less what was read again and is wrong."""
        self._slice = slice_
        self.lost = tuple(t for t in found.held if t.name not in slice_.document.held)
        self._digests = dict(slice_.document.digests)
        self._expected = dict(expected)
        self._whole = set(slice_.document.held)
        self._unsaved_bytes = 0
        facts = slice_.facts
        with told(slice_.folder):
            for left in slice_.folder.glob(".*.part"):  # of a document, cut short by a kill
                left.unlink(missing_ok=True)
            self._reserve = Reserve(slice_.folder, _RESERVE_BYTES + 256 * len(facts.tensors))
            for path in facts.files:
                self._fds.append(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        self._layout = [FileLayout(facts.tensors, index) for index in range(len(facts.files))]
        self._done = [ByteSet() for _ in facts.files]
        inodes = ",".join(str(inode) for _, inode in stamps_of(facts))
        key = f"{slice_.identity.provisional} {inodes}".encode()
        self._journal = Journal(slice_.folder, key)
        for span in self._journal.read():
            if span.file_index < len(self._done):
                self._done[span.file_index].add(span.start, span.stop)
        for tensor in self.lost:
            self._done[tensor.file_index].remove(*place_of(tensor))
        self._protected = [spans.copy() for spans in self._done]
        for spans, layout in zip(self._protected, self._layout, strict=True):
            spans.add(0, layout.header_bytes)
        for tensor in facts.tensors:
            if tensor.name in self._whole:
                self._protected[tensor.file_index].add(*place_of(tensor))
        if slice_ is not found:
            self._journal.rewrite(self._unfinished())
            save(slice_.folder, slice_.document)
        self._reclaim()
        # The journal may be of before a kill that came between its last range and the digest.
        self._complete(facts.tensors)

    def __enter__(self) -> SliceWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
            return
        with suppress(ModelError, DiskFull):  # the error that is on its way says more
            self.close()

    # -- what is there ----------------------------------------------------------------------------

    @property
    def slice(self) -> Slice:
        """As the document has it now."""
        return self._slice

    @property
    def identity(self) -> Identity:
        return self._slice.identity

    def missing(self, tensors: Iterable[str]) -> tuple[Span, ...]:
        """What must still come for these tensors, in the files' order; neighbours are joined where
        nothing is between them. Raises `ModelError` for a name that the model has not."""
        with self._lock:
            return joined(
                Span(tensor.file_index, start, stop)
                for tensor in self._named(tensors)
                if tensor.name not in self._whole
                for start, stop in self._done[tensor.file_index].gaps(*place_of(tensor))
            )

    def missing_bytes(self, tensors: Iterable[str]) -> int:
        return size_of(self.missing(tensors))

    def check_room(self, tensors: Iterable[str]) -> None:
        """Raises `NoRoom` where the disk has too little space for what is missing of these."""
        needed_bytes = self.missing_bytes(tensors)
        check_room(self._slice.folder, needed_bytes, f"pulling {self._slice.name}")

    # -- bytes ------------------------------------------------------------------------------------

    def write(self, file_index: int, offset: int, data: memoryview) -> None:
        """Bytes of a file, to count once `done` says so. Those of the header, of held tensors and
        of ranges that are done are passed over: what lies between two ranges is fetched with them.
        Raises `DiskFull`, `ModelError`."""
        stop = offset + len(data)
        if not 0 <= offset <= stop <= self._layout_size(file_index):
            raise ValueError(f"bytes {offset} to {stop} are beyond the file's end")
        with told(self._slice.facts.files[file_index]):
            for start, end in self._protected[file_index].gaps(offset, stop):
                _write_all(self._fds[file_index], data[start - offset : end - offset], start)

    def done(self, file_index: int, start: int, stop: int) -> tuple[Span, ...]:
        """The range is whole. Flushes it and tells the journal; tensors that are whole by it are
        digested, and held soon. Returns where those lie whose digests are others than expected:
        their bytes are thrown away and missing again. Raises `DiskFull`, `ModelError`."""
        assert self._journal is not None
        with self._lock:
            with told(self._slice.facts.files[file_index]):
                reached("slice.written")
                os.fdatasync(self._fds[file_index])
                reached("slice.flushed")
                self._journal.append(Span(file_index, start, stop))
            reached("slice.journalled")
            self._done[file_index].add(start, stop)
            self._protect(file_index, start, stop)
            wrong = self._complete(self._layout[file_index].touching(start, stop))
        return joined(Span(tensor.file_index, *place_of(tensor)) for tensor in wrong)

    def _complete(self, tensors: Iterable[TensorFacts]) -> list[TensorFacts]:
        """Digests those that are whole now; returns those that are wrong, thrown away by then."""
        ready = [
            tensor
            for tensor in tensors
            if tensor.name not in self._whole
            and self._done[tensor.file_index].covers(*place_of(tensor))
        ]
        wrong: list[TensorFacts] = []
        for entry, tensor in zip(
            digest_tensors(self._slice.facts, ready),
            sorted(ready, key=lambda tensor: tensor.name),
            strict=True,
        ):
            known = self._digests.get(entry.name, entry.digest)
            if self._expected.get(entry.name, known) != entry.digest:
                wrong.append(tensor)
                continue
            self._digests[entry.name] = entry.digest
            self._whole.add(entry.name)
            self._unsaved_bytes += entry.nbytes
        if ready:
            reached("slice.digested")
        if wrong:
            self._forget(wrong)
        if self._unsaved_bytes >= SAVE_EVERY_BYTES:
            self._save()
        return wrong

    # -- what is held -----------------------------------------------------------------------------

    def save(self) -> Slice:
        """Makes what is whole by now held, and durable. Raises `DiskFull`, `HomeError`."""
        with self._lock:
            self._save()
        return self._slice

    def _save(self) -> None:
        document = restated(self._slice, frozenset(self._whole), self._digests, self._proven_root)
        if document != self._slice.document:
            try:
                save(self._slice.folder, document)
            except DiskFull:
                if self._reserve is None or not self._reserve.release():
                    raise
                save(self._slice.folder, document)
            reached("slice.held")
            self._slice = replace(self._slice, document=document)
        self._unsaved_bytes = 0

    def drop(self, tensors: Iterable[str]) -> int:
        """These are held no more; says how many bytes that gave back. Digests stay known. Raises
        `SliceInUse` while anybody reads the slice."""
        with self._lock, self._use.alone():
            dropped = [tensor for tensor in self._named(tensors) if self._has_bytes_of(tensor)]
            self._whole -= {tensor.name for tensor in dropped}
            return self._forget(dropped)

    def vouch(self) -> None:
        """The whole of it is what its source says it is. Raises as `save`."""
        with self._lock:
            self._save()
            vouched = self._restated(vouched=True)
            save(vouched.folder, vouched.document)
            self._slice = vouched

    def disown(self, file_indices: Iterable[int]) -> None:
        """These files, all here, are not what their source says: nothing of them is held, and what
        was thought to be their digests is forgotten. Raises `SliceInUse` as `drop`."""
        wrong = [t for t in self._slice.facts.tensors if t.file_index in file_indices]
        with self._lock, self._use.alone():
            for tensor in wrong:
                self._whole.discard(tensor.name)
                self._digests.pop(tensor.name, None)
            self._slice = self._restated(root=None)
            self._forget(wrong)

    def _restated(self, **changes: Any) -> Slice:
        return replace(self._slice, document=replace(self._slice.document, **changes))

    def _forget(self, tensors: Sequence[TensorFacts]) -> int:
        """In this order: what the journal or the document tells of is always there."""
        assert self._journal is not None
        for tensor in tensors:
            self._done[tensor.file_index].remove(*place_of(tensor))
        self._unprotect(tensors)
        self._journal.rewrite(self._unfinished())
        self._save()
        reached("slice.dropped")
        return sum(
            size_bytes
            for fd, layout in zip(self._fds, self._layout, strict=True)
            for start, stop, size_bytes in layout.runs_of(tensors)
            if punch_hole(fd, start, stop)
        )

    def close(self) -> None:
        """Makes all that is whole held, and gives the slice back; harmless when done twice."""
        if not self._fds:
            return
        assert self._journal is not None
        try:
            with self._lock, told(self._slice.folder):
                if self._reserve is not None:
                    self._reserve.release()
                for fd in self._fds:
                    os.fsync(fd)  # the times too, which the document tells
                self._save()
                self._journal.rewrite(self._unfinished())
        finally:
            self._let_go()

    # -- within -----------------------------------------------------------------------------------

    def _named(self, names: Iterable[str]) -> list[TensorFacts]:
        tensors = {tensor.name: tensor for tensor in self._slice.facts.tensors}
        try:
            return [tensors[name] for name in names]
        except KeyError as error:
            raise ModelError(f"{self._slice.name} has no tensor {error.args[0]}") from None

    def _has_bytes_of(self, tensor: TensorFacts) -> bool:
        if tensor.name in self._whole:
            return True
        start, stop = place_of(tensor)
        return list(self._done[tensor.file_index].gaps(start, stop)) != [(start, stop)]

    def _unfinished(self) -> list[Span]:
        """Ranges that are done in tensors that are not whole."""
        return [
            Span(tensor.file_index, *part)
            for tensor in self._slice.facts.tensors
            if tensor.name not in self._whole
            for part in self._done[tensor.file_index].parts(*place_of(tensor))
        ]

    def _protect(self, file_index: int, start: int, stop: int) -> None:
        """In a new set each time: `write` reads it without the lock."""
        protected = self._protected[file_index].copy()
        protected.add(start, stop)
        self._protected[file_index] = protected

    def _unprotect(self, tensors: Sequence[TensorFacts]) -> None:
        for tensor in tensors:
            protected = self._protected[tensor.file_index].copy()
            protected.remove(*place_of(tensor))
            self._protected[tensor.file_index] = protected

    def _reclaim(self) -> None:
        """Gives back what a kill has left: bytes that neither document nor journal tells of. What
        was held until now and is wrong may be in an engine's memory by way of the file: it is not
        made zeros under it."""
        spared = [] if not self.lost or self._is_alone() else self.lost
        for index, fd in enumerate(self._fds):
            kept = self._protected[index].copy()
            for tensor in spared:
                if tensor.file_index == index:
                    kept.add(*place_of(tensor))
            for start, stop in kept.gaps(0, self._layout_size(index)):
                if data_in(fd, start, stop):
                    punch_hole(fd, start, stop)

    def _is_alone(self) -> bool:
        try:
            with self._use.alone():
                return True
        except SliceInUse:
            return False

    def _layout_size(self, file_index: int) -> int:
        return self._slice.document.files[file_index][1]

    def _let_go(self) -> None:
        if self._reserve is not None:
            self._reserve.release()
        if self._journal is not None:
            self._journal.close()
        for fd in self._fds:
            os.close(fd)
        self._fds = []
        for lock in self._held_locks:
            lock.close()
        self._held_locks = []


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count
