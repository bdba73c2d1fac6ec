"""I say which bytes to ask of whom: wanted spans in, requests out.

What is wanted is joined over small gaps, and cut into requests as connections become free, in disk
order, which is what the disk of a server and ours like best. A connection is a *lane*; a lane
belongs to a supplier, and a supplier of a higher rank is asked for nothing that a living one of a
lower rank holds: peers before the internet. One that is far away gives at once what nobody nearer
has; with the rest it helps after FAR_WAITS_S, where the nearer ones would take as long again.

A request that failed is handed out again, to whichever lane is free: not at once but after a pause
that doubles, and its lane pauses too. What had arrived of it is kept. A lane that fails MAX_TRIES
times, with less than PROGRESS_BYTES between any two failures, is retired: a server may serve two
connections and no third. A range that has failed as often, whoever was asked, retires each lane
that fails at it again, so that a server that is gone is not waited for once a lane. Nobody is left
for some bytes when the lanes of all who hold them are retired: then the pull is `stuck`.

A lane that has nothing to do takes over what another would be at for much longer than it would be.

Bytes that prove wrong are a tensor's, of which several suppliers may have given parts. So the whole
of it is asked of one supplier next, and then of another: whoever has given all of what is wrong is
to blame, and after MAX_REJECTIONS times is asked for nothing more.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from meshnode.models.pull.lanes import Lane, Open, Queued, Speed
from meshnode.models.spans import Span, first_within, joined, size_of, within, without

JOIN_GAP_BYTES = 64 << 10
MIN_CHUNK_BYTES = 16 << 20
MAX_CHUNK_BYTES = 64 << 20
REQUESTS_PER_LANE = 4
"""As many at least, where chunks are not too small for it: so that no lane is left with a long
last one while the others have ended."""
UNEVEN_CHUNK_S = 2.0
LEAST_UNEVEN_CHUNK_S = 0.25
"""Of several suppliers each is asked for no more at once than came in this time, and less towards
the end: nobody is waited for because he is slow."""
FIRST_UNEVEN_CHUNK_BYTES = 4 << 20
LEAST_UNEVEN_CHUNK_BYTES = 256 << 10
FAR_WAITS_S = 5.0
FAR_LOOKS_EVERY_S = 1.0
TAKEN_OVER_PAUSE_S = 2.0
MAX_TRIES = 8
MAX_REJECTIONS = 3
PROGRESS_BYTES = 1 << 20
FIRST_PAUSE_S = 0.5
MAX_PAUSE_S = 30.0
MAX_ASKED_PAUSE_S = 120.0


@dataclass(frozen=True)
class Supplier:
    """One source as the ranges see it. holds: None is everything. One that is sequential is asked
    for each span in one piece, since a second would cost it the first again."""

    connections: int
    holds: Sequence[Span] | None = None
    rank: int = 0
    is_sequential: bool = False
    is_far: bool = False


@dataclass(frozen=True)
class Request:
    """Bytes that a lane is to fetch. `number` tells it from an earlier one for the same bytes."""

    number: int
    lane: int
    span: Span


@dataclass(frozen=True)
class Headway:
    """How far a pull is. Speed over the last seconds; None where nothing can be said yet."""

    done_bytes: int
    total_bytes: int
    bytes_per_s: float | None
    eta_s: float | None


class Ranges:
    """The requests of one pull. Lanes are numbered through, supplier by supplier."""

    def __init__(
        self,
        wanted: Iterable[Span],
        suppliers: Sequence[Supplier],
        now: float,
        chunk_bytes: int | None = None,
    ) -> None:
        spans = joined(wanted, JOIN_GAP_BYTES)
        self._queue = [Queued(span) for span in spans]
        self._suppliers = list(suppliers)
        self._lanes = [
            Lane(number)
            for number, supplier in enumerate(suppliers)
            for _ in range(supplier.connections)
        ]
        self._total_bytes = size_of(spans)
        self._chunk_bytes = chunk_bytes or fitting_chunk_bytes(self._total_bytes, len(self._lanes))
        self._open: dict[Request, Open] = {}
        self._rejections = [0] * len(suppliers)
        self._given: list[tuple[Span, ...]] = [()] * len(suppliers)
        self._number = 0
        self._done_bytes = 0
        self._speed = Speed(now)
        self._far_wait_until = now + FAR_WAITS_S
        self._held: tuple[Span, ...] = ()
        self._is_stuck: bool | None = None
        self._alone: list[tuple[Span, ...]] = []
        self._shares = self._divide(spans)

    @property
    def lanes(self) -> tuple[int, ...]:
        """The supplier of each lane."""
        return tuple(lane.supplier for lane in self._lanes)

    @property
    def is_over(self) -> bool:
        return not self._queue and not self._open

    @property
    def is_stuck(self) -> bool:
        """Bytes are wanted that nobody is left to ask for."""
        if self._is_stuck is None:
            self._is_stuck = any(
                first_within(queued.span, self._held) != queued.span for queued in self._queue
            )
        return self._is_stuck

    def take(self, lane: int, now: float) -> Request | float | None:
        """A request; or when to ask again (inf: when something else has happened, since bytes that
        others fetch may yet come back); None: there will be nothing for this lane."""
        mine = self._lanes[lane]
        if mine.is_retired or self.is_over:
            return None
        if now < mine.not_before:
            return mine.not_before
        ready_at, helps_at = math.inf, self._helps_at(mine.supplier, now)
        for queued in self._queue:
            part = first_within(queued.span, self._shares[mine.supplier])
            if part is None or queued.only not in (None, mine.supplier):
                continue
            not_before = queued.not_before
            if now < helps_at and queued.only is None:
                alone = first_within(queued.span, self._alone[mine.supplier])
                part, not_before = alone or part, not_before if alone else max(not_before, helps_at)
            if now < not_before:
                ready_at = min(ready_at, not_before)
                continue
            return self._hand_out(lane, queued, part, now)
        return ready_at

    def receive(self, request: Request, size_bytes: int, now: float) -> None:
        """More bytes came of a request, in order."""
        open_request = self._open[request]
        open_request.received_bytes += size_bytes
        open_request.received_at_s = now
        self._done_bytes += size_bytes
        self._speed.add(size_bytes, now)
        lane = self._lanes[request.lane]
        lane.since_failure_bytes += size_bytes
        if lane.since_failure_bytes >= PROGRESS_BYTES:
            lane.failures = 0

    def arrived(self, request: Request) -> Span | None:
        """What has come of a request; None: nothing."""
        size_bytes = self._open[request].received_bytes
        start = request.span.start
        return Span(request.span.file_index, start, start + size_bytes) if size_bytes else None

    def finish(self, request: Request, rejected: Iterable[Span] = ()) -> None:
        """All bytes came. `rejected` turned out wrong, and are fetched anew. They need not be bytes
        of this request, or of this pull: a digest is of a whole tensor."""
        lane = self._lanes[request.lane]
        lane.bytes_per_s = self._open.pop(request).bytes_per_s
        lane.failures = 0
        self._given[lane.supplier] += (request.span,)
        self._reject(rejected)

    def fail(
        self,
        request: Request,
        now: float,
        *,
        retry_after_s: float = 0.0,
        is_doubtful: bool = False,
        is_taken_over: bool = False,
        rejected: Iterable[Span] = (),
    ) -> None:
        """A request ended early. What had not arrived is handed out again, and all of it where what
        came is doubtful. What is taken over is another lane's at once, and nobody's fault."""
        open_request = self._open.pop(request)
        span = request.span
        if is_doubtful:
            self._done_bytes -= open_request.received_bytes
            open_request.received_bytes = 0
        reached = span.start + open_request.received_bytes
        tries = open_request.tries + 1
        if open_request.received_bytes >= PROGRESS_BYTES or is_taken_over:
            tries = 1
        asked_s = min(retry_after_s, MAX_ASKED_PAUSE_S)
        if reached < span.stop:
            rest = Span(span.file_index, reached, span.stop)
            not_before = now + (0.0 if is_taken_over else max(_pause_s(tries), asked_s))
            only = open_request.only
            if only is not None and not _is_in(rest, self._shares[only]):
                only = None  # who was to give it has been left meanwhile
            bisect.insort(self._queue, Queued(rest, tries, not_before, only))
            self._is_stuck = None
        lane = self._lanes[request.lane]
        if reached > span.start:
            self._given[lane.supplier] += (replace(span, stop=reached),)
        if is_taken_over:
            lane.bytes_per_s = open_request.received_bytes / max(now - open_request.since_s, 1e-3)
            lane.not_before = now + TAKEN_OVER_PAUSE_S
            self._reject(rejected)
            return
        lane.since_failure_bytes = 0
        lane.failures += 1
        lane.not_before = now + max(_pause_s(lane.failures), asked_s)
        if max(lane.failures, tries) >= MAX_TRIES:
            lane.is_retired = True
            self._divide_again()
        self._reject(rejected)

    def laggard(self, now: float) -> Request | None:
        """What to end, and to `fail` as taken over: a lane is so slow with it that one with nothing
        to do would have the rest long before."""
        busy = {request.lane for request in self._open}
        free = [
            lane
            for number, lane in enumerate(self._lanes)
            if number not in busy
            and not lane.is_retired
            and now >= max(lane.not_before, self._helps_at(lane.supplier, now))
        ]
        return next(
            (one for one in self._open if any(self._is_late(one, to, now) for to in free)), None
        )

    def _is_late(self, request: Request, lane: Lane, now: float) -> bool:
        """Whether that lane had better take it over."""
        at, supplier = self._open[request], self._suppliers[self._lanes[request.lane].supplier]
        if at.only is not None or supplier.is_sequential or not lane.bytes_per_s:
            return False
        is_late = at.is_late(request.span.size_bytes, lane.bytes_per_s, now)
        return is_late and _is_in(request.span, self._shares[lane.supplier])

    def drop(self, supplier: int) -> None:
        """Nothing more is asked of a supplier. What it is being asked for may end as it will."""
        for lane in self._lanes:
            if lane.supplier == supplier:
                lane.is_retired = True
        self._divide_again()

    def headway(self, now: float) -> Headway:
        left_bytes = self._total_bytes - self._done_bytes
        speed = self._speed.bytes_per_s(now)
        eta_s = None
        if left_bytes == 0:
            eta_s = 0.0
        elif speed:
            eta_s = left_bytes / speed
        return Headway(self._done_bytes, self._total_bytes, speed, eta_s)

    def _helps_at(self, supplier: int, now: float) -> float:
        """When it may be asked for what others have too."""
        if not self._suppliers[supplier].is_far:
            return -math.inf
        if now < self._far_wait_until:
            return self._far_wait_until
        eta_s = self.headway(now).eta_s
        return now if eta_s is None or eta_s > FAR_WAITS_S else now + FAR_LOOKS_EVERY_S

    def _hand_out(self, lane: int, queued: Queued, part: Span, now: float) -> Request:
        stop = part.stop
        if not self._suppliers[self._lanes[lane].supplier].is_sequential:
            stop = min(stop, part.start + self._chunk_bytes_for(self._lanes[lane]))
        span = Span(part.file_index, part.start, stop)
        self._queue.remove(queued)
        for rest in without((queued.span,), (span,)):
            bisect.insort(self._queue, replace(queued, span=rest))
        self._number += 1
        request = Request(self._number, lane, span)
        self._open[request] = Open(queued.tries, queued.only, now)
        return request

    def _chunk_bytes_for(self, lane: Lane) -> int:
        if len(self._suppliers) == 1:
            return self._chunk_bytes
        fair = (self._total_bytes - self._done_bytes) // (2 * len(self._lanes))
        if lane.bytes_per_s is None:
            fitting = FIRST_UNEVEN_CHUNK_BYTES
        else:
            least = int(lane.bytes_per_s * LEAST_UNEVEN_CHUNK_S)
            fitting = min(int(lane.bytes_per_s * UNEVEN_CHUNK_S), max(fair, least))
        return min(max(LEAST_UNEVEN_CHUNK_BYTES, fitting), self._chunk_bytes)

    def _reject(self, rejected: Iterable[Span]) -> None:
        again = without(rejected, self._outstanding())
        if not again:
            return
        self._total_bytes += size_of(again)
        givers = {giver for span in again if (giver := self._giver(span)) is not None}
        self._given = [without(given, again) for given in self._given]
        for span in again:
            bisect.insort(self._queue, Queued(span))
        self._divide_again()
        for giver in givers:
            self._rejections[giver] += 1
            if self._rejections[giver] >= MAX_REJECTIONS:
                self.drop(giver)
        self._queue = [
            replace(queued, only=self._next_giver(queued.span, givers))
            if queued.span in again
            else queued
            for queued in self._queue
        ]

    def _giver(self, span: Span) -> int | None:
        """Who has given all of it, in this pull."""
        whole = (number for number, given in enumerate(self._given) if _is_in(span, given))
        return next(whole, None)

    def _next_giver(self, span: Span, blamed: set[int]) -> int | None:
        """Who is to give all of it next; None: whoever is free, since nobody else has all."""
        able = [
            number
            for number, share in enumerate(self._shares)
            if number not in blamed and _is_in(span, share)
        ]
        return min(able, key=self._rejections.__getitem__, default=None)

    def _outstanding(self) -> list[Span]:
        return [*(queued.span for queued in self._queue), *(request.span for request in self._open)]

    def _divide_again(self) -> None:
        self._shares = self._divide(self._outstanding())
        self._queue = [
            queued
            if queued.only is None or _is_in(queued.span, self._shares[queued.only])
            else replace(queued, only=None)
            for queued in self._queue
        ]

    def _divide(self, wanted: Sequence[Span]) -> list[tuple[Span, ...]]:
        """What each supplier may be asked for: what it holds and no better living one does."""
        living = {lane.supplier for lane in self._lanes if not lane.is_retired}
        shares: list[tuple[Span, ...]] = [()] * len(self._suppliers)
        alone = list(shares)
        taken: tuple[Span, ...] = ()
        for rank in sorted({supplier.rank for supplier in self._suppliers}):
            peers = [
                number
                for number, supplier in enumerate(self._suppliers)
                if supplier.rank == rank and number in living
            ]
            for number in peers:
                holds = self._suppliers[number].holds
                mine = joined(wanted) if holds is None else within(wanted, holds)
                shares[number] = without(mine, taken)
            near = [
                span
                for number in peers
                if not self._suppliers[number].is_far
                for span in shares[number]
            ]
            for number in peers:
                alone[number] = without(shares[number], near)
            taken = joined((*taken, *(span for number in peers for span in shares[number])))
        self._held, self._alone = taken, alone
        self._is_stuck = None  # not known yet
        return shares


def fitting_chunk_bytes(total_bytes: int, lanes: int) -> int:
    """How large requests should be."""
    fair = total_bytes // max(1, lanes * REQUESTS_PER_LANE)
    return min(max(fair, MIN_CHUNK_BYTES), MAX_CHUNK_BYTES)


def _is_in(span: Span, spans: Iterable[Span]) -> bool:
    return within((span,), spans) == (span,)


def _pause_s(failures: int) -> float:
    return min(FIRST_PAUSE_S * 2.0 ** (failures - 1), MAX_PAUSE_S)
