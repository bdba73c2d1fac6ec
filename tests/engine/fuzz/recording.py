"""What a real client sends to ggml-rpc-server, as an input of the fuzzer.

`recording(server)` listens beside the server and passes bytes on; `session()` is then one
connection's requests, with handles and addresses as the symbols of message.h.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.engine.processes import Running
from tests.engine.rpc_client import ALLOC_BUFFER, BUFFER_GET_BASE, FREE_BUFFER, RPC_TENSOR

BUFFER_SYMBOL = 0xB0F0 << 48
ADDRESS_SYMBOL = 0xADD0 << 48
BUFFER_CLEAR, SET_TENSOR, SET_TENSOR_HASH, GET_TENSOR, COPY_TENSOR, GRAPH_COMPUTE = range(5, 11)
INIT_TENSOR, GET_ALLOC_SIZE, MEMSET_TENSOR = 12, 13, 17
REPLIED = {0, 1, 2, 3, 7, 8, 9, 11, 13, 14, 15, 128, 129, 131, 132, 134, 137}
BUFFER_AT, DATA_AT = 12, 220
RECEIVE_BYTES = 1 << 16


@dataclass
class Connection:
    """The bytes of both directions."""

    sent: bytearray = field(default_factory=bytearray)
    replied: bytearray = field(default_factory=bytearray)


@contextmanager
def recording(server: Running, folder: Path) -> Iterator[tuple[Running, list[Connection]]]:
    """A server like `server` whose connections are written down."""
    path = folder / "recorded.sock"
    connections: list[Connection] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(8)
        accepting = threading.Thread(
            target=_accept, args=(listener, server.address.removeprefix("unix:"), connections)
        )
        accepting.start()
        yield Running(server.process, f"unix:{path}", server.log_path), connections
        listener.shutdown(socket.SHUT_RDWR)
        accepting.join()


def _accept(listener: socket.socket, target: str, connections: list[Connection]) -> None:
    threads: list[threading.Thread] = []
    while True:
        try:
            client, _ = listener.accept()
        except OSError:
            break
        server = socket.socket(socket.AF_UNIX)
        server.connect(target)
        connection = Connection()
        connections.append(connection)
        for source, drain, log in (
            (client, server, connection.sent),
            (server, client, connection.replied),
        ):
            threads.append(threading.Thread(target=_pass_on, args=(source, drain, log)))
            threads[-1].start()
    for thread in threads:
        thread.join()


def _pass_on(source: socket.socket, drain: socket.socket, log: bytearray) -> None:
    try:
        while piece := source.recv(RECEIVE_BYTES):
            log += piece
            drain.sendall(piece)
        drain.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def session(connection: Connection) -> bytes:
    """The connection's requests as an input of the fuzzer."""
    buffers: list[tuple[int, int, int]] = []  # handle, base, size
    output = bytearray()
    at = replied_at = 0
    while at + 9 <= len(connection.sent):
        command, size = struct.unpack_from("<BQ", connection.sent, at)
        payload = bytearray(connection.sent[at + 9 : at + 9 + size])
        at += 9 + size
        reply = b""
        if command in REPLIED:
            (reply_size,) = struct.unpack_from("<Q", connection.replied, replied_at)
            reply = bytes(connection.replied[replied_at + 8 : replied_at + 8 + reply_size])
            replied_at += 8 + reply_size
        if command == ALLOC_BUFFER:
            handle, buffer_size = struct.unpack("<QQ", reply)
            buffers.append((handle, 0, buffer_size))
        elif command == BUFFER_GET_BASE:
            (handle,) = struct.unpack("<Q", payload)
            (base,) = struct.unpack("<Q", reply)
            buffers = [(h, base if h == handle else b, s) for h, b, s in buffers]
        _symbolise(command, payload, buffers)
        output += struct.pack("<BQ", command, size) + payload
    return bytes(output)


def tensor_places(command: int, payload: bytes | bytearray) -> list[int]:
    """Where the tensors begin in a request."""
    if command in {SET_TENSOR, SET_TENSOR_HASH, GET_TENSOR, INIT_TENSOR, MEMSET_TENSOR}:
        return [0]
    if command == COPY_TENSOR:
        return [0, RPC_TENSOR.size]
    if command == GET_ALLOC_SIZE:
        return [4 + index * RPC_TENSOR.size for index in range(11)]
    if command == GRAPH_COMPUTE:
        (nodes,) = struct.unpack_from("<I", payload, 4)
        return list(range(12 + 8 * nodes, len(payload), RPC_TENSOR.size))
    return []


def _symbolise(command: int, payload: bytearray, buffers: list[tuple[int, int, int]]) -> None:
    for place in tensor_places(command, payload):
        _replace(payload, place + BUFFER_AT, _buffer_symbol, buffers)
        _replace(payload, place + DATA_AT, _address_symbol, buffers)
    if command in {BUFFER_GET_BASE, FREE_BUFFER, BUFFER_CLEAR}:
        _replace(payload, 0, _buffer_symbol, buffers)


def _replace(payload: bytearray, at: int, symbol: object, buffers: object) -> None:
    (value,) = struct.unpack_from("<Q", payload, at)
    struct.pack_into("<Q", payload, at, symbol(value, buffers))  # type: ignore[operator]


def _buffer_symbol(value: int, buffers: list[tuple[int, int, int]]) -> int:
    found = [index for index, (handle, _, _) in enumerate(buffers) if handle == value]
    return BUFFER_SYMBOL | found[-1] if found and value else value


def _address_symbol(value: int, buffers: list[tuple[int, int, int]]) -> int:
    for index, (_, base, size) in reversed(list(enumerate(buffers))):
        if base and base <= value <= base + size:
            return ADDRESS_SYMBOL | index << 40 | (value - base)
    return value
