"""What a client's trace amounts to: for the load, and for each decode. Sans-IO.

The load goes from the start to the begin of the first decode. A decode's share goes from its begin
to that of the next one, so that nothing is left out.
"""

from __future__ import annotations

from array import array
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from statistics import median_low

from meshnode.trace.records import Record

MAX_PENDING = 200_000
"""Events held back until it is known which decode they belong to."""
MAX_DECODES = 1_000_000
MAX_COMMANDS = 500
MAX_BATCHES = 200
MAX_DEPTHS = 10_000
OTHER = "(others)"


class Depth:
    """I count the round trips that came one after another.

    A request lies one deeper than the deepest answer that the client had when it sent it. So what
    was asked of several workers at once is one round trip, though each answer is waited for.
    """

    def __init__(self) -> None:
        self.reached = 0
        self._sent: dict[int, deque[tuple[int, int]]] = {}
        """By connection: from which request on its requests lie how deep."""

    def send(self, conn: int, seq: int) -> None:
        points = self._sent.setdefault(conn, deque(maxlen=MAX_DEPTHS))
        if not points or points[-1][1] != self.reached + 1:
            points.append((seq, self.reached + 1))

    def reply(self, conn: int, seq: int) -> None:
        points = self._sent.get(conn, deque())
        while len(points) > 1 and points[1][0] <= seq:
            points.popleft()
        self.reached = max(self.reached, points[0][1] if points else 1)


@dataclass
class Tally:
    """What crossed the wire, as the client saw it. Counters are by command."""

    messages: int = 0
    writes: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    wait_ns: int = 0
    sends: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    depth: Depth = field(default_factory=Depth)

    def add(self, record: Record) -> None:
        match record.event:
            case "send":
                self.messages += 1
                self.bytes_up += record.size_bytes
                count(self.sends, record.command)
                self.depth.send(record.conn, record.seq)
            case "reply":
                self.bytes_down += record.size_bytes
                self.depth.reply(record.conn, record.seq)
            case "write":
                self.writes += 1
            case "wait":
                self.wait_ns += record.dur_ns
                count(self.waits, record.command)

    @property
    def round_trips(self) -> int:
        return self.waits.total()


def count(counter: Counter[str], key: str) -> None:
    """A hostile file has no end of names."""
    counter[key if key in counter or len(counter) < MAX_COMMANDS else OTHER] += 1


def is_decode(record: Record) -> bool:
    return record.event == "mark" and record.command == "decode"


@dataclass(frozen=True)
class Decode:
    """One call of llama_decode. `number` counts from 1; `batch`: tokens in it."""

    number: int
    batch: int
    t_ns: int
    dur_ns: int


@dataclass(frozen=True)
class Typical:
    """Medians over `decodes` decodes of `batch` tokens each; counters are by command."""

    batch: int
    decodes: int
    dur_ns: int
    messages: int
    writes: int
    bytes_up: int
    bytes_down: int
    wait_ns: int
    round_trips: int
    rounds: int
    sends: dict[str, int]
    waits: dict[str, int]


class _Batches:
    """All decodes of one size: their figures in columns, since there may be a million."""

    def __init__(self) -> None:
        self.numbers = array("q")
        self.begins = array("q")
        self.columns = [array("q") for _ in range(8)]
        self.sends: dict[str, Counter[int]] = {}
        self.waits: dict[str, Counter[int]] = {}

    def add(self, number: int, mark: Record, tally: Tally) -> None:
        self.numbers.append(number)
        self.begins.append(mark.t_ns)
        figures = (
            *(mark.dur_ns, tally.messages, tally.writes, tally.bytes_up, tally.bytes_down),
            *(tally.wait_ns, tally.round_trips, tally.depth.reached),
        )
        for column, figure in zip(self.columns, figures, strict=True):
            column.append(min(figure, 2**62))
        for kept, counter in ((self.sends, tally.sends), (self.waits, tally.waits)):
            for command, times in counter.items():
                if command in kept or len(kept) < MAX_COMMANDS:
                    kept.setdefault(command, Counter())[times] += 1

    def typical(self, batch: int) -> Typical:
        decodes = len(self.numbers)
        dur_ns, messages, writes, up, down, wait_ns, trips, rounds = map(median_low, self.columns)
        sends = {command: _median(times, decodes) for command, times in self.sends.items()}
        waits = {command: _median(times, decodes) for command, times in self.waits.items()}
        return Typical(
            *(batch, decodes, dur_ns, messages, writes, up, down, wait_ns, trips, rounds),
            sends=sends,
            waits=waits,
        )

    def decode(self, batch: int, at: int) -> Decode:
        return Decode(self.numbers[at], batch, self.begins[at], self.columns[0][at])

    def median_decode(self, batch: int) -> Decode:
        durations = self.columns[0]
        at = durations.index(median_low(durations))
        return self.decode(batch, at)


def _median(times: Counter[int], total: int) -> int:
    """The lower median of `total` counts, of which those not in `times` are 0."""
    after = (total - 1) // 2 - (total - times.total())  # of those that are not 0
    if after < 0:
        return 0
    return next(islice(Counter(dict(sorted(times.items()))).elements(), after, None))


class Spans:
    """I tell the records of one run apart, and count them. Bounded memory for any input."""

    def __init__(self) -> None:
        self.load = Tally()
        self.decodes = 0
        self._tally = self.load
        self._mark: Record | None = None
        self._begin_ns = 0
        self._pending: list[Record] = []
        self._batches: dict[int, _Batches] = {}

    def take(self, record: Record) -> None:
        if is_decode(record):
            self._open(record)
            return
        self._pending.append(record)
        if len(self._pending) > MAX_PENDING:
            half = MAX_PENDING // 2
            self._count(self._pending[:half])
            self._pending = self._pending[half:]

    def finish(self) -> None:
        self._count(self._pending)
        self._pending = []
        self._close()

    def _open(self, mark: Record) -> None:
        """Its line comes at its end: of what is pending, some is from before its begin."""
        self._begin_ns = max(self._begin_ns, mark.t_ns)
        self._count(record for record in self._pending if record.t_ns < self._begin_ns)
        self._pending = [record for record in self._pending if record.t_ns >= self._begin_ns]
        self._close()
        self.decodes += 1
        self._tally, self._mark = Tally(), mark

    def _count(self, records: Iterable[Record]) -> None:
        for record in records:
            self._tally.add(record)

    def _close(self) -> None:
        if self._mark is None or self.decodes > MAX_DECODES:
            return
        batch = self._mark.size_bytes
        if batch not in self._batches and len(self._batches) >= MAX_BATCHES:
            return
        self._batches.setdefault(batch, _Batches()).add(self.decodes, self._mark, self._tally)
        self._mark = None

    def typical(self) -> Typical | None:
        """Of the decodes of the size that most have; the smaller where two are as frequent."""
        batch = self._usual_batch()
        return None if batch is None else self._batches[batch].typical(batch)

    def median_decode(self) -> Decode | None:
        """The one of that size whose duration is the (lower) median."""
        batch = self._usual_batch()
        return None if batch is None else self._batches[batch].median_decode(batch)

    def decode(self, number: int) -> Decode | None:
        for batch, kept in self._batches.items():
            if number in kept.numbers:
                return kept.decode(batch, kept.numbers.index(number))
        return None

    def _usual_batch(self) -> int | None:
        sizes = self._batches.items()
        return min(sizes, key=lambda size: (-len(size[1].numbers), size[0]))[0] if sizes else None
