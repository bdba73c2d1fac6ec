"""Which connection of a server is which of the client. Sans-IO.

Nothing in the files says so: each process numbers its own, and what is between them (a tunnel, a
delay line) gives the two ends other names. But both ends see the same commands in the same order,
and a client opens its connections one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from meshnode.trace.records import Record

MAX_CONNECTIONS = 256
TIMED_REQUESTS = 64
_REQUESTS = ("send", "serve")


@dataclass
class Connection:
    """What tells one connection from others. `file`: the index of its trace."""

    file: int
    number: int
    opened_ns: int
    endpoint: str = ""
    commands: dict[int, str] = field(default_factory=dict)
    """Of the first requests, by their number."""
    times_ns: dict[tuple[str, int], int] = field(default_factory=dict)
    """Of the first requests, by event and number; `served` is the end of `serve`."""


class ConnectionBook:
    """I note a file's connections as its records go by."""

    def __init__(self, file: int, start_ns: int) -> None:
        self._file = file
        self._start_ns = start_ns
        self.connections: dict[int, Connection] = {}

    def take(self, record: Record) -> None:
        if record.event == "mark":
            return  # the process's, not a connection's
        found = self.connections.get(record.conn)
        if found is None:
            if len(self.connections) >= MAX_CONNECTIONS:
                return
            found = Connection(self._file, record.conn, self._start_ns + record.t_ns)
            self.connections[record.conn] = found
        if record.event == "open":
            found.endpoint = "" if record.command == "-" else record.command
        if record.seq < TIMED_REQUESTS:
            if record.event in _REQUESTS:
                found.commands[record.seq] = record.command
            at_ns = self._start_ns + record.t_ns
            found.times_ns[record.event, record.seq] = at_ns
            if record.event == "serve":
                found.times_ns["served", record.seq] = at_ns + record.dur_ns


def pair(
    clients: Sequence[Connection], servers: Sequence[Connection]
) -> Mapping[tuple[int, int], int]:
    """The client's connection for (file, number) of a server's, for those that have one.

    Each takes the first one opened that begins with the same commands; where one of them goes to
    the very endpoint that the server names, it takes that.
    """
    free = sorted(clients, key=lambda one: (one.opened_ns, one.number))
    pairs: dict[tuple[int, int], int] = {}
    for server in sorted(servers, key=lambda one: (one.opened_ns, one.file, one.number)):
        alike = [client for client in free if _agree(client.commands, server.commands)]
        named = [client for client in alike if client.endpoint == server.endpoint != ""]
        if chosen := next(iter(named or alike), None):
            free.remove(chosen)
            pairs[server.file, server.number] = chosen.number
    return pairs


def clock_shifts(
    clients: Sequence[Connection],
    servers: Sequence[Connection],
    pairs: Mapping[tuple[int, int], int],
) -> dict[int, int]:
    """By how many ns each file's clock must go on for no message to arrive before it left; files
    whose clock does well are left out.

    CLOCK_REALTIME may have been set between two starts, and two machines differ anyway. As NTP has
    it, the way there and the way back then take the same time. An answer is only known to leave
    after its request was taken up: the process that sends it may be put aside right then, and note
    the end of its work when the client has long had the answer.
    """
    by_number = {client.number: client for client in clients}
    ways: dict[int, _Ways] = {}
    for server in servers:
        if (number := pairs.get((server.file, server.number))) is not None:
            client, its = by_number[number], ways.setdefault(server.file, _Ways())
            its.there += _differences(client, "send", server, "serve")
            its.since_served += [-way for way in _differences(client, "reply", server, "serve")]
            its.back += [-way for way in _differences(client, "reply", server, "served")]
    shifts = {file: its.shift_ns() for file, its in ways.items()}
    return {file: shift_ns for file, shift_ns in shifts.items() if shift_ns}


@dataclass
class _Ways:
    """How long messages of one file's server were on their way, if its clock did well, in ns."""

    there: list[int] = field(default_factory=list)
    since_served: list[int] = field(default_factory=list)
    back: list[int] = field(default_factory=list)

    def shift_ns(self) -> int:
        least, most = -min(self.there, default=0), min(self.since_served, default=0)
        if least <= 0 <= most:
            return 0
        if not self.back:
            return least
        return max(least, min(most, (min(self.back) + least) // 2))


def _differences(client: Connection, event: str, server: Connection, other: str) -> Iterator[int]:
    for (name, seq), at_ns in client.times_ns.items():
        if name == event and (its_ns := server.times_ns.get((other, seq))) is not None:
            yield its_ns - at_ns


def _agree(one: Mapping[int, str], other: Mapping[int, str]) -> bool:
    """Whether they are alike as far as both go: a trace may have been cut, and a server does not
    tell of the greeting that each connection begins with."""
    shared = one.keys() & other.keys()
    return bool(shared) and all(one[seq] == other[seq] for seq in shared)
