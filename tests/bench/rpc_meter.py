"""What a client and its RPC servers say to each other: by command, and how deep.

Framing (upstream's ggml-rpc.cpp): a request is `command u8 | size u64 | payload`, a reply
`size u64 | payload`; replies come in the order of their requests. Only what can be seen from
outside is used, so that any engine is counted in the same way.

Depth: a request lies one deeper than the deepest reply that its client had been given, on any
connection, before it sent that request. The deepest answered request is the number of round
trips that nobody could have saved by sending earlier what was known already.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

SIZE_BYTES = 8


@dataclass(frozen=True)
class Command:
    name: str
    replies: bool


_UPSTREAM = (
    Command("ALLOC_BUFFER", replies=True),
    Command("GET_ALIGNMENT", replies=True),
    Command("GET_MAX_SIZE", replies=True),
    Command("BUFFER_GET_BASE", replies=True),
    Command("FREE_BUFFER", replies=False),
    Command("BUFFER_CLEAR", replies=False),
    Command("SET_TENSOR", replies=False),
    Command("SET_TENSOR_HASH", replies=True),
    Command("GET_TENSOR", replies=True),
    Command("COPY_TENSOR", replies=True),
    Command("GRAPH_COMPUTE", replies=False),
    Command("GET_DEVICE_MEMORY", replies=True),
    Command("INIT_TENSOR", replies=False),
    Command("GET_ALLOC_SIZE", replies=True),
    Command("HELLO", replies=True),
    Command("DEVICE_COUNT", replies=True),
    Command("GRAPH_RECOMPUTE", replies=False),
    Command("MEMSET_TENSOR", replies=False),
)

# Ours, from patches/llama.cpp/README.md. A new command is a new line here.
_MESH = {
    128: Command("MESH_HELLO", replies=True),
    129: Command("GGUF_INDEX", replies=True),
    130: Command("SET_TENSOR_GGUF", replies=False),
    131: Command("LOAD_COMMIT", replies=True),
    132: Command("LOAD_STATUS", replies=True),
    133: Command("ALLOC", replies=False),
    134: Command("CONFIRM", replies=True),
    135: Command("TENSOR", replies=False),
    136: Command("INPUT", replies=False),
    137: Command("GET", replies=True),
    138: Command("GRAPH", replies=False),
    139: Command("GRAPH_AGAIN", replies=False),
    140: Command("PUSH", replies=False),
    141: Command("TAKE", replies=False),
}

COMMANDS: Mapping[int, Command] = dict(enumerate(_UPSTREAM)) | _MESH


@dataclass(frozen=True)
class Tally:
    requests: float = 0
    replies: float = 0
    up_bytes: float = 0
    down_bytes: float = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.requests + other.requests,
            self.replies + other.replies,
            self.up_bytes + other.up_bytes,
            self.down_bytes + other.down_bytes,
        )

    def scaled(self, factor: float) -> Tally:
        return Tally(
            self.requests * factor,
            self.replies * factor,
            self.up_bytes * factor,
            self.down_bytes * factor,
        )


@dataclass(frozen=True)
class Counts:
    """`rounds`: the depth reached; `pushed_bytes`: from server to server, past the client."""

    commands: Mapping[str, Tally] = field(default_factory=dict)
    rounds: float = 0
    pushed_bytes: float = 0

    @property
    def total(self) -> Tally:
        return sum(self.commands.values(), Tally())

    def since(self, earlier: Counts) -> Counts:
        changed = {
            name: tally + earlier.commands.get(name, Tally()).scaled(-1)
            for name, tally in self.commands.items()
        }
        return Counts(
            {name: tally for name, tally in changed.items() if tally != Tally()},
            self.rounds - earlier.rounds,
            self.pushed_bytes - earlier.pushed_bytes,
        )

    def per(self, count: float) -> Counts:
        return Counts(
            {name: tally.scaled(1 / count) for name, tally in self.commands.items()},
            self.rounds / count,
            self.pushed_bytes / count,
        )


class Meter:
    """I count for one client, over all its connections."""

    def __init__(self) -> None:
        self.reached = 0
        self.pushed_bytes = 0
        self._tallies: dict[str, Tally] = {}

    def add(self, name: str, tally: Tally) -> None:
        self._tallies[name] = self._tallies.get(name, Tally()) + tally

    def counts(self) -> Counts:
        return Counts(dict(self._tallies), self.reached, self.pushed_bytes)


class Conversation:
    """I read along one connection: `sent` as the client let go of it, `given` as it got it."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._requests = _Frames(1 + SIZE_BYTES)
        self._replies = _Frames(SIZE_BYTES)
        self._pending: deque[tuple[str, int]] = deque()

    def sent(self, data: bytes) -> None:
        for header, size in self._requests.receive(data):
            number = header[0]
            command = COMMANDS.get(number, Command(f"command {number}", replies=False))
            self._meter.add(command.name, Tally(requests=1, up_bytes=len(header) + size))
            if command.replies:
                self._pending.append((command.name, self._meter.reached + 1))

    def given(self, data: bytes) -> None:
        for header, size in self._replies.receive(data, whole=True):
            name, depth = self._pending.popleft() if self._pending else ("(not asked for)", 0)
            self._meter.add(name, Tally(replies=1, down_bytes=len(header) + size))
            self._meter.reached = max(self._meter.reached, depth)


class _Frames:
    """I cut a stream at its frames; payloads are stepped over, not kept."""

    def __init__(self, header_bytes: int) -> None:
        self._header_bytes = header_bytes
        self._header = b""
        self._left = 0

    def receive(self, data: bytes, *, whole: bool = False) -> list[tuple[bytes, int]]:
        """(header, size of the payload) of each frame that began here; `whole`: that ended."""
        found: list[tuple[bytes, int]] = []
        position, end = 0, len(data)
        while position < end:
            if len(self._header) < self._header_bytes:
                wanted = self._header_bytes - len(self._header)
                self._header += data[position : position + wanted]
                position = min(end, position + wanted)
                if len(self._header) < self._header_bytes:
                    break
                self._left = int.from_bytes(self._header[-SIZE_BYTES:], "little")
                if not whole:
                    found.append((self._header, self._left))
            step = min(self._left, end - position)
            self._left -= step
            position += step
            if self._left:
                break
            if whole:
                size = int.from_bytes(self._header[-SIZE_BYTES:], "little")
                found.append((self._header, size))
            self._header = b""
        return found
