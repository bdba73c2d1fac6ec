"""Models, or parts of them, from their sources into this node's store.

A model that is pulled begins as its header: a few megabytes, from which everything is planned. Then
come the tensors that somebody here asks for, and no others: from members that hold them, from all
of those at once, and from the source what no member has.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import trio

from meshnode.config import human_bytes
from meshnode.errors import MeshError, NetworkError, ResourceError
from meshnode.models.bounds import NO_BOUNDS, Bounds
from meshnode.models.manifest import Manifest
from meshnode.models.pull.nearness import turns
from meshnode.models.pull.pull import Pull, Supply
from meshnode.models.pull.ranges import Headway
from meshnode.models.pull.remote_header import fetch_headers
from meshnode.models.pull.source import RangeSource, SourceChanged
from meshnode.models.spans import Span, without
from meshnode.models.store.slice import Slice, held_manifest, open_slice
from meshnode.models.store.store import NewFile, Store
from meshnode.models.store.thinning import annotate
from meshnode.models.store.writer import SliceWriter
from meshnode.models.verify import check_against_source

OpenSource = Callable[[str], AbstractAsyncContextManager[RangeSource]]
"""The source that a reference names. Raises `MeshError`."""

FindHolders = Callable[[str], Awaitable[Sequence[RangeSource]]]
"""The members that hold something of the model of that identity, the nearest first."""

LARGE_HEADERS_AT_ONCE = 2
PROGRESS_STEP_BYTES = 64 * 2**20

OnProgress = Callable[[int, int], None]
"""Bytes that came and all that are to come, from trio's thread."""

FROM_MEMBERS = "mesh:"
"""What a source begins with that is the members themselves."""

log = logging.getLogger(__name__)


async def nobody(_identity: str) -> Sequence[RangeSource]:
    """No members, or none that may be asked."""
    return ()


class _Writing:
    """Who of a node's fetchers writes into one slice. The others wait, and are told how far that
    one is: whoever waits for them sees that it goes on."""

    def __init__(self) -> None:
        self._lock = trio.Lock()
        self._told: list[OnProgress] = []

    @asynccontextmanager
    async def turn(self, on_progress: OnProgress) -> AsyncIterator[OnProgress]:
        """What to tell one's own progress to."""
        self._told.append(on_progress)
        try:
            async with self._lock:
                yield self._tell
        finally:
            self._told.remove(on_progress)

    def _tell(self, done_bytes: int, total_bytes: int) -> None:
        for told in tuple(self._told):
            told(done_bytes, total_bytes)


class _Turns:
    """Who of a node's fetchers begins a slice, or writes into one: the others wait, and find
    there what has come."""

    def __init__(self) -> None:
        self.beginning = trio.Lock()
        self.large_headers = trio.CapacityLimiter(LARGE_HEADERS_AT_ONCE)
        self.users: set[Path] = set()  # what this node's own user wants, whoever has begun it
        self.writing: defaultdict[Path, _Writing] = defaultdict(_Writing)


class Fetcher:
    """I am the node's one way of getting bytes of models that it has not."""

    def __init__(
        self, store: Store, open_source: OpenSource, find_holders: FindHolders = nobody
    ) -> None:
        self._store = store
        self._open = open_source
        self._find_holders = find_holders
        self._turns = _Turns()

    def under_other_rules(
        self, open_source: OpenSource, find_holders: FindHolders = nobody
    ) -> Fetcher:
        """Another in the same node, for somebody who may have it ask elsewhere: what both are to
        get comes once."""
        other = Fetcher(self._store, open_source, find_holders)
        other._turns = self._turns
        return other

    # -- headers ------------------------------------------------------------------------------

    async def obtain(self, source: str, bounds: Bounds = NO_BOUNDS) -> Slice:
        """What there is of the model at this source: its header at least. A source that cannot be
        reached does not matter where something of it was pulled before. Raises `MeshError`."""
        found = await self._obtain(source, bounds)
        if bounds is NO_BOUNDS:
            self._turns.users.add(found.folder)
        return found

    async def _obtain(self, source: str, bounds: Bounds) -> Slice:
        try:
            async with self._open(source) as opened:
                find = partial(self._store.by_source, source, opened.validator)
                known = await trio.to_thread.run_sync(find)
                return known or (await self._begin(source, opened, bounds))[0]
        except NetworkError:
            known = await trio.to_thread.run_sync(self._store.by_source, source)
            if known is None:
                raise
            return known

    async def obtain_from_holders(
        self, source: str, provisional: str, bounds: Bounds = NO_BOUNDS
    ) -> Slice | None:
        """The same of a model whose identity is known, from members that hold some of it; None
        where there are none."""
        for holder in await self._find_holders(provisional):
            try:
                begun, is_new = await self._begin(source, holder, bounds)
            except ResourceError:
                raise
            except MeshError as error:
                log.info("no header from %s: %s", holder.title, error)
                continue
            if begun.identity.provisional == provisional:
                return begun
            log.warning("%s gave the header of another model", holder.title)
            if is_new:
                await trio.to_thread.run_sync(self._store.remove, begun.folder)
        return None

    async def _begin(
        self, source: str, opened: RangeSource, bounds: Bounds = NO_BOUNDS
    ) -> tuple[Slice, bool]:
        """What was begun, and whether by us: it may have been while its header came."""
        await trio.to_thread.run_sync(bounds.check_beginning, 1)
        headers = await fetch_headers(opened, self._turns.large_headers)
        files = [
            NewFile(file.name, file.size_bytes, found.data)
            for file, found in zip(opened.files, headers, strict=True)
        ]

        def begin() -> tuple[Slice, bool]:
            bounds.check_beginning(sum(len(file.header) for file in files))
            others = self._store.folders()
            made = self._store.create(files, source, opened.validator)
            if made.folder in others:
                return made, False
            twin = self._store.twin_of(made) or self._begun_from_members(made)
            if twin is None:
                self._turns.users.discard(made.folder)
                bounds.note_begun(made, lambda: made.folder in self._turns.users)
                return made, True
            self._store.remove(made.folder)
            if twin.document.source != source:
                annotate(twin.folder, lambda document: replace(document, source=source))
                twin = open_slice(twin.folder)
            return twin, False

        async with self._turns.beginning:
            return await trio.to_thread.run_sync(begin)

    def _begun_from_members(self, made: Slice) -> Slice | None:
        """The same files, of which members gave something before this machine was told their
        source. Not where they named a root: that is their word, and would be held against it."""
        if (made.document.source or "").startswith(FROM_MEMBERS):
            return None
        found = self._store.by_identity(made.identity.provisional, beside=made.folder)
        source = found.document.source if found else None
        is_theirs = source is not None and source.startswith(FROM_MEMBERS)
        return found if found and is_theirs and found.document.root is None else None

    async def holders_of(self, part: Slice) -> Sequence[RangeSource]:
        """The members that hold something of it, the nearest first."""
        return await self._find(part, part.identity.provisional)

    async def _find(self, part: Slice, identity: str) -> list[RangeSource]:
        """Less whoever says that it has more pieces than the model is made of."""
        most = len(part.facts.tensors) + len(part.document.files)
        found = await self._find_holders(identity)
        return [holder for holder in found if len(holder.holds or ()) <= most]

    # -- tensors ------------------------------------------------------------------------------

    async def fetch(
        self,
        part: Slice,
        names: Iterable[str],
        expected: Mapping[str, bytes],
        on_progress: OnProgress,
        *,
        refusal: str | None = None,
        root: str | None = None,
        bounds: Bounds = NO_BOUNDS,
    ) -> Manifest:
        """Has these tensors in the slice, and says what it holds then. `expected`: digests, of
        those that somebody knows. Nobody is asked for anything where nothing is missing. `refusal`:
        why the source may not be asked, where it may not. `root`: the model's, where `expected` has
        every digest and proves it: then files of another date will do too. Raises
        `MeshError`: the source is gone or has another file now, the disk is full; all of it came
        and is not what the source says.
        """
        wanted = tuple(names)
        async with self._turns.writing[part.folder].turn(on_progress) as tell:
            # After a kill all that is held is read again first, which takes as long as it takes.
            read = _from_thread(tell)
            begin = partial(SliceWriter, part.folder, dict(expected), read, root=root)
            writer = await trio.to_thread.run_sync(begin)
            try:
                writer.check_room(wanted)
                bounds.check_room(writer.slice, writer.missing_bytes(wanted))
                if writer.missing(wanted):
                    holders = await self._holders(part, root)
                    if not await _fetch_from(holders, writer, part, wanted, tell):
                        await self._fetch_from_source(writer, part, wanted, tell, refusal)
                check = partial(check_against_source, writer, _from_thread(tell))
                await trio.to_thread.run_sync(check)
            finally:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(writer.close)
            return await trio.to_thread.run_sync(held_manifest, writer.slice)

    async def _holders(self, part: Slice, root: str | None) -> list[RangeSource]:
        """Members with the very files, then those whose files are as long."""
        validator = part.document.validator
        found = [
            holder
            for holder in await self._find(part, part.identity.provisional)
            if holder.validator == validator
        ]
        if root is not None:
            sizes = [size_bytes for _, size_bytes in part.document.files]
            found += [
                holder
                for holder in await self._find(part, root)
                if holder.validator != validator
                and [file.size_bytes for file in holder.files] == sizes
            ]
        return found

    async def _fetch_from_source(
        self,
        writer: SliceWriter,
        part: Slice,
        names: Sequence[str],
        on_progress: OnProgress,
        refusal: str | None,
    ) -> None:
        if refusal is not None:
            raise ResourceError(refusal)
        source = part.document.source
        if source is not None and source.startswith(FROM_MEMBERS):
            raise NetworkError(
                f"the members that are connected do not give all that is wanted of {part.name}: "
                f"{human_bytes(writer.missing_bytes(names))} are missing; what came is kept, so "
                "pull again once a member that has the rest is connected"
            )
        if source is None:
            raise NetworkError(
                f"{part.name} is not all here, and nothing says where the rest is: pull it again"
            )
        async with self._open_unchanged(source, part) as opened:
            missing = writer.missing(names)
            try:
                await Pull(missing, [Supply(opened)], writer, _telling(on_progress, missing)).run()
            except SourceChanged as error:
                raise _replaced(part) from error

    async def check_source(self, part: Slice) -> None:
        """Raises `SourceChanged` where the source says that it has another file by now than the one
        begun here; not where it says nothing, or is the members themselves."""
        source = part.document.source
        if source is None or source.startswith(FROM_MEMBERS):
            return
        try:
            async with self._open_unchanged(source, part):
                pass
        except SourceChanged:
            raise
        except MeshError as error:
            log.info("%s does not say whether its file is still the same: %s", source, error)

    @asynccontextmanager
    async def _open_unchanged(self, source: str, part: Slice) -> AsyncIterator[RangeSource]:
        async with self._open(source) as opened:
            if opened.validator != part.document.validator:
                raise _replaced(part)
            yield opened


def _replaced(part: Slice) -> SourceChanged:
    return SourceChanged(
        f"{part.name} is another file at its source than the one begun here: start again for the "
        f"new one, and remove the old (`mesh models rm {part.folder.name}`)"
    )


async def _fetch_from(
    holders: Sequence[RangeSource],
    writer: SliceWriter,
    part: Slice,
    names: Sequence[str],
    on_progress: OnProgress,
) -> bool:
    """What members hold of it; whether that was all."""
    missing = writer.missing(names)
    beyond = without(missing, (span for holder in holders for span in holder.holds or ()))
    there = without(missing, beyond)
    if not there:
        return False
    try:
        supplies = [
            Supply(holder, rank=turn.rank, is_far=turn.is_far)
            for holder, turn in zip(holders, turns([one.rtt_s for one in holders]), strict=True)
        ]
        await Pull(there, supplies, writer, _telling(on_progress, missing)).run()
    except NetworkError as error:
        log.warning("members could not give all that they hold of %s: %s", part.name, error)
    return not writer.missing(names)


def _telling(on_progress: OnProgress, missing: Sequence[Span]) -> Callable[[Headway], None]:
    total_bytes = sum(span.size_bytes for span in missing)

    def tell(headway: Headway) -> None:
        on_progress(min(headway.done_bytes, total_bytes), total_bytes)

    return tell


def _from_thread(on_progress: OnProgress) -> OnProgress:
    """The same from a thread, now and then; ends the thread's work where that is cancelled."""
    told_bytes = 0

    def tell(done_bytes: int, total_bytes: int) -> None:
        nonlocal told_bytes
        trio.from_thread.check_cancelled()
        if done_bytes == total_bytes or done_bytes - told_bytes >= PROGRESS_STEP_BYTES:
            told_bytes = done_bytes
            trio.from_thread.run_sync(on_progress, done_bytes, total_bytes)

    return tell
