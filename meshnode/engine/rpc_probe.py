"""Ask a bare rpc-server what it has: version, devices, memory.

Speaks four commands of upstream's protocol (`ggml/src/ggml-rpc/ggml-rpc.cpp`): a request is
command (1 byte), size (8, little-endian), payload; a response is size (8), payload.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import trio

from meshnode.errors import NetworkError

PROBE_TIMEOUT_S = 5.0
_MAJOR_VERSION = 7
_MAX_DEVICES = 64

_GET_DEVICE_MEMORY = 11
_HELLO = 14
_DEVICE_COUNT = 15

_HELLO_CAPS = bytes(24)


@dataclass(frozen=True)
class RpcDeviceFacts:
    free_bytes: int
    total_bytes: int


class RpcUnreachable(NetworkError):
    """No usable rpc-server at the address."""


async def probe_rpc_server(host: str, port: int) -> tuple[RpcDeviceFacts, ...]:
    """The devices of the rpc-server at `host:port`. Raises `RpcUnreachable`."""
    where = f"{host}:{port}"
    try:
        with trio.fail_after(PROBE_TIMEOUT_S):
            async with await trio.open_tcp_stream(host, port) as stream:
                return await _ask(stream, where)
    except trio.TooSlowError:
        raise RpcUnreachable(
            f"the rpc-server at {where} did not answer in {PROBE_TIMEOUT_S:.0f} s: it serves one "
            "client at a time, so check that no other is connected"
        ) from None
    except (OSError, trio.BrokenResourceError) as error:
        raise RpcUnreachable(
            f"no rpc-server answers at {where} ({error}): start ggml-rpc-server there, "
            "or check the address"
        ) from error


async def _ask(stream: trio.SocketStream, where: str) -> tuple[RpcDeviceFacts, ...]:
    hello = await _command(stream, _HELLO, _HELLO_CAPS, 28, where)
    if hello[0] != _MAJOR_VERSION:
        raise RpcUnreachable(
            f"the rpc-server at {where} speaks protocol {hello[0]}.{hello[1]}, this engine "
            f"{_MAJOR_VERSION}: build both from the same llama.cpp"
        )
    (count,) = struct.unpack("<I", await _command(stream, _DEVICE_COUNT, b"", 4, where))
    if not 1 <= count <= _MAX_DEVICES:
        raise RpcUnreachable(f"the rpc-server at {where} reports {count} devices, which is absurd")
    devices = []
    for index in range(count):
        request = struct.pack("<I", index)
        answer = await _command(stream, _GET_DEVICE_MEMORY, request, 16, where)
        devices.append(RpcDeviceFacts(*struct.unpack("<QQ", answer)))
    return tuple(devices)


async def _command(
    stream: trio.SocketStream, command: int, payload: bytes, answer_bytes: int, where: str
) -> bytes:
    await stream.send_all(struct.pack("<BQ", command, len(payload)) + payload)
    (size,) = struct.unpack("<Q", await _exactly(stream, 8, where))
    if size != answer_bytes:
        raise RpcUnreachable(f"what answers at {where} is not an rpc-server of this protocol")
    return await _exactly(stream, answer_bytes, where)


async def _exactly(stream: trio.SocketStream, wanted_bytes: int, where: str) -> bytes:
    data = b""
    while len(data) < wanted_bytes:
        chunk = await stream.receive_some(wanted_bytes - len(data))
        if not chunk:
            raise RpcUnreachable(f"what answers at {where} closed the connection")
        data += chunk
    return data
