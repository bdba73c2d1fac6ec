"""A bare RPC client for tests: upstream's messages (ggml-rpc.cpp) and ours from 128 up.

Every message is a command byte, a 64-bit length and a payload; a response is a length and a
payload. All numbers little-endian, structures packed.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from types import TracebackType

ALLOC_BUFFER, GET_ALIGNMENT, GET_MAX_SIZE, BUFFER_GET_BASE, FREE_BUFFER = range(5)
GET_TENSOR, GET_DEVICE_MEMORY, HELLO, DEVICE_COUNT = 8, 11, 14, 15
MESH_HELLO, GGUF_INDEX, SET_TENSOR_GGUF, LOAD_COMMIT, LOAD_STATUS = range(128, 133)
ALLOC, CONFIRM, TENSOR, INPUT, GET, GRAPH, GRAPH_AGAIN, PUSH, TAKE = range(133, 142)

MESH_VERSION = 2
# how INPUT and GET write data; with KEEP the server keeps it for CHANGES
EXACT, F16, Q8, CHANGES, REPEATS = range(5)
KEEP = 0x80

HELLO_CAPS_BYTES = 24
REPLY_LIMIT_S = 20.0
# id, type, buffer, ne, nb, op, op_params, flags, src, view_src, view_offs, data, name, use_count
RPC_TENSOR = struct.Struct("<QIQ4I4II64si80sQQQ64si")
COMMIT = struct.Struct("<QQQ64s256s256s")
INDEX_ENTRY = struct.Struct("<I4QQ64s")
DEVICE = struct.Struct("<QQQQI")
CONFIRMED = struct.Struct("<Q256s")
DATA = struct.Struct("<IBQQ")


@dataclass(frozen=True)
class Device:
    """What MESH_HELLO says of one: `plain` when a tensor takes no more memory than its data."""

    alignment: int
    max_size: int
    free_bytes: int
    total_bytes: int
    plain: bool
    refused_ops: tuple[int, ...]


@dataclass(frozen=True)
class Facts:
    """The answer to MESH_HELLO."""

    version: int
    offers: bool
    devices: tuple[Device, ...]


class RpcClient:
    """I hold one connection; a `None` reply means that the server closed it."""

    def __init__(self, address: str, *, hello: bool = True) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(REPLY_LIMIT_S)
        self._socket.connect(address.removeprefix("unix:"))
        self.mesh_bit = 0
        if hello:
            reply = self.ask(HELLO, bytes(HELLO_CAPS_BYTES))
            assert reply is not None
            self.mesh_bit = reply[3] & 1

    def __enter__(self) -> RpcClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.close()

    def send(self, command: int, payload: bytes) -> None:
        self._socket.sendall(struct.pack("<BQ", command, len(payload)) + payload)

    def send_raw(self, data: bytes) -> None:
        self._socket.sendall(data)

    def ask(self, command: int, payload: bytes, *, limit_s: float = REPLY_LIMIT_S) -> bytes | None:
        self.send(command, payload)
        return self.reply(limit_s=limit_s)

    def reply(self, *, limit_s: float = REPLY_LIMIT_S) -> bytes | None:
        self._socket.settimeout(limit_s)
        header = self._exactly(8)
        return None if header is None else self._exactly(struct.unpack("<Q", header)[0])

    def _exactly(self, size: int) -> bytes | None:
        data = b""
        while len(data) < size:
            try:
                piece = self._socket.recv(size - len(data))
            except ConnectionResetError:
                return None
            if not piece:
                return None
            data += piece
        return data

    def _numbers(self, layout: str, command: int, payload: bytes) -> tuple[int, ...]:
        reply = self.ask(command, payload)
        assert reply is not None
        return struct.unpack(layout, reply)

    def device_memory(self) -> tuple[int, int]:
        """(free, total) bytes of device 0."""
        free, total = self._numbers("<QQ", GET_DEVICE_MEMORY, struct.pack("<I", 0))
        return free, total

    def allocate(self, size: int) -> int:
        """A buffer on device 0; 0 when refused."""
        return self._numbers("<QQ", ALLOC_BUFFER, struct.pack("<IQ", 0, size))[0]

    def free(self, buffer: int) -> None:
        self.send(FREE_BUFFER, struct.pack("<Q", buffer))

    def base(self, buffer: int) -> int:
        return self._numbers("<Q", BUFFER_GET_BASE, struct.pack("<Q", buffer))[0]

    def facts(self) -> Facts:
        reply = self.ask(MESH_HELLO, struct.pack("<II", MESH_VERSION, 0))
        assert reply is not None
        version, flags, count = struct.unpack_from("<III", reply)
        at = 12
        devices = []
        for _ in range(count):
            alignment, max_size, free, total, device_flags = DEVICE.unpack_from(reply, at)
            (n_refused,) = struct.unpack_from("<I", reply, at + DEVICE.size)
            at += DEVICE.size + 4
            refused = struct.unpack_from(f"<{n_refused}Q", reply, at)
            at += 8 * n_refused
            devices.append(Device(alignment, max_size, free, total, device_flags == 1, refused))
        assert at == len(reply)
        return Facts(version, flags == 1, tuple(devices))

    def alloc(self, handle: int, base: int, size: int, *, device: int = 0) -> None:
        """A buffer that I name, at the address where I have it; `confirm` tells whether it is."""
        self.send(ALLOC, struct.pack("<IQQQ", device, handle, base, size))

    def confirm(self) -> tuple[int, str]:
        """(buffers refused since the last time, the reason of the first)."""
        reply = self.ask(CONFIRM, b"")
        assert reply is not None
        refused, reason = CONFIRMED.unpack(reply)
        return refused, reason.rstrip(b"\0").decode()

    def describe(self, number: int, tensor: bytes) -> None:
        self.send(TENSOR, struct.pack("<I", number) + tensor)

    def input(
        self, tensor: int, data: bytes, *, size: int, coding: int = EXACT, offset: int = 0
    ) -> None:
        self.send(INPUT, DATA.pack(tensor, coding, offset, size) + data)

    def get(self, tensor: int, size: int, *, coding: int = EXACT, offset: int = 0) -> bytes | None:
        return self.ask(GET, DATA.pack(tensor, coding, offset, size))

    def graph(self, slot: int, graph: bytes, *, device: int = 0) -> None:
        """`graph` is what GRAPH_COMPUTE has."""
        self.send(GRAPH, struct.pack("<II", device, slot) + graph)

    def graph_again(self, slot: int, *, device: int = 0) -> None:
        self.send(GRAPH_AGAIN, struct.pack("<II", device, slot))

    def push(self, tensor: int, number: int, size: int, *, coding: int = EXACT) -> None:
        self.send(PUSH, DATA.pack(tensor, coding, number, size))

    def take(self, tensor: int, number: int, size: int, *, coding: int = EXACT) -> None:
        self.send(TAKE, DATA.pack(tensor, coding, number, size))

    def get_tensor(self, tensor: bytes, size: int) -> bytes | None:
        return self.ask(GET_TENSOR, tensor + struct.pack("<QQ", 0, size))

    def index(self, root: bytes) -> dict[str, tuple[int, tuple[int, ...], int]]:
        """Name to (ggml type, ne, bytes) of what is offered under one root."""
        reply = self.ask(GGUF_INDEX, root)
        assert reply is not None
        (count,) = struct.unpack_from("<I", reply)
        assert len(reply) == 4 + count * INDEX_ENTRY.size
        entries = [INDEX_ENTRY.unpack_from(reply, 4 + i * INDEX_ENTRY.size) for i in range(count)]
        return {
            entry[6].rstrip(b"\0").decode(): (entry[0], entry[1:5], entry[5]) for entry in entries
        }

    def set_tensor_gguf(
        self, load: int, root: bytes, file_ne: tuple[int, ...], tensor: bytes
    ) -> None:
        self.send(SET_TENSOR_GGUF, struct.pack("<I32s4Q", load, root, *file_ne) + tensor)

    def commit(self, load: int) -> tuple[int, int, int, str, str, str]:
        """(tensors, bytes, failures, tensor, file, reason)."""
        reply = self.ask(LOAD_COMMIT, struct.pack("<I", load))
        assert reply is not None
        tensors, size, failures, *texts = COMMIT.unpack(reply)
        tensor, file, reason = (text.rstrip(b"\0").decode() for text in texts)
        return tensors, size, failures, tensor, file, reason


def rpc_tensor(
    name: str,
    *,
    type: int,
    ne: tuple[int, ...],
    buffer: int,
    data: int,
    row_bytes: int,
    type_bytes: int,
    view_src: int = 0,
) -> bytes:
    """A contiguous tensor as the protocol has it."""
    nb = (type_bytes, row_bytes, row_bytes * ne[1], row_bytes * ne[1] * ne[2])
    nb32 = tuple(stride & 0xFFFFFFFF for stride in nb)
    packed = RPC_TENSOR.pack(
        1, type, buffer, *ne, *nb32, 0, b"", 0, b"", view_src, 0, data, name.encode(), 0
    )
    assert len(packed) % 8 == 0
    return packed
