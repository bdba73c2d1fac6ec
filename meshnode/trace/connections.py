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
COMPARED_COMMANDS = 16
TIMED_REQUESTS = 64
_REQUESTS = ("send", "serve")


@dataclass
class Connection:
    """What tells one connection from others. `file`: the index of its trace."""

    file: int
    number: int
    opened_ns: int
    endpoint: str = ""
    commands: list[str] = field(default_factory=list)
    times_ns: dict[tuple[str, int], int] = field(default_factory=dict)
    """Of the first requests, by what and number: `send`, `serve`, `served`, `reply`."""


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
        elif record.event in _REQUESTS and len(found.commands) < COMPARED_COMMANDS:
            found.commands.append(record.command)
        if record.seq < TIMED_REQUESTS:
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
    it, the way there and the way back then take the same time.
    """
    by_number = {client.number: client for client in clients}
    ways: dict[int, tuple[list[int], list[int]]] = {}
    for server in servers:
        if (number := pairs.get((server.file, server.number))) is not None:
            there, back = ways.setdefault(server.file, ([], []))
            there += _differences(by_number[number], "send", server, "serve")
            back += [-way for way in _differences(by_number[number], "reply", server, "served")]
    shifts = {file: _shift_ns(there, back) for file, (there, back) in ways.items()}
    return {file: shift_ns for file, shift_ns in shifts.items() if shift_ns}


def _differences(client: Connection, event: str, server: Connection, other: str) -> Iterator[int]:
    for (name, seq), at_ns in client.times_ns.items():
        if name == event and (its_ns := server.times_ns.get((other, seq))) is not None:
            yield its_ns - at_ns


def _shift_ns(there: Sequence[int], back: Sequence[int]) -> int:
    soonest_there, soonest_back = min(there, default=0), min(back, default=0)
    if soonest_there >= 0 and soonest_back >= 0:
        return 0
    return (soonest_back - soonest_there) // 2 if back else -soonest_there


def _agree(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether they are alike as far as both go; a trace may have been cut."""
    shared = min(len(one), len(other))
    return shared > 0 and list(one[:shared]) == list(other[:shared])
