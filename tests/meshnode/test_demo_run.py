"""The demo's words and its ends, without an engine: what it does with one is tests/e2e's."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from meshnode.demo import run
from meshnode.demo.nodes import NodeFailed, NodeProcess, without_tokens
from meshnode.demo.run import Greedy, Outcome, fetch_status, greedy, stream_answer, summary
from meshnode.engine.children import open_child

NOTICE_S = 20


def test_a_node_without_a_layer_is_said_to_have_none() -> None:
    greedy = Greedy((1, 2), 9.0, 0.0)
    shares: tuple[dict[str, Any], ...] = (
        {"node": "local", "first": 0, "last": 0, "output": False},
        {"node": "worker", "first": 0, "last": 8, "output": True},
    )
    lines = summary(Outcome("an answer", shares, 0, greedy, greedy)).splitlines()
    assert lines[:2] == ["layers on local: none", "layers on worker: 0-7 and output"]


def test_invites_are_cut_out_of_what_is_shown() -> None:
    token = "mesh1" + "q7z" * 80
    shown = without_tokens(f'{{"line": "mesh serve join={token}"}} {token.upper()}')
    assert shown == '{"line": "mesh serve join=mesh1…"} mesh1…'
    assert without_tokens("mesh 1.0 listens") == "mesh 1.0 listens"


async def ask(url: str) -> None:
    await stream_answer(url, "Who?", lambda _part: None)


@pytest.mark.parametrize("call", [ask, greedy, fetch_status])
async def test_an_endpoint_that_is_gone_is_a_sentence(
    call: Callable[[str], Awaitable[object]],
) -> None:
    with socket.socket() as taken:  # bound and not listening: every connection is refused
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(NodeFailed, match="did not answer"):
            await call(f"http://127.0.0.1:{taken.getsockname()[1]}")


@pytest.mark.parametrize("victim", ["worker", "orchestrator"])
async def test_the_demo_that_stays_ends_with_either_node(
    victim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @asynccontextmanager
    async def open_sleeper(name: str) -> AsyncIterator[NodeProcess]:
        argv = [sys.executable, "-c", "import signal; signal.pause()"]
        async with open_child(argv, env={}, log=tmp_path / name, name=name) as child:
            node = NodeProcess(name)
            node._child = child
            yield node

    @asynccontextmanager
    async def open_mesh(
        _folder: Path, *, http: str
    ) -> AsyncIterator[tuple[NodeProcess, NodeProcess, str]]:
        async with open_sleeper("worker") as worker, open_sleeper("orchestrator") as orchestrator:
            nodes = {"worker": worker, "orchestrator": orchestrator}
            os.kill(nodes[victim].pid, signal.SIGKILL)
            yield worker, orchestrator, f"http://{http}"

    monkeypatch.setattr(run, "open_mesh", open_mesh)
    with trio.fail_after(NOTICE_S), pytest.raises(NodeFailed, match=f"'{victim}' was killed"):
        await run.stay("127.0.0.1:1", lambda _text: None)
