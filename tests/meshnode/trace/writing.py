"""Traces as the engine writes them, of runs that never were."""

from __future__ import annotations

from dataclasses import dataclass, field

START_NS = 1_790_000_000_000_000_000
MS = 1_000_000


@dataclass
class TraceText:
    """Lines of one file. Times in ms since `start_ns`."""

    role: str = "client"
    pid: int = 100
    start_ns: int = START_NS
    lines: list[str] = field(default_factory=list)

    def add(
        self,
        t_ms: float,
        event: str,
        command: str = "-",
        *,
        conn: int = 0,
        seq: int = 0,
        size_bytes: int = 0,
        dur_ms: float = 0,
    ) -> None:
        fields = (int(t_ms * MS), conn, event, command, seq, size_bytes, int(dur_ms * MS))
        self.lines.append("\t".join(map(str, fields)))

    @property
    def header(self) -> str:
        return f"mesh-rpc-trace\t1\t{self.role}\t{self.pid}\t{self.start_ns}"

    def encode(self) -> bytes:
        return "".join(f"{line}\n" for line in (self.header, *self.lines)).encode()


@dataclass
class Run:
    """A client and its workers, one connection each; a token goes to each in turn.

    `hop_ms`: one way; `compute_ms`: each worker's. Each token asks a worker for two messages, and
    waits for the second one's answer.
    """

    workers: int = 2
    hop_ms: float = 1.0
    compute_ms: float = 2.0
    client: TraceText = field(default_factory=TraceText)

    def __post_init__(self) -> None:
        self.servers = [TraceText("server", 200 + index) for index in range(self.workers)]
        self._seq = [0] * self.workers
        self.now_ms = 0.0

    def load(self) -> None:
        for conn, server in enumerate(self.servers):
            self.client.add(self.now_ms, "open", f"unix:/run/{conn}.sock", conn=conn)
            server.add(self.now_ms + 0.1, "open", "-")
            self.ask(conn, "FACTS", 1, 40)
            self.send(conn, "ALLOC", 9)
        self.now_ms += 0.1

    def send(self, conn: int, command: str, size_bytes: int) -> int:
        """A message that nobody waits for; its number."""
        seq = self._seq[conn]
        self._seq[conn] += 1
        common = {"conn": conn, "seq": seq, "size_bytes": size_bytes}
        self.client.add(self.now_ms, "send", command, **common)
        arrived_ms = self.now_ms + self.hop_ms
        self.servers[conn].add(arrived_ms, "serve", command, seq=seq, size_bytes=size_bytes)
        return seq

    def ask(self, conn: int, command: str, size_bytes: int, answer_bytes: int) -> None:
        seq = self._seq[conn]
        self._seq[conn] += 1
        began_ms, served_ms = self.now_ms, self.now_ms + self.hop_ms
        done_ms = served_ms + self.compute_ms
        self.now_ms = done_ms + self.hop_ms
        server = self.servers[conn]
        server.add(
            *(served_ms, "serve", command), seq=seq, size_bytes=size_bytes, dur_ms=self.compute_ms
        )
        server.add(done_ms, "reply", command, seq=seq, size_bytes=answer_bytes)
        client = self.client
        client.add(began_ms, "send", command, conn=conn, seq=seq, size_bytes=size_bytes)
        client.add(began_ms, "write", conn=conn, size_bytes=size_bytes, dur_ms=0.01)
        client.add(self.now_ms, "reply", command, conn=conn, seq=seq, size_bytes=answer_bytes)
        client.add(began_ms, "wait", command, conn=conn, seq=seq, dur_ms=self.now_ms - began_ms)

    def decode(self, batch: int = 1, own_ms: float = 1.0) -> None:
        """`own_ms`: what the client computes before it asks anybody."""
        began_ms = self.now_ms
        self.now_ms += own_ms
        for conn in range(self.workers):
            self.send(conn, "INPUT", 100)
            self.ask(conn, "GRAPH_AGAIN", 20, 4096)
        self.now_ms += 0.1  # after the last answer
        took_ms = self.now_ms - began_ms
        self.client.add(began_ms, "mark", "decode", size_bytes=batch, dur_ms=took_ms)
        self.now_ms += 0.1

    def encode(self) -> list[bytes]:
        return [text.encode() for text in (self.client, *self.servers)]


def typical_run() -> Run:
    """A load, a prompt of 16 tokens, then five tokens, the third of which is the median one."""
    run = Run()
    run.load()
    run.decode(batch=16, own_ms=40)
    for own_ms in (1, 5, 3, 4, 2):
        run.decode(own_ms=own_ms)
    return run
