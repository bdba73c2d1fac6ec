"""One pull: connections that fetch ranges from sources into a sink, in one nursery."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from meshnode.models.pull.ranges import JOIN_GAP_BYTES, Headway, Ranges, Request, Supplier
from meshnode.models.pull.source import (
    RangeSource,
    Sink,
    SourceError,
    SourceFault,
    SourceGone,
)
from meshnode.models.pull.threads import limiter
from meshnode.models.spans import Span, joined
from meshnode.nurseries import accompanied_by, bare_nursery

CONNECTIONS = 4
TELL_EVERY_S = 0.5


@dataclass(frozen=True)
class Supply:
    """A source, how many connections to it, and whether others come before it (a lower rank), or
    are so much nearer that it only helps them."""

    source: RangeSource
    connections: int = CONNECTIONS
    rank: int = 0
    is_far: bool = False


class Pull:
    """I fetch what is wanted. Made for one `run`."""

    def __init__(
        self,
        wanted: Sequence[Span],
        supplies: Sequence[Supply],
        sink: Sink,
        tell: Callable[[Headway], None] = lambda _: None,
        chunk_bytes: int | None = None,
    ) -> None:
        """`tell` is called twice a second, from trio's thread, and once at the end."""
        self._sink = sink
        self._tell = tell
        self._last_error: SourceError | SourceFault | None = None
        self._supplies = self._fit(supplies, wanted)
        self._ranges = Ranges(
            wanted,
            [_supplier(supply) for supply in self._supplies],
            trio.current_time(),
            chunk_bytes,
        )
        self._running: dict[Request, _Meter] = {}
        self._news = trio.Event()

    async def run(self) -> None:
        """Returns once all that is wanted is in the sink, and done there. Raises the last error of
        a source where nobody is left to ask, and what the sink raises. What was done by then stays
        done, as it does for who is cancelled."""
        self._raise_when_stuck()
        async with accompanied_by(self._tell_now_and_then), bare_nursery() as nursery:
            for lane in range(len(self._ranges.lanes)):
                nursery.start_soon(self._fetch, lane)
        self._tell(self._ranges.headway(trio.current_time()))

    async def _fetch(self, lane: int) -> None:
        """The work of one connection."""
        source = self._supplies[self._ranges.lanes[lane]].source
        while (todo := self._ranges.take(lane, trio.current_time())) is not None:
            if isinstance(todo, Request):
                await self._fetch_one(todo, source)
                self._raise_when_stuck()
                self._news.set()
                self._news = trio.Event()
            else:
                with trio.move_on_at(todo):
                    await self._news.wait()

    async def _fetch_one(self, request: Request, source: RangeSource) -> None:
        span, meter = request.span, _Meter(request.span, self._sink)
        self._running[request] = meter
        failure: SourceError | SourceFault | None = None
        try:
            with meter.scope:
                await source.read(span.file_index, span.start, span.stop, meter.into)
        except (SourceError, SourceFault) as error:
            failure = error
        self._count()
        del self._running[request]
        supplier = self._ranges.lanes[request.lane]
        if isinstance(failure, SourceError) and not isinstance(failure, SourceGone):
            self._last_error = failure
            self._ranges.fail(request, trio.current_time(), is_doubtful=True)
            self._ranges.drop(supplier)
            return
        rejected = await self._done(self._ranges.arrived(request))
        if rejected:
            self._last_error = SourceError(
                f"{source.title} has sent other bytes than those of the model whose digests are "
                "known, or somebody on the way has changed them: not used; pull it from elsewhere"
            )
        if meter.scope.cancelled_caught:
            now = trio.current_time()
            self._ranges.fail(request, now, is_taken_over=True, rejected=rejected)
            return
        if failure is None:
            self._ranges.finish(request, rejected)
            return
        if not isinstance(self._last_error, SourceError):
            self._last_error = failure
        retry_after_s = failure.retry_after_s if isinstance(failure, SourceFault) else 0.0
        self._ranges.fail(
            request, trio.current_time(), retry_after_s=retry_after_s, rejected=rejected
        )
        if isinstance(failure, SourceGone):
            self._ranges.drop(supplier)

    async def _done(self, span: Span | None) -> Sequence[Span]:
        if span is None:
            return ()
        return await trio.to_thread.run_sync(
            self._sink.done, span.file_index, span.start, span.stop, limiter=limiter()
        )

    async def _tell_now_and_then(self) -> None:
        while True:
            await trio.sleep(TELL_EVERY_S)
            self._count()
            self._end_laggard()
            self._tell(self._ranges.headway(trio.current_time()))

    def _end_laggard(self) -> None:
        late = self._ranges.laggard(trio.current_time())
        if late in self._running:
            self._running[late].scope.cancel()

    def _count(self) -> None:
        """What the threads have received since the last time."""
        now = trio.current_time()
        for request, meter in self._running.items():
            if fresh_bytes := meter.fresh_bytes():
                self._ranges.receive(request, fresh_bytes, now)

    def _fit(self, supplies: Sequence[Supply], wanted: Sequence[Span]) -> list[Supply]:
        """Those who have these files, and can give what is wanted of them."""
        fit: list[Supply] = []
        for supply in supplies:
            source = supply.source
            if _sizes(source) != _sizes(supplies[0].source):
                self._last_error = SourceError(f"{source.title} has another model of that name")
            elif source.is_sequential and not _goes_to_the_end(wanted, source):
                self._last_error = SourceError(
                    f"{source.title} gives files only from their beginning (it ignores Range), and "
                    "parts are wanted: pull the whole model, or take it from elsewhere"
                )
            else:
                fit.append(supply)
        return fit

    def _raise_when_stuck(self) -> None:
        if not self._ranges.is_stuck:
            return
        if isinstance(self._last_error, SourceFault):
            raise SourceError(
                f"{self._last_error}; given up after several tries, what has come is kept: pull "
                "again to go on"
            ) from self._last_error
        raise self._last_error or SourceError("nobody has all that is wanted of the model")


class _Meter:
    """Takes the bytes of one request, in a thread, and counts them."""

    def __init__(self, span: Span, sink: Sink) -> None:
        self.scope = trio.CancelScope()
        self._span = span
        self._sink = sink
        self._taken_bytes = 0
        self._told_bytes = 0

    def into(self, data: memoryview) -> None:
        self._sink.write(self._span.file_index, self._span.start + self._taken_bytes, data)
        self._taken_bytes += len(data)

    def fresh_bytes(self) -> int:
        taken_bytes = self._taken_bytes
        fresh_bytes, self._told_bytes = taken_bytes - self._told_bytes, taken_bytes
        return fresh_bytes


def _supplier(supply: Supply) -> Supplier:
    source = supply.source
    connections = 1 if source.is_sequential else supply.connections
    return Supplier(connections, source.holds, supply.rank, source.is_sequential, supply.is_far)


def _sizes(source: RangeSource) -> list[int]:
    return [file.size_bytes for file in source.files]


def _goes_to_the_end(wanted: Sequence[Span], source: RangeSource) -> bool:
    """Whether of each file no more than a beginning is left out."""
    spans = joined(wanted, JOIN_GAP_BYTES)
    indices = [span.file_index for span in spans]
    return len(indices) == len(set(indices)) and all(
        source.files[span.file_index].size_bytes - span.stop <= JOIN_GAP_BYTES for span in spans
    )
