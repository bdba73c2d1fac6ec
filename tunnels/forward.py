"""Carry bytes between local sockets (unix or TCP) and tunnel streams.

Each direction ends on its own: the end of input on one side becomes the end of output on the
other. An error on either side resets the other, so that nobody takes a broken transfer for a
complete one.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket as stdlib_socket
import stat
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from tunnels.errors import StreamError, TunnelError
from tunnels.splice import Splice
from tunnels.stream import Stream

Target = str | Path | tuple[str, int]  # a unix socket's path, or (host, port)
OpenStream = Callable[[], Awaitable[Stream]]

CONNECT_TIMEOUT_S = 5.0
BACKLOG = 64

log = logging.getLogger(__name__)


class ForwardFailed(TunnelError):
    """The local socket cannot be listened on."""


async def connect_and_splice(stream: Stream, target: Target) -> None:
    """The serving side: connect to the local `target` and carry `stream` to and from it.

    Returns when both directions have ended. A target that is not there resets the stream with
    a sentence; nothing is raised for what local or remote programs do.
    """
    try:
        with trio.fail_after(CONNECT_TIMEOUT_S):
            local = await _connect(target)
    except (OSError, trio.TooSlowError) as error:
        log.warning("the local service of %r does not answer: %s", stream.service, error)
        stream.reset("the service does not answer on the other node")
        return
    await splice(stream, local)


async def listen_and_forward(
    address: Target,
    open_stream: OpenStream,
    *,
    task_status: trio.TaskStatus[Target] = trio.TASK_STATUS_IGNORED,
) -> None:
    """The client side: listen on `address` and carry every connection over a stream of its own.

    A unix socket is made 0600 in the caller's folder (make that 0700) and removed at the end.
    The started value is the address, with the real port for port 0. Raises ForwardFailed.
    """
    sock, bound = _listen(address)
    try:
        async with trio.open_nursery() as nursery:
            task_status.started(bound)
            while True:
                connection, _ = await sock.accept()
                nursery.start_soon(_forward_one, _stream_of(connection), open_stream)
    finally:
        sock.close()
        if not isinstance(bound, tuple):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(bound)


async def splice(stream: Stream, local: trio.SocketStream) -> None:
    """Carry both directions until both have ended or either has failed. Owns both ends."""
    try:
        await Splice(stream, local.socket).run()
    except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as group:
        stream.reset("the local connection broke on the other node")
        _abort(local)
        log.debug("a forwarded connection broke: %s", group.exceptions[0])
    except* StreamError as group:
        _abort(local)
        log.debug("a forwarded stream failed: %s", group.exceptions[0])
    except* BaseException:
        stream.reset("the forward was stopped on the other node")
        _abort(local)
        raise
    finally:
        with trio.CancelScope(shield=True):
            await stream.aclose()
            await trio.aclose_forcefully(local)


async def _forward_one(local: trio.SocketStream, open_stream: OpenStream) -> None:
    try:
        stream = await open_stream()
    except TunnelError as error:
        log.warning("a local connection could not be forwarded: %s", error)
        _abort(local)
        await trio.aclose_forcefully(local)
        return
    await splice(stream, local)


async def _connect(target: Target) -> trio.SocketStream:
    if isinstance(target, tuple):
        host, port = target
        sock = trio.socket.socket(_family(host), trio.socket.SOCK_STREAM)
        where: str | tuple[str, int] = (host, port)
    else:
        sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
        where = os.fspath(target)
    try:
        await sock.connect(where)
    except BaseException:
        sock.close()
        raise
    return _stream_of(sock)


def _listen(address: Target) -> tuple[trio.socket.SocketType, Target]:
    if isinstance(address, tuple):
        sock = trio.socket.socket(_family(address[0]), trio.socket.SOCK_STREAM)
        plain = stdlib_socket.socket(_family(address[0]), stdlib_socket.SOCK_STREAM)
        sock.close()
        plain.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_REUSEADDR, 1)
        where: str | tuple[str, int] = address
    else:
        where = os.fspath(address)
        _remove_stale(where)
        plain = stdlib_socket.socket(stdlib_socket.AF_UNIX, stdlib_socket.SOCK_STREAM)
    try:
        _bind(plain, where)
        plain.listen(BACKLOG)
    except OSError as error:
        plain.close()
        raise ForwardFailed(f"cannot listen on {_spell(where)}: {_why(error)}") from error
    plain.setblocking(False)
    bound: Target = plain.getsockname()[:2] if isinstance(where, tuple) else where
    return trio.socket.from_stdlib_socket(plain), bound


def _bind(sock: stdlib_socket.socket, where: str | tuple[str, int]) -> None:
    if isinstance(where, tuple):
        sock.bind(where)
        return
    before = os.umask(0o177)  # 0600 from the first moment; no other thread binds meanwhile
    try:
        sock.bind(where)
    finally:
        os.umask(before)


def _remove_stale(path: str) -> None:
    """Remove a socket left by a process that was killed; anything else stays."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise ForwardFailed(f"cannot listen on {path}: another file is there; remove it")
        probe = stdlib_socket.socket(stdlib_socket.AF_UNIX, stdlib_socket.SOCK_STREAM)
        try:
            probe.connect(path)
        except OSError:
            os.unlink(path)
        else:
            raise ForwardFailed(f"cannot listen on {path}: another process listens there")
        finally:
            probe.close()


def _family(host: str) -> int:
    return stdlib_socket.AF_INET6 if ":" in host else stdlib_socket.AF_INET


def _stream_of(sock: trio.socket.SocketType) -> trio.SocketStream:
    return trio.SocketStream(sock)  # sets TCP_NODELAY


def _abort(local: trio.SocketStream) -> None:
    """Make the coming close a reset where the kind of socket knows one (TCP)."""
    with contextlib.suppress(OSError, trio.ClosedResourceError):
        local.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_LINGER, struct.pack("ii", 1, 0))


def _spell(where: str | tuple[str, int]) -> str:
    return where if isinstance(where, str) else f"{where[0]} port {where[1]}"


def _why(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "the port is in use; choose another"
    if error.errno is None and "too long" in str(error):
        return "the path is too long for a unix socket (about 100 bytes); use a shorter folder"
    return (error.strerror or str(error)).lower()
