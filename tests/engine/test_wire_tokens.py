"""What is said once, as changes or by number (patches 14, 15): the same answers, and said once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.engine.answers import ask_at_once, ask_in_turn, embed
from tests.engine.processes import Running, llama_server, rpc_servers
from tests.engine.wire_trace import count, decodes, depth, read_trace, within

pytestmark = pytest.mark.engine

PROMPTS = [[3, 260], list(range(260, 275)), [*range(280, 340)], [3, 400, 401, 402]]
LONG_ANSWER = 300


@contextmanager
def served(
    engine_bin: Path, folder: Path, model: Path, n_workers: int, *arguments: str
) -> Iterator[tuple[Running, Path]]:
    """A llama-server over so many workers that read the model themselves, and its trace's path."""
    trace = folder / "client.trace"
    env = {"GGML_RPC_TRACE": str(trace)}
    with (
        rpc_servers(engine_bin, folder, model, n_workers) as workers,
        llama_server(engine_bin, folder, model, *arguments, rpc=workers, env=env) as server,
    ):
        yield server, trace


@pytest.mark.parametrize("n_workers", [1, 2])
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["-ub", "32"], id="batches of 32"),
        pytest.param(["-fa", "on", "-ctk", "q8_0", "-ctv", "q8_0"], id="attention of quantized"),
        pytest.param(["-fa", "off"], id="masks of float32"),
        pytest.param(["-kvu", "-np", "4", "-c", "1024"], id="four slots"),
    ],
)
def test_batches_of_any_size_in_turn_give_the_same_probabilities(
    engine_bin: Path, folder: Path, model: Path, arguments: list[str], n_workers: int
) -> None:
    with llama_server(engine_bin, folder, model, *arguments, name="alone") as server:
        expected = ask_in_turn(server, PROMPTS * 2)
    with served(engine_bin, folder, model, n_workers, *arguments) as (server, _):
        assert ask_in_turn(server, PROMPTS * 2) == expected


def test_slots_that_work_at_once_each_get_their_tokens(
    engine_bin: Path, folder: Path, model: Path
) -> None:
    slots = ["-np", "4", "-c", "1024"]
    with llama_server(engine_bin, folder, model, *slots, name="alone") as server:
        expected = [answer.tokens for answer in ask_in_turn(server, PROMPTS)]
    with served(engine_bin, folder, model, 2, *slots) as (server, _):
        for _ in range(3):
            assert [answer.tokens for answer in ask_at_once(server, PROMPTS)] == expected


def long_answer(server: Running) -> list[int]:
    body = {"prompt": PROMPTS[1], "n_predict": LONG_ANSWER, "temperature": 0, "ignore_eos": True}
    transport = httpx.HTTPTransport(uds=server.address)
    with httpx.Client(transport=transport, timeout=60) as client:
        reply = client.post("http://engine/completion", json={**body, "return_tokens": True})
    tokens: list[int] = reply.raise_for_status().json()["tokens"]
    return tokens


def test_a_context_that_is_shifted_is_shifted_there_too(
    engine_bin: Path, folder: Path, model: Path
) -> None:
    shifted = ["--context-shift", "-c", "128"]
    with llama_server(engine_bin, folder, model, *shifted, name="alone") as server:
        expected = long_answer(server)
    with served(engine_bin, folder, model, 2, *shifted) as (server, _):
        assert long_answer(server) == expected
        assert "slot context shift" in server.log
    assert len(expected) == LONG_ANSWER


def test_embeddings_are_the_same_numbers(engine_bin: Path, folder: Path, model: Path) -> None:
    pooled = ["--embeddings", "--pooling", "mean"]
    with llama_server(engine_bin, folder, model, *pooled, name="alone") as server:
        expected = [embed(server, prompt) for prompt in PROMPTS]
    with served(engine_bin, folder, model, 2, *pooled) as (server, _):
        for _ in range(2):
            assert [embed(server, prompt) for prompt in PROMPTS] == expected


def test_a_graph_is_sent_once_for_each_shape_however_they_alternate(
    engine_bin: Path, folder: Path, model: Path
) -> None:
    with served(engine_bin, folder, model, 2) as (server, trace):
        ask_in_turn(server, PROMPTS)
        ask_in_turn(server, PROMPTS * 2)
    events = read_trace(trace)
    batches = decodes(events)
    shapes = {batch.size_bytes for batch in batches}
    a_round = (len(batches) - 1) // 3  # the first is llama-server's own
    assert count(events, "send", "GRAPH") <= 2 * (len(shapes) + 1)
    later = within(events, batches[1 + a_round].t_ns, 2**63)
    assert count(later, "send", "GRAPH") == 0
    assert count(later, "send", "TENSOR") == 0
    assert count(later, "send", "GRAPH_AGAIN") == 2 * 2 * a_round


@pytest.mark.parametrize("n_workers", [1, 4])
def test_a_token_waits_once_for_each_worker(
    engine_bin: Path, folder: Path, model: Path, n_workers: int
) -> None:
    with served(engine_bin, folder, model, n_workers) as (server, trace):
        ask_in_turn(server, PROMPTS[:1])
    events = read_trace(trace)
    for batch in decodes(events)[-20:]:
        of_token = within(events, batch.t_ns, batch.end_ns)
        waits = [event for event in of_token if event.event == "wait"]
        assert [wait.command for wait in waits] == ["GET"] * n_workers
        assert depth(of_token) == n_workers
    before = within(events, 0, decodes(events)[0].t_ns)
    assert depth(before) == 5  # for one as for four


def test_what_did_not_change_is_not_sent(engine_bin: Path, folder: Path, model: Path) -> None:
    context = 4096
    with served(engine_bin, folder, model, 1, "-c", str(context)) as (server, trace):
        ask_in_turn(server, PROMPTS[2:3])
    events = read_trace(trace)
    batch = decodes(events)[-2]
    sent = [e for e in within(events, batch.t_ns, batch.end_ns) if e.event == "send"]
    inputs = [event.size_bytes for event in sent if event.command == "INPUT"]
    embedding = 4 * 256
    # positions, rows and the mask beside the token itself: tens of bytes each
    assert max(inputs) == embedding + 9 + 21
    assert sum(inputs) - max(inputs) < 400
