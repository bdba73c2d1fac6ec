"""What GGML_RPC_TRACE says against what was seen on the way, and `mesh trace` of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from meshnode.cli.commands import run as run_mesh
from meshnode.trace.records import Record, Role
from tests.bench.delay_line import Line, Link, delay_line
from tests.bench.rpc_meter import COMMANDS
from tests.engine.processes import (
    N_TOKENS,
    Running,
    greedy_tokens,
    llama_server,
    rpc_server,
)
from tests.meshnode.trace.test_records import read

pytestmark = pytest.mark.engine

TRACE_VARIABLE = "GGML_RPC_TRACE"
WORKERS = 2


def records_of(path: Path, role: Role) -> list[Record]:
    reader, (header, *records) = read(path.read_bytes())
    assert not isinstance(header, Record)
    assert header.role is role
    assert reader.broken_lines == 0
    return [record for record in records if isinstance(record, Record)]


def sent_of(records: list[Record]) -> tuple[int, int]:
    sends = [record.size_bytes for record in records if record.event == "send"]
    return len(sends), sum(sends)


@pytest.fixture
def traced(engine_bin: Path, folder: Path, model: Path) -> Iterator[tuple[list[Path], Line]]:
    """A run over: the client's and the servers' traces, and what saw all of it on the way."""
    paths = [folder / name for name in ("client.tsv", "w0.tsv", "w1.tsv")]
    with ExitStack() as stack:
        workers = [
            stack.enter_context(
                rpc_server(engine_bin, folder, name=f"w{at}", env={TRACE_VARIABLE: str(path)})
            )
            for at, path in enumerate(paths[1:])
        ]
        links = [
            Link(f"unix:{folder}/line{at}.sock", worker.address)
            for at, worker in enumerate(workers)
        ]
        line = stack.enter_context(delay_line(*links))
        ends = [
            Running(worker.process, address, worker.log_path)
            for worker, address in zip(workers, line.addresses, strict=True)
        ]
        env = {TRACE_VARIABLE: str(paths[0])}
        with llama_server(engine_bin, folder, model, rpc=ends, env=env) as server:
            greedy_tokens(server)
        yield paths, line


def test_the_client_tells_of_each_message_that_was_seen_on_the_way(
    traced: tuple[list[Path], Line],
) -> None:
    (client, *_), line = traced
    records = records_of(client, Role.CLIENT)
    messages, size_bytes = sent_of(records)
    seen = line.final_counts()
    assert (seen.total.requests, seen.total.up_bytes) == (messages, size_bytes)
    replies = [record.size_bytes for record in records if record.event == "reply"]
    assert (seen.total.replies, seen.total.down_bytes) == (len(replies), sum(replies))
    told = Counter(record.command for record in records if record.event == "send")
    known = {command.name for command in COMMANDS.values()}
    by_name = {name: tally.requests for name, tally in seen.commands.items() if name in known}
    assert {name: told[name] for name in by_name} == by_name
    written = [record.size_bytes for record in records if record.event == "write"]
    assert sum(written) == size_bytes, "the system calls carried all of it"


def test_each_server_tells_of_the_messages_that_the_client_sent_it(
    traced: tuple[list[Path], Line],
) -> None:
    (client, *servers), _ = traced
    sent = [record for record in records_of(client, Role.CLIENT) if record.event == "send"]
    by_conn: dict[int, dict[int, str]] = {}
    for record in sent:
        by_conn.setdefault(record.conn, {})[record.seq] = record.command
    for path in servers:
        served: dict[int, dict[int, str]] = {}
        for record in records_of(path, Role.SERVER):
            if record.event == "serve":
                served.setdefault(record.conn, {})[record.seq] = record.command
        assert served
        for commands in served.values():
            assert any(commands.items() <= conn.items() for conn in by_conn.values())


def test_the_tokens_are_there_and_each_took_one_wait(
    traced: tuple[list[Path], Line], capsys: pytest.CaptureFixture[str]
) -> None:
    paths, _ = traced
    assert run_mesh(["trace", "--json", *map(str, paths)]) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert facts["decodes"] >= N_TOKENS
    assert facts["typical"]["batch"] == 1
    assert facts["typical"]["round_trips"] <= WORKERS
    assert len(facts["hops"]) == WORKERS, "each worker's connection found its other end"
    assert all(ways["there_ns"] >= 0 for ways in facts["hops"].values())
    split = facts["shown"]["split"]
    assert sum(split.values()) == facts["shown"]["length_ns"]
    assert split["workers_ns"] > 0


def test_a_real_run_is_drawn(
    traced: tuple[list[Path], Line], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, _ = traced
    svg = folder / "out.svg"
    for wish in ([], ["--load"], ["--token", "1"]):
        assert run_mesh(["trace", "--svg", str(svg), *wish, *map(str, paths)]) == 0
        shown = capsys.readouterr().out
        assert "0 unix:/" in shown
        assert max(len(line) for line in shown.splitlines() if line[:5] != "note:") <= 100
        words = "".join(ElementTree.parse(svg).getroot().itertext())
        assert "worker computes" in words
