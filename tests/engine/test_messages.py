"""Few system calls, each with all there is to say (patches 2 and 10), as strace sees it."""

from __future__ import annotations

import os
import re
import select
import shutil
from pathlib import Path

import pytest

from tests.conftest import require
from tests.engine.processes import N_TOKENS, greedy_tokens, llama_server, rpc_server
from tests.engine.rpc_client import DATA

pytestmark = pytest.mark.engine

CALL = re.compile(r"\b(sendmsg|sendto|writev)\((\d+)<UNIX-STREAM:\[(\d+).*\) += (\d+)$")
PARTS = re.compile(r"iov_len=(\d+)")
TRACE_LIMIT_S = 10.0
GET_BYTES = 9 + DATA.size
FREE_BYTES = 9 + 8  # a buffer, at the end


class Straces:
    """I run programs under strace, and know when the last one's trace is written."""

    def __init__(self) -> None:
        strace = shutil.which("strace")
        require("strace", strace is not None, "not installed: apt install strace")
        self._strace = str(strace)
        # A tracer is no child of ours, but inherits this end and has it until it ends.
        self._last_end, self.inherited = os.pipe()

    def wrapper(self, out: Path) -> list[str]:
        # -D: the traced process stays our child, the tracer ends with it
        options = ("-D", "-f", "-yy", "-s", "16", "-e", "trace=%network,writev")
        return [self._strace, *options, "-o", str(out)]

    def wait(self) -> None:
        os.close(self.inherited)
        ended, _, _ = select.select([self._last_end], [], [], TRACE_LIMIT_S)
        os.close(self._last_end)
        assert ended, "a tracer does not end"


def _rpc_calls(trace: Path, socket_name: str) -> list[tuple[str, str, int]]:
    """(call, line, bytes sent) of every send on a connection to or from the RPC socket."""
    text = trace.read_text(errors="replace")
    assert text.rstrip().endswith("+++"), "the trace has no end"
    # a client's end has no name: know it by the inode it connected with
    ours = set(re.findall(rf"connect\(\d+<UNIX-STREAM:\[(\d+)\]>.*{socket_name}", text))
    calls = []
    for line in text.splitlines():
        found = CALL.search(line)
        if found and (f'{socket_name}"]>' in line or found[3] in ours):
            calls.append((found[1], line, int(found[4])))
    return calls


def test_a_token_leaves_in_one_call_and_comes_back_in_one(
    engine_bin: Path, folder: Path, model: Path
) -> None:
    client_trace, server_trace = folder / "client.strace", folder / "server.strace"
    straces = Straces()
    inherited = (straces.inherited,)
    with (
        rpc_server(
            engine_bin, folder, wrapper=straces.wrapper(server_trace), pass_fds=inherited
        ) as worker,
        llama_server(
            *(engine_bin, folder, model),
            rpc=[worker],
            wrapper=straces.wrapper(client_trace),
            pass_fds=inherited,
        ) as server,
    ):
        assert greedy_tokens(server)
    straces.wait()
    requests = _rpc_calls(client_trace, "rpc.sock")
    replies = _rpc_calls(server_trace, "rpc.sock")
    # what the graph needs, the graph's number and the question for its result leave together
    assert len(replies) > N_TOKENS
    steps = [sent for _, _, sent in requests if sent != FREE_BYTES][-N_TOKENS + 1 :]
    assert all(sent > GET_BYTES for sent in steps)
    for call, line, sent in replies:
        parts = [int(length) for length in PARTS.findall(line)]
        assert call == "sendmsg", line
        assert parts[0] == 8, line
        assert sent == sum(parts), line
