"""node.sock: how other `mesh` commands on the same home reach the running node.

One JSON object a line each way, one request a connection, on a unix socket in the home's private
runtime folder: whoever may open it is the node's own user. What takes long is answered by lines
that tell how far it is, and then by the answer; it ends where the asker hangs up.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import trio

from meshnode.errors import HomeError, MeshError
from meshnode.paths import runtime_folder, socket_path
from meshnode.state import read_file, write_durably

log = logging.getLogger(__name__)

SOCKET_NAME = "node.sock"
RUNTIME_RECORD = "runtime"
"""The file in the home that says where the sockets are: XDG_RUNTIME_DIR, which decides it, may be
another one for who asks (ssh, sudo, cron)."""
MAX_LINE_BYTES = 1024 * 1024
REQUEST_TIMEOUT_S = 10.0
MAX_ASKERS = 32  # at once; all are this node's own user, and some may be a script gone wild

FOLLOW_EVERY_S = 0.5
ALIVE_EVERY_S = 5.0  # a word of long work that is no further
SILENCE_S = 60.0  # without one: the node is stopped, or gone

Handler = Callable[[Mapping[str, Any]], Awaitable[Mapping[str, Any]]]
OnProgress = Callable[[int, int], None]
"""Bytes done and in all."""
LongHandler = Callable[[Mapping[str, Any], OnProgress], Awaitable[Mapping[str, Any]]]


async def serve_control_socket(
    home: Path,
    handlers: Mapping[str, Handler],
    long_handlers: Mapping[str, LongHandler] = MappingProxyType({}),
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answers requests until cancelled. The home's lock is held, so a socket left there is dead."""
    folder = runtime_folder(home)
    path = socket_path(folder, SOCKET_NAME)
    path.unlink(missing_ok=True)
    write_durably(home / RUNTIME_RECORD, os.fsencode(folder))
    listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await listener.bind(str(path))
    os.chmod(path, 0o600)
    listener.listen()

    askers = trio.Semaphore(MAX_ASKERS)

    async def serve_one(stream: trio.SocketStream) -> None:
        try:
            askers.acquire_nowait()
        except trio.WouldBlock:
            await trio.aclose_forcefully(stream)
            return
        try:
            await serve_asker(stream)
        finally:
            askers.release()

    async def serve_asker(stream: trio.SocketStream) -> None:
        async with stream:
            line = b""
            with trio.move_on_after(REQUEST_TIMEOUT_S):
                try:
                    line = await _read_line(stream)
                    if _op(line) not in long_handlers:
                        await stream.send_all(await _answer_line(line, handlers))
                        return
                except trio.BrokenResourceError:
                    return  # whoever asked has left
            if _op(line) in long_handlers:
                await _Followed(stream).answer(line, long_handlers)

    try:
        await trio.serve_listeners(
            serve_one, [trio.SocketListener(listener)], task_status=_Started(task_status)
        )
    finally:
        path.unlink(missing_ok=True)


class _Started:
    """`serve_listeners` starts with its listeners, which nobody else needs."""

    def __init__(self, task_status: trio.TaskStatus[None]) -> None:
        self._task_status = task_status

    def started(self, _listeners: object = None) -> None:
        self._task_status.started()


def _op(line: bytes) -> object:
    try:
        op = json.loads(line)["op"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return op if isinstance(op, str) else None


class _Followed:
    """Long work for one asker, for as long as it stays on the line."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._progress = 0, 0
        self._is_gone = False

    async def answer(self, line: bytes, handlers: Mapping[str, LongHandler]) -> None:
        def tell(done_bytes: int, total_bytes: int) -> None:
            self._progress = done_bytes, total_bytes

        async def work(request: Mapping[str, Any]) -> Mapping[str, Any]:
            return await handlers[request["op"]](request, tell)

        answer = b""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._until_gone, nursery.cancel_scope)
            nursery.start_soon(self._tell)
            answer = await _answer_line(line, {str(_op(line)): work})
            nursery.cancel_scope.cancel()
        if not self._is_gone:
            with suppress(trio.BrokenResourceError), trio.move_on_after(REQUEST_TIMEOUT_S):
                await self._stream.send_all(answer)

    async def _until_gone(self, scope: trio.CancelScope) -> None:
        with suppress(trio.BrokenResourceError):
            while await self._stream.receive_some(4096):
                pass
        self._is_gone = True
        scope.cancel()

    async def _tell(self) -> None:
        told, told_at = (0, 0), trio.current_time()
        with suppress(trio.BrokenResourceError):
            while True:
                await trio.sleep(FOLLOW_EVERY_S)
                now = trio.current_time()
                if self._progress != told or now - told_at >= ALIVE_EVERY_S:
                    told, told_at = self._progress, now
                    await self._stream.send_all(_encode({"progress": list(told)}))


async def _answer_line(line: bytes, handlers: Mapping[str, Handler]) -> bytes:
    """The answer to one request, as a line. A handler's failure is the asker's, not the node's."""
    answer: Mapping[str, Any]
    try:
        request = json.loads(line)
        handler = handlers[request["op"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        answer = {"error": "the node does not know this request", "exit_code": 2}
        return _encode(answer)
    try:
        return _encode(await handler(request))
    except MeshError as error:
        return _encode({"error": str(error), "exit_code": error.exit_code})
    except Exception:
        log.exception("the request %r failed", request["op"])
        return _encode({"error": "the node failed at this request: its log says why"})


def _encode(answer: Mapping[str, Any]) -> bytes:
    return json.dumps(answer).encode() + b"\n"


async def _read_line(stream: trio.SocketStream) -> bytes:
    data = bytearray()
    while not data.endswith(b"\n"):
        chunk = await stream.receive_some()
        data += chunk
        if not chunk or len(data) > MAX_LINE_BYTES:
            return b""  # which is no request
    return bytes(data)


class NoNode(HomeError):
    """No node runs on this home."""


class NodeRefused(MeshError):
    """The running node answered with an error; its exit code is ours."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


def _runtime_folder_of(home: Path) -> Path:
    """Where the node on this home said that it keeps its sockets. Raises `HomeError`."""
    record = home / RUNTIME_RECORD
    try:
        return Path(os.fsdecode(read_file(record)))
    except (FileNotFoundError, NotADirectoryError):
        return runtime_folder(home)  # it will not be there either, which is told
    except OSError as error:
        raise HomeError(
            f"{record} cannot be read: {error.strerror}; name a home of your own with --home"
        ) from None


def ask_node(home: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    """The running node's answer. Raises `NoNode` when none runs on this home, `HomeError` when the
    one that does gives no answer or the home cannot be read, and `NodeRefused` when it answers with
    an error."""
    return follow_node(home, request, lambda _done, _total: None, REQUEST_TIMEOUT_S)


def follow_node(
    home: Path,
    request: Mapping[str, Any],
    on_progress: OnProgress,
    silence_s: float = SILENCE_S,
) -> dict[str, Any]:
    """The same for what takes long. `silence_s`: for how long the node may say nothing."""
    path = _runtime_folder_of(home) / SOCKET_NAME
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(REQUEST_TIMEOUT_S)
        try:
            connection.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            raise NoNode(
                f"no node runs on {home}: start one with `mesh worker` or `mesh serve`, "
                "or name its home with --home"
            ) from None
        except OSError as error:
            raise HomeError(
                f"the node on {home} cannot be asked at {path}: {error.strerror or error}; "
                "restart it"
            ) from None
        try:
            connection.sendall(json.dumps(dict(request)).encode() + b"\n")
            connection.settimeout(silence_s)
            answer = _last_line(connection, on_progress)
        except TimeoutError:
            raise HomeError(
                f"the node on {home} did not answer in {silence_s:.0f} s: try again, or restart it"
            ) from None
        except (OSError, ValueError, TypeError, RecursionError):
            answer = None
    if not isinstance(answer, dict):
        raise HomeError(f"the node on {home} gave no proper answer: try again, or restart it")
    if "error" in answer:
        code = answer.get("exit_code")
        raise NodeRefused(str(answer["error"]), code if isinstance(code, int) else 1)
    return answer


def _last_line(connection: socket.socket, on_progress: OnProgress) -> Any:
    """The answer, after lines that tell how far it is."""
    with connection.makefile("rb") as lines:
        while True:
            answer = json.loads(lines.readline())
            if not isinstance(answer, dict) or answer.keys() != {"progress"}:
                return answer
            done_bytes, total_bytes = answer["progress"]
            on_progress(done_bytes, total_bytes)
