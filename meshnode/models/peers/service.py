"""What other members may read of this node's models: the giving end of the `store` service."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import trio

from meshnode.errors import ModelError, NetworkError
from meshnode.local_paths import without_paths
from meshnode.messages import MessageStream
from meshnode.models.peers.listing import to_message
from meshnode.models.peers.offers import Offers
from meshnode.models.peers.pace import Pace
from meshnode.models.peers.protocol import (
    DigestsRequest,
    Holding,
    HoldsRequest,
    ModelsRequest,
    ReadRequest,
    parse_request_untrusted,
)
from meshnode.models.pull.threads import in_thread
from meshnode.models.spans import Span, within
from meshnode.models.store.slice import in_use
from tunnels import BlockingEnd, Endpoint, Stream, as_socket
from tunnels.allowance import Rate
from tunnels.gate import ServiceLimits

STORE_SERVICE = "store"
PIECE_BYTES = 64 << 20
LIMITED_PIECE_S = 0.05
"""Of an upload that is limited, at once: what is sent beyond the limit where somebody measures."""
ASK_WITHIN_S = 30.0
TAKE_WITHIN_S = 60.0
"""For a peer to take a piece; one that takes none any more is left."""
LOOKING = 4
"""Threads that look what there is, for all members together."""
# A pull has a few connections, and each asks for the next range when one is done.
GIVING = ServiceLimits(
    peer_streams=16, streams=64, peer_rate=Rate(20, burst=64), rate=Rate(100, burst=256)
)

log = logging.getLogger(__name__)


class StoreService:
    """I give members what this node holds of models."""

    def __init__(
        self,
        offers: Offers,
        upload_bytes_per_s: float | None = None,
        folders: Sequence[Path] = (),
    ) -> None:
        """upload_bytes_per_s: to all of them together; None: as fast as it goes. folders: this
        node's own, whose names are not told to others."""
        self._folders = folders
        self._offers = offers
        self._looking = trio.CapacityLimiter(LOOKING)
        # Apart from those of our own pulls: each waits for a peer to take what it asked for.
        self._giving = trio.CapacityLimiter(GIVING.streams)
        self._pace = Pace(upload_bytes_per_s)
        self._piece_bytes = PIECE_BYTES
        if upload_bytes_per_s is not None:
            self._piece_bytes = max(1, min(PIECE_BYTES, int(upload_bytes_per_s * LIMITED_PIECE_S)))

    def offer(self, endpoint: Endpoint) -> None:
        endpoint.serve(STORE_SERVICE, self.serve, GIVING)

    async def serve(self, stream: Stream) -> None:
        messages = MessageStream(stream)
        try:
            with trio.fail_after(ASK_WITHIN_S):
                request = parse_request_untrusted(await messages.receive_untrusted())
            if isinstance(request, ReadRequest):
                await self._give(stream, messages, request)
            else:
                answer = await trio.to_thread.run_sync(self._answer, request, limiter=self._looking)
                with trio.fail_after(TAKE_WITHIN_S):
                    await messages.send(answer)
                    await stream.send_eof()
        except NetworkError as error:
            log.info("a question of %s to the store failed: %s", stream.peer.short, error)
            stream.reset(str(error))
        except trio.TooSlowError:
            stream.reset("the conversation stood still")

    def _answer(self, request: HoldsRequest | ModelsRequest | DigestsRequest) -> Mapping[str, Any]:
        match request:
            case ModelsRequest():
                return to_message(self._offers.listed())
            case DigestsRequest():
                found = self._offers.find(request.identity)
                return {"digests": found.all_digests() if found else b""}
        found = self._offers.find(request.identity)
        holding = Holding(found.files, found.validator, found.spans) if found else Holding()
        return holding.to_message()

    async def _give(self, stream: Stream, messages: MessageStream, request: ReadRequest) -> None:
        opened = await trio.to_thread.run_sync(self._open, request)
        if isinstance(opened, str):
            await messages.send({"refused": opened})
            await stream.send_eof()
            return
        with opened.using:
            await messages.send({"bytes": request.stop - request.start})
            async with as_socket(stream) as end:
                end.socket.settimeout(TAKE_WITHIN_S)
                for at in range(request.start, request.stop, self._piece_bytes):
                    size_bytes = min(self._piece_bytes, request.stop - at)
                    await trio.sleep_until(self._pace.take(size_bytes, trio.current_time()))
                    if at + size_bytes == request.stop:
                        await trio.to_thread.run_sync(opened.check_unchanged)
                    send = partial(_send, opened.file, at, size_bytes, end)
                    await in_thread(end, send, self._giving)
                with trio.fail_after(TAKE_WITHIN_S):
                    await end.finish()

    def _open(self, request: ReadRequest) -> _OpenFile | str:
        """The file, or why not. Nothing of it is dropped while it is open: a member would be given
        zeros."""
        wanted = (Span(request.file_index, request.start, request.stop),)
        with ExitStack() as using:
            found = self._offers.find(request.identity)
            if found is not None:
                try:
                    using.enter_context(in_use(found.paths))
                except ModelError as error:
                    return without_paths(str(error), self._folders)
                found = self._offers.find(request.identity)  # as it is now, and stays
            if found is None or within(wanted, found.spans) != wanted:
                return "these bytes are not here any more"
            try:
                file = found.paths[request.file_index].open("rb", buffering=0)
            except OSError as error:
                return f"the file cannot be read: {error.strerror}"
            using.callback(file.close)
            return _OpenFile(file, using.pop_all(), found.is_unchanged)


@dataclass(frozen=True)
class _OpenFile:
    file: BinaryIO
    using: ExitStack
    is_unchanged: Callable[[], bool]

    def check_unchanged(self) -> None:
        """Before the last of a range goes, without which nothing of it counts. Raises
        `NetworkError`."""
        if not self.is_unchanged():
            raise NetworkError("the file was written to meanwhile")


def _send(file: BinaryIO, start: int, size_bytes: int, end: BlockingEnd) -> None:
    """The system moves the bytes by itself where it can. Raises `NetworkError`."""
    try:
        sent_bytes = end.socket.sendfile(file, start, size_bytes)
    except TimeoutError:
        raise NetworkError("the conversation stood still") from None
    except OSError as error:
        raise NetworkError(f"the file cannot be given: {error.strerror}") from error
    if sent_bytes < size_bytes:
        raise NetworkError("the file has ended")
