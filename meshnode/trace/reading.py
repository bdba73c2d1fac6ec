"""Two readings of each file: the first counts, the second keeps what is to be drawn. Sans-IO.

So a file of any size is read in bounded memory, and what is drawn can be chosen by what was found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from meshnode.errors import UsageError
from meshnode.trace.connections import Connection, ConnectionBook, clock_shifts, pair
from meshnode.trace.records import Header, Record, Role, TraceReader
from meshnode.trace.scene import Clipping, Stretch
from meshnode.trace.spans import Decode, Spans
from meshnode.trace.wording import ms_text


class FirstReading:
    """I count what is in one file. Where several runs wrote to it, the last one is kept."""

    def __init__(self, file: int) -> None:
        self.file = file
        self.reader = TraceReader()
        self.begin(Header(Role.CLIENT, 0, 0))

    def begin(self, header: Header) -> None:
        """A run begins."""
        self.header = header
        self.book = ConnectionBook(self.file, header.start_ns)
        self.spans = Spans()
        self.records = 0
        self.last_ns = 0

    def receive(self, data: bytes) -> None:
        """Raises `NotATrace`."""
        for item in self.reader.receive(data):
            if isinstance(item, Header):
                self.begin(item)
            else:
                self._take(item)

    def finish(self) -> None:
        """Raises `NotATrace`."""
        self.reader.finish()
        self.spans.finish()

    def _take(self, record: Record) -> None:
        self.records += 1
        self.last_ns = max(self.last_ns, record.end_ns)
        self.book.take(record)
        if self.header.role is Role.CLIENT:
            self.spans.take(record)

    @property
    def name(self) -> str:
        return f"{self.header.role.value} {self.header.pid}"


@dataclass(frozen=True)
class Choice:
    """What is drawn: a decode, or the load; all of it where there is no client.

    `pairs`: which of the client's connections a server's (file, number) is. `shifted_ns`, by file:
    how far its clock is moved.
    """

    name: str
    title: str
    stretch: Stretch
    decode: Decode | None = None
    pairs: Mapping[tuple[int, int], int] = field(default_factory=dict)
    shifted_ns: Mapping[int, int] = field(default_factory=dict)


class SecondReading:
    """I keep what falls into the stretch, of the run that the first reading kept."""

    def __init__(self, first: FirstReading, choice: Choice) -> None:
        start_ns = first.header.start_ns + choice.shifted_ns.get(first.file, 0)
        self.clipping = Clipping(first.file, first.header.role, start_ns, choice.stretch)
        self._reader = TraceReader()
        self._run = first.reader.runs

    def receive(self, data: bytes) -> None:
        for item in self._reader.receive(data):
            if self._reader.runs == self._run and isinstance(item, Record):
                self.clipping.take(item)


def client_of(readings: Sequence[FirstReading]) -> FirstReading | None:
    """Raises `UsageError` when there are several."""
    clients = [reading for reading in readings if reading.header.role is Role.CLIENT]
    if len(clients) > 1:
        raise UsageError(
            f"{len(clients)} of these are traces of clients: give one, and those of its servers"
        )
    return clients[0] if clients else None


def choose(readings: Sequence[FirstReading], *, token: int | None, load: bool) -> Choice:
    """`token` counts decodes from 1; without it, the one of median length. Raises `UsageError`."""
    chosen = _choose_stretch(readings, token, load)
    ends: dict[Role, list[Connection]] = {Role.CLIENT: [], Role.SERVER: []}
    for reading in readings:
        ends[reading.header.role] += reading.book.connections.values()
    clients, servers = ends[Role.CLIENT], ends[Role.SERVER]
    pairs = pair(clients, servers)
    return replace(chosen, pairs=pairs, shifted_ns=clock_shifts(clients, servers, pairs))


def _choose_stretch(readings: Sequence[FirstReading], token: int | None, load: bool) -> Choice:
    client = client_of(readings)
    if client is None:
        return _all_of(readings, token)
    spans, start_ns = client.spans, client.header.start_ns
    decode = spans.median_decode() if token is None else spans.decode(token)
    if token is not None and decode is None:
        raise UsageError(
            f"there is no decode {token} in this trace: it has {spans.decodes:,}"
            + ("" if spans.decodes else ", only a load (--load)")
        )
    if load or decode is None:
        return _load_of(client)
    begin_ns = start_ns + decode.t_ns
    return Choice(
        f"decode {decode.number}",
        f"decode {decode.number:,} of {spans.decodes:,} ({_tokens(decode.batch)}): "
        f"{ms_text(decode.dur_ns)}",
        Stretch(begin_ns, begin_ns + decode.dur_ns),
        decode,
    )


def _load_of(client: FirstReading) -> Choice:
    first = client.spans.decode(1)
    length_ns = first.t_ns if first else client.last_ns
    until = "to the first decode" if first else "to the end of the trace: it has no decode"
    start_ns = client.header.start_ns
    title = f"load, from the start {until}: {ms_text(length_ns)}"
    return Choice("load", title, Stretch(start_ns, start_ns + length_ns))


def _all_of(readings: Sequence[FirstReading], token: int | None) -> Choice:
    if token is not None:
        raise UsageError(
            "only a client's trace says where a token begins: give llama-server's trace too"
        )
    begin_ns = min(reading.header.start_ns for reading in readings)
    end_ns = max(reading.header.start_ns + reading.last_ns for reading in readings)
    title = f"all there is, without a client's trace: {ms_text(end_ns - begin_ns)}"
    return Choice("all", title, Stretch(begin_ns, end_ns))


def _tokens(count: int) -> str:
    return f"{count:,} token" + ("s" if count != 1 else "")
