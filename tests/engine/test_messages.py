"""Few system calls, each with all there is to say (patches 2 and 10), as strace sees it."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

import pytest

from tests.conftest import require
from tests.engine.processes import (
    N_TOKENS,
    POLL_INTERVAL_S,
    greedy_tokens,
    llama_server,
    rpc_server,
)
from tests.engine.rpc_client import DATA

pytestmark = pytest.mark.engine

CALL = re.compile(r"\b(sendmsg|sendto|writev)\((\d+)<UNIX-STREAM:\[(\d+).*\) += (\d+)$")
PARTS = re.compile(r"iov_len=(\d+)")
TRACE_LIMIT_S = 10.0
GET_BYTES = 9 + DATA.size
FREE_BYTES = 9 + 8  # a buffer, at the end


def _strace(out: Path) -> list[str]:
    strace = shutil.which("strace")
    require("strace", strace is not None, "not installed: apt install strace")
    # -D: the traced process stays our child, the tracer ends with it
    return [
        str(strace),
        "-D",
        "-f",
        "-yy",
        "-s",
        "16",
        "-o",
        str(out),
        "-e",
        "trace=%network,writev",
    ]


def _finished(trace: Path) -> list[str]:
    """The trace's lines, once the tracer has written the last one."""
    deadline = time.monotonic() + TRACE_LIMIT_S
    while time.monotonic() < deadline:
        lines = trace.read_text(errors="replace").splitlines()
        if lines and "+++" in lines[-1]:
            return lines
        time.sleep(POLL_INTERVAL_S)
    raise TimeoutError(f"the trace has no end: {lines[-3:]}")


def _rpc_calls(lines: list[str], socket_name: str) -> list[tuple[str, str, int]]:
    """(call, line, bytes sent) of every send on a connection to or from the RPC socket."""
    text = "\n".join(lines)
    # a client's end has no name: know it by the inode it connected with
    ours = set(re.findall(rf"connect\(\d+<UNIX-STREAM:\[(\d+)\]>.*{socket_name}", text))
    calls = []
    for line in lines:
        found = CALL.search(line)
        if found and (f'{socket_name}"]>' in line or found[3] in ours):
            calls.append((found[1], line, int(found[4])))
    return calls


def test_a_token_leaves_in_one_call_and_comes_back_in_one(
    engine_bin: Path, folder: Path, model: Path
) -> None:
    client_trace, server_trace = folder / "client.strace", folder / "server.strace"
    with (
        rpc_server(engine_bin, folder, wrapper=_strace(server_trace)) as worker,
        llama_server(
            engine_bin, folder, model, rpc=[worker], wrapper=_strace(client_trace)
        ) as server,
    ):
        assert greedy_tokens(server)
    requests = _rpc_calls(_finished(client_trace), "rpc.sock")
    replies = _rpc_calls(_finished(server_trace), "rpc.sock")
    # what the graph needs, the graph's number and the question for its result leave together
    assert len(replies) > N_TOKENS
    steps = [sent for _, _, sent in requests if sent != FREE_BYTES][-N_TOKENS + 1 :]
    assert all(sent > GET_BYTES for sent in steps)
    for call, line, sent in replies:
        parts = [int(length) for length in PARTS.findall(line)]
        assert call == "sendmsg", line
        assert parts[0] == 8, line
        assert sent == sum(parts), line
