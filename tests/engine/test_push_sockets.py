"""Where an rpc-server is pushed to, and where its own pushes are fetched: a hostile neighbour gets
nothing out of them but its own connection's end, and the sandbox needs no new hole."""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import trio

from meshnode.config import SandboxMode
from meshnode.engine.cache import load_engine
from meshnode.engine.rpc_server import PushSockets, open_rpc_server
from meshnode.engine.sandbox.check import prepare_sandbox
from tests.conftest import require
from tests.engine.processes import Running, rpc_server
from tests.engine.rpc_client import RpcClient

pytestmark = pytest.mark.engine

PREFACE = b"meshpsh1"
EXACT = 0
QUEUE_BYTES = MOST_BYTES = 64 << 20
SLACK_BYTES = 48 << 20  # a record that arrives, socket buffers, what malloc keeps
RECORD_BYTES = 4 << 20
SOON_S = 10.0


@dataclass(frozen=True)
class Server:
    """An rpc-server that takes pushes at `inward` and gives its own at `outward`."""

    running: Running
    inward: Path
    outward: Path

    def push(self, data: bytes = b"") -> socket.socket:
        neighbour = socket.socket(socket.AF_UNIX)
        neighbour.settimeout(SOON_S)
        neighbour.connect(str(self.inward))
        neighbour.sendall(data)
        return neighbour

    def serves(self) -> bool:
        """Whether its client's requests are answered."""
        with RpcClient(self.running.address) as client:
            return client.device_memory()[1] > 0

    @property
    def resident_bytes(self) -> int:
        return int(psutil.Process(self.running.process.pid).memory_info().rss)


@pytest.fixture
def server(engine_bin: Path, folder: Path) -> Iterator[Server]:
    inward, outward = folder / "in.sock", folder / "out.sock"
    ends = ("--push-listen", f"unix:{inward}", "--push-to", f"unix:{outward}")
    with rpc_server(engine_bin, folder, *ends) as running:
        yield Server(running, inward, outward)


def record(number: int, size: int) -> bytes:
    return struct.pack("<QIQ", number, EXACT, size)


def is_ended(neighbour: socket.socket) -> bool:
    """Whether the server has closed the connection; waits for it."""
    try:
        return neighbour.recv(1) == b""
    except ConnectionResetError:
        return True


def push_until_full(neighbour: socket.socket) -> int:
    """Whole records, until none is read any more; the bytes in them."""
    neighbour.settimeout(1.0)
    for number in range(1000):
        try:
            neighbour.sendall(record(number, RECORD_BYTES) + bytes(RECORD_BYTES))
        except TimeoutError:
            return number * RECORD_BYTES
    raise AssertionError("there is no end to it")


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="another protocol"),
        pytest.param(b"meshpsh2", id="another preface"),
        pytest.param(PREFACE + record(1, MOST_BYTES + 1), id="a byte more than a push has"),
        pytest.param(PREFACE + record(1, 2**63), id="a size that no push has"),
        pytest.param(PREFACE + record(1, 2**64 - 1), id="a size that overflows"),
    ],
)
def test_garbage_ends_its_own_connection_alone(server: Server, data: bytes) -> None:
    with RpcClient(server.running.address) as client:
        with server.push(data) as neighbour:
            assert is_ended(neighbour)
        assert client.device_memory()[1] > 0, "the client is served on"
    with server.push(PREFACE + record(1, 4) + bytes(4)) as honest:
        honest.settimeout(0.2)
        with pytest.raises(TimeoutError):
            honest.recv(1)
    assert server.running.alive


def test_whoever_stops_or_leaves_in_the_middle_makes_room(server: Server) -> None:
    for cut in (0, 3, len(PREFACE), len(PREFACE) + 5, len(PREFACE) + 20 + 7):
        with server.push((PREFACE + record(1, 100) + bytes(100))[:cut]):
            assert server.serves()
        with server.push(b"the next one is heard") as neighbour:
            assert is_ended(neighbour)


def test_the_second_waits_until_the_first_has_left(server: Server) -> None:
    with server.push(PREFACE) as first, server.push(b"no preface") as second:
        second.settimeout(0.2)
        with pytest.raises(TimeoutError):
            second.recv(1)
        assert server.serves()
        first.close()
        second.settimeout(SOON_S)
        assert is_ended(second)


def test_a_hundred_connections_cost_the_client_nothing(server: Server) -> None:
    with ExitStack() as stack:
        for _ in range(100):
            neighbour = stack.enter_context(socket.socket(socket.AF_UNIX))
            neighbour.setblocking(False)
            with suppress(BlockingIOError):
                neighbour.connect(str(server.inward))
        assert server.serves()
    assert server.serves()


def test_what_is_announced_costs_no_memory(server: Server) -> None:
    before = server.resident_bytes
    # More follows than the socket holds: when all of it is sent, the announcement has been read.
    with server.push(PREFACE + record(1, MOST_BYTES) + bytes(RECORD_BYTES)):
        assert server.resident_bytes - before < MOST_BYTES / 2


def test_pushes_that_nobody_takes_are_kept_up_to_a_bound(server: Server) -> None:
    before = server.resident_bytes
    with server.push(PREFACE) as neighbour:
        sent = push_until_full(neighbour)
        assert QUEUE_BYTES / 2 <= sent <= QUEUE_BYTES + SLACK_BYTES
        assert server.serves()
        assert server.resident_bytes - before < QUEUE_BYTES + SLACK_BYTES


def test_who_fetches_and_talks_is_not_heard(server: Server) -> None:
    with socket.socket(socket.AF_UNIX) as carrier:
        carrier.settimeout(SOON_S)
        carrier.connect(str(server.outward))
        carrier.settimeout(0.2)
        with pytest.raises(TimeoutError):
            carrier.sendall(bytes(8 << 20))
        assert server.serves()
        assert carrier.recv(64) == PREFACE


def test_who_comes_to_fetch_and_leaves_at_once_ends_nothing(server: Server) -> None:
    for _ in range(5):  # the first greeting may go out before the connection is closed
        with socket.socket(socket.AF_UNIX) as carrier:
            carrier.setblocking(False)
            with suppress(BlockingIOError):
                carrier.connect(str(server.outward))
    assert server.serves()
    assert server.running.alive


@pytest.mark.skipif(sys.platform != "linux", reason="landlock and seccomp: Linux")
async def test_in_the_sandbox_both_ends_are_there(engine_bin: Path, folder: Path) -> None:
    sandbox = prepare_sandbox(SandboxMode.AUTO)
    require("sandbox", sandbox.is_full, sandbox.missing)
    own = folder / "own"
    own.mkdir()
    sockets = PushSockets(own / "in.sock", own / "out.sock")
    async with open_rpc_server(
        load_engine(engine_bin),
        own / "rpc.sock",
        manifest=None,
        memory_limit_bytes=1 << 20,
        threads=1,
        pushes=sockets,
        log=folder / "log",
        sandbox=sandbox,
    ):
        assert sorted(path.name for path in own.iterdir()) == ["in.sock", "out.sock", "rpc.sock"]
        assert all(path.stat().st_mode & 0o777 == 0o600 for path in own.iterdir())
        with trio.fail_after(SOON_S):
            async with await trio.open_unix_socket(str(sockets.outward)) as carrier:
                assert await carrier.receive_some(64) == PREFACE
            async with await trio.open_unix_socket(str(sockets.inward)) as neighbour:
                await neighbour.send_all(b"no preface")
                with suppress(trio.BrokenResourceError):
                    assert await neighbour.receive_some(64) == b""
