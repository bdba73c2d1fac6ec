"""Other commands ask the running node: whatever they send, it lives on and says what is wrong."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from discovery.grants import Role
from meshnode import control
from meshnode.administration import parse_invite_request
from meshnode.config import MAX_INVITE_LIFETIME_S
from meshnode.control import SOCKET_NAME, NodeRefused, ask_node, follow_node, serve_control_socket
from meshnode.errors import AccessError, HomeError, UsageError
from meshnode.node import node_name
from meshnode.paths import runtime_folder, socket_path


async def echo(request: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"said": request["say"]}


async def refuse(_request: Mapping[str, Any]) -> Mapping[str, Any]:
    raise AccessError("you may not")


async def stumble(_request: Mapping[str, Any]) -> Mapping[str, Any]:
    raise ValueError("a bug")


HANDLERS = {"echo": echo, "refuse": refuse, "stumble": stumble}


@asynccontextmanager
async def node_on(home: Path) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_control_socket, home, HANDLERS)
        yield
        nursery.cancel_scope.cancel()


async def ask(home: Path, **request: object) -> dict[str, Any]:
    with trio.fail_after(20):
        return await trio.to_thread.run_sync(ask_node, home, request)


async def send_raw(home: Path, data: bytes) -> bytes:
    stream = await trio.open_unix_socket(str(socket_path(runtime_folder(home), SOCKET_NAME)))
    with trio.fail_after(20):
        async with stream:
            await stream.send_all(data)
            return b"".join([chunk async for chunk in stream])


async def test_a_handler_that_fails_costs_its_request_and_not_the_node(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with node_on(tmp_path):
        with pytest.raises(NodeRefused, match="its log says why"):
            await ask(tmp_path, op="stumble")
        assert "a bug" in caplog.text
        with pytest.raises(NodeRefused, match="you may not") as refusal:
            await ask(tmp_path, op="refuse")
        assert refusal.value.exit_code == AccessError.exit_code
        assert await ask(tmp_path, op="echo", say="still here") == {"said": "still here"}


@pytest.mark.parametrize(
    "line",
    [
        b"not json\n",
        b'{"op": "sing"}\n',
        b'{"op": ["echo"]}\n',
        b"[]\n",
        pytest.param(b"[" * 100_000 + b"\n", id="too deep"),
    ],
)
async def test_no_request_upsets_the_node(tmp_path: Path, line: bytes) -> None:
    async with node_on(tmp_path):
        assert b"does not know this request" in await send_raw(tmp_path, line)
        assert await ask(tmp_path, op="echo", say="still here") == {"said": "still here"}


async def test_an_asker_that_breaks_off_does_not_upset_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(_stream: object) -> bytes:
        raise trio.BrokenResourceError

    async with node_on(tmp_path):
        with monkeypatch.context() as patch:
            patch.setattr(control, "_read_line", broken)
            with contextlib.suppress(trio.BrokenResourceError):  # it hangs up on us too
                await send_raw(tmp_path, b"anything\n")
        assert await ask(tmp_path, op="echo", say="still here") == {"said": "still here"}


def test_where_no_node_runs_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(HomeError, match="no node runs"):
        ask_node(tmp_path, {"op": "status"})


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (None, "did not answer in"),
        (b"", "no proper answer"),
        (b"half a li", "no proper answer"),
        (b"[]\n", "no proper answer"),
    ],
)
def test_a_live_node_that_gives_no_answer_is_not_called_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes | None, said: str
) -> None:
    monkeypatch.setattr(control, "REQUEST_TIMEOUT_S", 0.2)
    path = socket_path(runtime_folder(tmp_path), SOCKET_NAME)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        asked = threading.Event()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                if answer is None:
                    asked.wait(20)
                else:
                    connection.sendall(answer)

        server = threading.Thread(target=serve)
        server.start()
        try:
            with pytest.raises(HomeError, match=said):
                ask_node(tmp_path, {"op": "status"})
        finally:
            asked.set()
            server.join(20)
            path.unlink()


def test_an_invite_that_no_token_can_carry_is_refused() -> None:
    good = {"role": "worker", "lifetime_s": 60, "uses": 1}
    assert parse_invite_request(good) == (Role.WORKER, 60, 1)
    for bad in (
        {"lifetime_s": MAX_INVITE_LIFETIME_S + 1},
        {"lifetime_s": 0},
        {"lifetime_s": float("inf")},
        {"uses": 0},
        {"uses": 65536},
        {"role": "king"},
    ):
        with pytest.raises(UsageError):
            parse_invite_request({**good, **bad})


def test_a_name_is_taken_whole_or_refused() -> None:
    assert node_name("tower") == "tower"
    assert "." not in node_name(None)
    for name in ("a.b", "", "x" * 65, "local", "a b"):
        with pytest.raises(UsageError, match="cannot be a node's name"):
            node_name(name)


# -- what takes long ----------------------------------------------------------------------------


class Long:
    """Work that goes on until it is let go, and tells how far it is."""

    def __init__(self) -> None:
        self.begun, self.let_go, self.ended = trio.Event(), trio.Event(), trio.Event()

    async def __call__(
        self, request: Mapping[str, Any], tell: Callable[[int, int], None]
    ) -> Mapping[str, Any]:
        try:
            tell(1, 2)
            self.begun.set()
            await self.let_go.wait()
            if request.get("fail"):
                raise AccessError("you may not after all")
            return {"done": True}
        finally:
            self.ended.set()


@asynccontextmanager
async def working_node(home: Path, work: Long) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_control_socket, home, HANDLERS, {"long": work})
        yield
        nursery.cancel_scope.cancel()


async def test_long_work_is_followed_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "REQUEST_TIMEOUT_S", 0.5)
    monkeypatch.setattr(control, "FOLLOW_EVERY_S", 0.7)  # it lasts longer than requests may
    work, seen = Long(), trio.Event()
    token = trio.lowlevel.current_trio_token()

    def on_progress(*progress: int) -> None:
        assert progress == (1, 2)
        token.run_sync_soon(seen.set)

    async def let_go() -> None:
        await seen.wait()
        work.let_go.set()

    async with working_node(tmp_path, work), trio.open_nursery() as nursery:
        nursery.start_soon(let_go)
        with trio.fail_after(20):
            follow = partial(follow_node, tmp_path, {"op": "long"}, on_progress)
            assert await trio.to_thread.run_sync(follow) == {"done": True}


async def test_long_work_that_fails_is_told_as_any_other(tmp_path: Path) -> None:
    work = Long()
    work.let_go.set()
    async with working_node(tmp_path, work):
        with pytest.raises(NodeRefused, match="not after all") as refusal:
            await ask(tmp_path, op="long", fail=True)
        assert refusal.value.exit_code == AccessError.exit_code
        assert await ask(tmp_path, op="echo", say="still here") == {"said": "still here"}


async def test_long_work_ends_when_who_asked_hangs_up(tmp_path: Path) -> None:
    work = Long()
    async with working_node(tmp_path, work):
        stream = await trio.open_unix_socket(
            str(socket_path(runtime_folder(tmp_path), SOCKET_NAME))
        )
        with trio.fail_after(20):
            async with stream:
                await stream.send_all(b'{"op": "long"}\n')
                await work.begun.wait()
            await work.ended.wait()
        assert await ask(tmp_path, op="echo", say="still here") == {"said": "still here"}


async def test_a_node_that_says_nothing_for_long_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "FOLLOW_EVERY_S", 1000.0)
    async with working_node(tmp_path, Long()):
        follow = partial(follow_node, tmp_path, {"op": "long"}, lambda _d, _t: None, 0.5)
        with pytest.raises(HomeError, match="did not answer"):
            await trio.to_thread.run_sync(follow)
