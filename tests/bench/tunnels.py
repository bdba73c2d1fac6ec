"""`./just bench tunnels`: what a local connection carried by mesh costs, beside `ssh -L` and none.

A program connects to a local port; what it sends comes out at another program behind two nodes (or
behind ssh and sshd), each a process of its own. Every subject is measured in every round, so that
whatever else the machine does meets them all; of the rounds the median counts.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import click
import trio

from meshnode.cli.engine import build_showing_progress
from meshnode.engine.build import BuildOptions
from tests.bench.first_light import STOCK, Bench, bench_model, run_bench
from tests.bench.idle import idle_rows
from tests.bench.processes import LOOPBACK, MESSAGE, READY_TIMEOUT_S, process, said, verdict
from tests.bench.quic_speed import quic_rows
from tests.bench.webrtc_speed import compare, report
from tunnels import (
    Candidate,
    Endpoint,
    Identity,
    PeerId,
    Stream,
    connect_and_splice,
    listen_and_forward,
)

CHUNK = bytes(1 << 20)
WARM_UP = 100
IDLE_S = 60.0
P99_ALLOWED_S = 0.4e-3  # beside three times raw TCP's median

Port = int


# --- the program at the far end ------------------------------------------------------------


def answer_for_ever(pipe: Connection) -> None:
    """Echoes after an `e`; after an `s` swallows, and tells how much once the sender has ended."""
    server = socket.create_server((LOOPBACK, 0))
    pipe.send(server.getsockname()[1])
    while True:
        connection, _ = server.accept()
        threading.Thread(target=_answer, args=(connection,), daemon=True).start()


def _answer(connection: socket.socket) -> None:
    room = bytearray(1 << 20)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with connection:
        is_echo, total = connection.recv(1) == b"e", 0
        while size := connection.recv_into(room):
            total += size
            if is_echo:
                connection.sendall(memoryview(room)[:size])
        if not is_echo:
            connection.sendall(total.to_bytes(8, "big"))


# --- the nodes -----------------------------------------------------------------------------


def far_node(pipe: Connection, kind: str, target: Port) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            node = Endpoint(Identity.generate(), authorize=lambda *_: True, transports=(kind,))
            node.serve("target", partial(connect_and_splice, target=(LOOPBACK, target)))
            port = await nursery.start(node.run, LOOPBACK, 0)
            pipe.send((node.peer.key, port))

    trio.run(main)


def near_node(pipe: Connection, kind: str, key: bytes, port: Port) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            node = Endpoint(Identity.generate(), authorize=lambda *_: True, transports=(kind,))
            await nursery.start(node.run, LOOPBACK, 0)
            session = await node.connect(PeerId(key), [Candidate(kind, LOOPBACK, port)])

            async def open_stream() -> Stream:
                return await session.open("target")

            _, local = await nursery.start(listen_and_forward, (LOOPBACK, 0), open_stream)
            pipe.send(local)

    trio.run(main)


@contextmanager
def mesh_tunnel(kind: str, target: Port) -> Iterator[Port]:
    with ExitStack() as stack:
        far = stack.enter_context(process(far_node, kind, target))
        near = stack.enter_context(process(near_node, kind, *said(far)))
        yield said(near)


# --- ssh -----------------------------------------------------------------------------------


@contextmanager
def ssh_tunnel(target: Port) -> Iterator[Port]:
    """An sshd of our own: its keys, its configuration and its port last as long as this does."""
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    assert sshd is not None
    with tempfile.TemporaryDirectory(prefix="mesh-bench-ssh-") as name, ExitStack() as stack:
        folder = Path(name)
        for key in ("host", "user"):
            command = ["ssh-keygen", "-q", "-N", "", "-t", "ed25519", "-f", str(folder / key)]
            subprocess.run(command, check=True)
        shutil.copy(folder / "user.pub", folder / "authorized")
        port, local = _free_port(), _free_port()
        (folder / "config").write_text(
            f"Port {port}\nListenAddress {LOOPBACK}\nHostKey {folder}/host\nStrictModes no\n"
            f"AuthorizedKeysFile {folder}/authorized\nPidFile {folder}/pid\nUsePAM no\n"
            "PermitRootLogin yes\n"
        )
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        serve = [sshd, "-D", "-q", "-f", f"{folder}/config"]
        stack.enter_context(_running(serve))
        _await_port(port)
        options = ["StrictHostKeyChecking=no", f"UserKnownHostsFile={folder}/known"]
        forward = [
            *("ssh", "-N", "-q", "-F", "none", "-i", f"{folder}/user", "-p", str(port)),
            *(word for option in options for word in ("-o", option)),
            *("-L", f"{LOOPBACK}:{local}:{LOOPBACK}:{target}", f"{getpass.getuser()}@{LOOPBACK}"),
        ]
        stack.enter_context(_running(forward))
        _await_port(local)
        yield local


@contextmanager
def _running(command: list[str]) -> Iterator[None]:
    child = subprocess.Popen(command)
    try:
        yield
    finally:
        child.kill()
        child.wait()


def _free_port() -> Port:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def _await_port(port: Port) -> None:
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline_s:
        try:
            socket.create_connection((LOOPBACK, port)).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise click.ClickException("ssh or sshd did not start: run them by hand to see why")


# --- measuring -----------------------------------------------------------------------------


@dataclass
class Subject:
    """One way to the program at the far end, and what each round of it gave."""

    name: str
    port: Port
    bulk_bytes: int
    p50s: list[float] = field(default_factory=list)
    p99s: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)  # bytes a second

    @property
    def p50_s(self) -> float:
        return statistics.median(self.p50s)

    @property
    def p99_s(self) -> float:
        return statistics.median(self.p99s)

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    def measure(self, trips: int) -> None:
        cuts = statistics.quantiles(self._trips(trips)[WARM_UP:], n=100)
        self.p50s.append(cuts[49])
        self.p99s.append(cuts[98])
        self.rates.append(self._bulk())

    def _trips(self, count: int) -> list[float]:
        room, took_s = bytearray(len(MESSAGE)), []
        with socket.create_connection((LOOPBACK, self.port)) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(b"e")
            for _ in range(WARM_UP + count):
                began_s = time.perf_counter()
                connection.sendall(MESSAGE)
                left = len(MESSAGE)
                while left:
                    size = connection.recv_into(room)
                    if not size:
                        raise click.ClickException(f"{self.name} broke off")
                    left -= size
                took_s.append(time.perf_counter() - began_s)
        return took_s

    def _bulk(self) -> float:
        with socket.create_connection((LOOPBACK, self.port)) as connection:
            connection.sendall(b"s")
            began_s = time.perf_counter()
            for _ in range(self.bulk_bytes // len(CHUNK)):
                connection.sendall(CHUNK)
            connection.shutdown(socket.SHUT_WR)
            if int.from_bytes(connection.recv(8), "big") != self.bulk_bytes:
                raise click.ClickException(f"{self.name} lost bytes")
            return self.bulk_bytes / (time.perf_counter() - began_s)


def table(subjects: list[Subject], raw: Subject) -> str:
    rows = ["| | p50 | p99 | throughput | of raw TCP |", "|---|---|---|---|---|"]
    for one in subjects:
        times = f"{one.p50_s * 1e3:.3f} ms | {one.p99_s * 1e3:.3f} ms"
        rows.append(
            f"| {one.name} | {times} | {one.rate / 1e6:.0f} MB/s | {one.rate / raw.rate:.2f} |"
        )
    return "\n".join(rows)


def verdicts(tcp: Subject, raw: Subject, ssh: Subject | None) -> list[str]:
    allowed_s = 3 * raw.p50_s + P99_ALLOWED_S
    lines = [verdict("tcp p99 of 3 x raw p50 + 0.4 ms", tcp.p99_s / allowed_s, at_most=1.0)]
    if ssh is not None:
        lines.append(verdict("tcp p50 of ssh -L's", tcp.p50_s / ssh.p50_s, at_most=1.0))
        lines.append(verdict("tcp throughput of ssh -L's", tcp.rate / ssh.rate, at_least=1.0))
    return lines


TOKENS_OF_STOCK = {"tcp": 0.95, "quic": 0.88, "webrtc": 0.75}  # to reach
SMALL_VOCABULARY = 4096


def token_verdicts(rounds: int, tokens: int) -> list[str]:
    """A model over each kind of link, against stock RPC on raw TCP. With few logits a token: what
    the link costs shows, not what llama.cpp sends over it."""
    engine = build_showing_progress(BuildOptions())
    stock = build_showing_progress(BuildOptions(stock=True))
    with tempfile.TemporaryDirectory(prefix="mesh-bench-") as name:
        folder = Path(name)
        model = bench_model(folder, SMALL_VOCABULARY)
        bench = Bench(model, engine, stock, folder, tokens, rounds)
        cases = {case.name: case for case in trio.run(run_bench, bench, click.echo)}
    speeds = {name: case.median(lambda one: one.tokens_per_s) for name, case in cases.items()}
    return [
        verdict(
            f"{kind} tok/s of stock RPC's", speeds[f"mesh, {kind}"] / speeds[STOCK], at_least=goal
        )
        for kind, goal in TOKENS_OF_STOCK.items()
    ]


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=5)
@click.option("--trips", type=click.IntRange(100), default=2000, help="A round, of 10 KB each.")
@click.option("--megabytes", type=click.IntRange(1), default=512, help="A round, in bulk.")
@click.option("--tokens", type=click.IntRange(0), default=64, help="A round; 0: no model is run.")
def tunnels(rounds: int, trips: int, megabytes: int, tokens: int) -> None:
    """10 KB there and back, bulk, and tokens: raw TCP, ssh -L, each kind of link; bare aiortc,
    aioquic's own driver, an idle node."""
    _connections(rounds, trips, megabytes)
    click.echo("\n" + "\n".join(quic_rows(rounds, max(trips // 2, 100), max(megabytes // 8, 1))))
    click.echo("\n" + report(*compare(rounds, trips // 4, (megabytes << 20) // 16)))
    if tokens:
        click.echo("\n" + "\n".join(token_verdicts(rounds, tokens)))
        click.echo("\n" + "\n".join(idle_rows(IDLE_S)))


def _connections(rounds: int, trips: int, megabytes: int) -> None:
    bulk_bytes = megabytes << 20
    with ExitStack() as stack:
        target = said(stack.enter_context(process(answer_for_ever)))
        raw = Subject("raw TCP", target, bulk_bytes)
        subjects, ssh = [raw], None
        if shutil.which("ssh") and shutil.which("sshd", path="/usr/sbin:/usr/bin"):
            ssh = Subject("ssh -L", stack.enter_context(ssh_tunnel(target)), bulk_bytes)
            subjects.append(ssh)
        else:
            click.echo("ssh -L: not measured, openssh-server is not installed")
        tcp = Subject("mesh, tcp", stack.enter_context(mesh_tunnel("tcp", target)), bulk_bytes)
        quic = stack.enter_context(mesh_tunnel("quic", target))
        subjects += [tcp, Subject("mesh, quic", quic, bulk_bytes // 8)]
        for number in range(rounds):
            click.echo(f"round {number + 1} of {rounds}")
            for subject in subjects:
                subject.measure(trips)
        click.echo("\n" + table(subjects, raw) + "\n\n" + "\n".join(verdicts(tcp, raw, ssh)))


if __name__ == "__main__":
    tunnels()
