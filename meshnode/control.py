"""node.sock: how other `mesh` commands on the same home reach the running node.

One JSON object a line each way, one request a connection, on a unix socket in the home's private
runtime folder: whoever may open it is the node's own user.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
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

Handler = Callable[[Mapping[str, Any]], Awaitable[Mapping[str, Any]]]


async def serve_control_socket(
    home: Path,
    handlers: Mapping[str, Handler],
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
            with trio.move_on_after(REQUEST_TIMEOUT_S):
                await _answer(stream, handlers)

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


async def _answer(stream: trio.SocketStream, handlers: Mapping[str, Handler]) -> None:
    try:
        line = await _read_line(stream)
        await stream.send_all(await _answer_line(line, handlers))
    except trio.BrokenResourceError:
        return  # whoever asked has left


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
            answer = json.loads(connection.makefile("rb").readline())
        except TimeoutError:
            raise HomeError(
                f"the node on {home} did not answer in {REQUEST_TIMEOUT_S:.0f} s: try again, "
                "or restart it"
            ) from None
        except (OSError, ValueError, RecursionError):
            answer = None
    if not isinstance(answer, dict):
        raise HomeError(f"the node on {home} gave no proper answer: try again, or restart it")
    if "error" in answer:
        code = answer.get("exit_code")
        raise NodeRefused(str(answer["error"]), code if isinstance(code, int) else 1)
    return answer
