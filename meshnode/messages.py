"""CBOR messages on a tunnel stream, each behind a four-byte big-endian length.

Used by the small services between nodes (`join`, `hello`, `control`). What arrives is checked for
size and shape here and for meaning by whoever reads it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import cbor2
import trio

from meshnode.cbor import BadCbor, loads_untrusted
from meshnode.errors import BadMessage, NetworkError

_LENGTH = struct.Struct(">I")

SMALL_MESSAGE_BYTES = 64 * 1024
MANIFEST_MESSAGE_BYTES = 16 * 1024 * 1024
MAX_VALUES = 1 << 14
"""In one message: a page of 32 members has 2,500, a worker's facts name 10,000 models at most. What
has more, a manifest, travels inside as bytes."""

Message = Mapping[str, Any]


class PeerGone(NetworkError):
    """The stream ended where a message was due."""


def parse_message_untrusted(data: bytes) -> Message:
    """The map with text keys in `data`; raises `BadMessage` and nothing else."""
    try:
        message = loads_untrusted(data, MAX_VALUES)
    except BadCbor as error:
        raise BadMessage("the peer sent a message that cannot be read") from error
    if not isinstance(message, dict) or not all(isinstance(key, str) for key in message):
        raise BadMessage("the peer sent a message of an unknown shape")
    return message


class MessageStream:
    """Whole messages over one byte stream, also of several tasks."""

    def __init__(self, stream: trio.abc.HalfCloseableStream) -> None:
        self._stream = stream
        self._sending = trio.Lock()
        self._buffer = bytearray()

    async def send(self, message: Message) -> None:
        body = cbor2.dumps(dict(message))
        async with self._sending:
            await self._stream.send_all(_LENGTH.pack(len(body)) + body)

    async def receive_untrusted(self, limit_bytes: int = SMALL_MESSAGE_BYTES) -> Message:
        """The next message. Raises `BadMessage`, or `PeerGone` at the end of the stream."""
        message = await self.receive_or_end_untrusted(limit_bytes)
        if message is None:
            raise PeerGone("the peer closed the conversation before answering")
        return message

    async def receive_or_end_untrusted(
        self, limit_bytes: int = SMALL_MESSAGE_BYTES
    ) -> Message | None:
        """The next message, or None at a clean end of the stream."""
        if not await self._fill(_LENGTH.size):
            if self._buffer:
                raise BadMessage("the peer's last message was cut short")
            return None
        (length,) = _LENGTH.unpack_from(self._buffer)
        if length > limit_bytes:
            raise BadMessage(f"the peer announced a message of {length} bytes, too large to take")
        if not await self._fill(_LENGTH.size + length):
            raise BadMessage("the peer's last message was cut short")
        body = bytes(self._buffer[_LENGTH.size : _LENGTH.size + length])
        del self._buffer[: _LENGTH.size + length]
        return parse_message_untrusted(body)

    def rest(self) -> bytes:
        """What has come after the last message. From now on the stream is the caller's to read."""
        rest, self._buffer = bytes(self._buffer), bytearray()
        return rest

    async def _fill(self, wanted_bytes: int) -> bool:
        while len(self._buffer) < wanted_bytes:
            chunk = await self._stream.receive_some(max(4096, wanted_bytes - len(self._buffer)))
            if not chunk:
                return False
            self._buffer += chunk
        return True
