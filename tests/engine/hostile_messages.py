"""Messages as no llama.cpp writes them: tensors with any number in any field, and graphs."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from tests.engine.rpc_client import RPC_TENSOR, RpcClient

# ggml.h of the pinned tree
F32, F16, Q4_0, Q8_0, I32 = 0, 1, 2, 8, 26
NONE, ADD, MUL, SUM_ROWS, CONCAT, RMS_NORM, MUL_MAT, MUL_MAT_ID = 0, 2, 7, 15, 22, 25, 29, 30
SCALE, CPY, CONT, RESHAPE, GET_ROWS, SET_ROWS, SOFT_MAX, ROPE = 32, 34, 35, 36, 40, 42, 46, 48
CONV_2D, ARGSORT, FILL, FLASH_ATTN_EXT, RWKV_WKV7, UNARY = 56, 69, 73, 74, 84, 91
MAP_CUSTOM1, MAP_CUSTOM2, MAP_CUSTOM3, CUSTOM, GLU, OP_COUNT = 92, 93, 94, 95, 100, 101
COMPUTE = 16

RPC_BUFFER_CLEAR, RPC_SET_TENSOR, RPC_COPY_TENSOR, RPC_GRAPH_COMPUTE = 5, 6, 9, 10
RPC_INIT_TENSOR, RPC_GET_ALLOC_SIZE, RPC_GRAPH_RECOMPUTE, RPC_MEMSET_TENSOR = 12, 13, 16, 17


@dataclass(frozen=True)
class Tensor:
    """A tensor of a message. Without strides it is contiguous, of 4-byte elements."""

    id: int
    buffer: int
    data: int
    ne: tuple[int, int, int, int]
    nb: tuple[int, int, int, int] | None = None
    type: int = F32
    op: int = NONE
    op_params: tuple[int, ...] = ()
    src: tuple[int, ...] = ()
    view_src: int = 0
    flags: int = COMPUTE

    def pack(self) -> bytes:
        ne = self.ne
        strides = self.nb or (4, 4 * ne[0], 4 * ne[0] * ne[1], 4 * ne[0] * ne[1] * ne[2])
        return RPC_TENSOR.pack(
            self.id,
            self.type,
            self.buffer,
            *ne,
            *(stride & 0xFFFFFFFF for stride in strides),
            self.op,
            struct.pack(f"<{len(self.op_params)}i", *self.op_params),
            self.flags,
            struct.pack(f"<{len(self.src)}Q", *self.src),
            self.view_src,
            0,
            self.data,
            f"t{self.id}".encode(),
            1,
        )


def graph(tensors: list[Tensor], nodes: list[int], *, device: int = 0) -> bytes:
    """The payload of a GRAPH_COMPUTE."""
    return (
        struct.pack("<II", device, len(nodes))
        + struct.pack(f"<{len(nodes)}Q", *nodes)
        + struct.pack("<I", len(tensors))
        + b"".join(tensor.pack() for tensor in tensors)
    )


def changes(*ranges: tuple[int, bytes]) -> bytes:
    """What INPUT has in CODING_CHANGES: where each is and how long, zeros, the bytes of all."""
    pairs = b"".join(struct.pack("<II", at, len(new)) for at, new in ranges)
    return pairs + bytes(8) + b"".join(new for _, new in ranges)


def repeats(*runs: tuple[int, int]) -> bytes:
    return b"".join(struct.pack("<II", count, word) for count, word in runs)


@dataclass
class Memory:
    """A buffer of a connection, cut into tensors."""

    client: RpcClient
    size: int = 1 << 16
    handle: int = field(init=False)
    base: int = field(init=False)

    def __post_init__(self) -> None:
        self.handle = self.client.allocate(self.size)
        self.base = self.client.base(self.handle)

    def tensor(
        self, id: int, at: int, ne: tuple[int, ...] = (8, 4), *, op: int = NONE, type: int = F32
    ) -> Tensor:
        ne0, ne1, ne2, ne3, *_ = (*ne, 1, 1, 1)
        return Tensor(id, self.handle, self.base + at, (ne0, ne1, ne2, ne3), op=op, type=type)

    def write(self, at: int, data: bytes) -> None:
        whole = Tensor(9, self.handle, self.base, (self.size // 4, 1, 1, 1))
        self.client.send(RPC_SET_TENSOR, whole.pack() + struct.pack("<BQ", 0, at) + data)

    def read(self, at: int, size: int) -> bytes | None:
        whole = Tensor(9, self.handle, self.base, (self.size // 4, 1, 1, 1)).pack()
        return self.client.ask(8, whole + struct.pack("<QQ", at, size))


@dataclass
class NamedMemory(Memory):
    """A buffer that the client names, at an address of its choice; tensors told once by number."""

    handle: int = field(init=False, default=7)
    base: int = field(init=False, default=1 << 40)
    told: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.client.alloc(self.handle, self.base, self.size)

    def tell(self, at: int, ne: tuple[int, ...] = (8, 4), *, type: int = F32) -> int:
        """The number of a tensor that the server knows from now on."""
        self.told += 1
        self.client.describe(self.told, self.tensor(self.told, at, ne, type=type).pack())
        return self.told
