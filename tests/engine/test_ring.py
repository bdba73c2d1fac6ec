"""Workers that push to each other (patch 16): the same answers, one round trip a token, no hang."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from meshnode.trace.records import Record
from tests.engine.answers import Answer, ask_at_once, ask_in_turn
from tests.engine.processes import Running, greedy_tokens, llama_server
from tests.engine.ring import Joint, Ring, ring_of, write_ring
from tests.engine.synthetic import make_model
from tests.engine.wire_trace import count, decodes, depth, read_trace, within

pytestmark = pytest.mark.engine

LAYERS = 6
WIDTH = 256
PROMPTS = [[3, 260, 261], list(range(260, 300)), [3, *range(400, 407)]]
END_LIMIT_S = 45.0
"""30 s for a joint that may come back, and what it takes to notice."""


@pytest.fixture(scope="module")
def six_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "six.gguf"
    return make_model(path, layers=LAYERS, width=WIDTH, seed=5)


@pytest.fixture(scope="module")
def expected(
    engine_bin: Path, six_layers: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Answer]:
    with llama_server(engine_bin, tmp_path_factory.mktemp("alone"), six_layers) as server:
        return ask_in_turn(server, PROMPTS)


@contextmanager
def served(
    engine_bin: Path, folder: Path, model: Path, ring: Ring, *arguments: str, **env: str
) -> Iterator[tuple[Running, Path]]:
    """A llama-server over the ring, and the path of its trace."""
    trace = folder / "client.trace"
    ring_file = str(folder / "ring")
    with llama_server(
        engine_bin,
        folder,
        model,
        *arguments,
        rpc=ring.workers,
        env={"GGML_RPC_TRACE": str(trace), "GGML_RPC_MESH_RING": ring_file, **env},
    ) as server:
        yield server, trace


def connections_asked(events: list[Record]) -> set[int]:
    return {event.conn for event in events if (event.event, event.command) == ("send", "GET")}


@pytest.mark.parametrize("n_workers", [2, 3])
def test_what_workers_push_changes_no_probability_and_costs_one_round_trip(
    engine_bin: Path, folder: Path, six_layers: Path, expected: list[Answer], n_workers: int
) -> None:
    with ring_of(engine_bin, folder, n_workers, "--gguf", six_layers) as ring:
        write_ring(folder / "ring", ring.workers)
        with served(engine_bin, folder, six_layers, ring) as (server, trace):
            assert ask_in_turn(server, PROMPTS) == expected
    events = read_trace(trace)
    assert connections_asked(events) == {n_workers - 1}
    batches = decodes(events)
    assert {depth(within(events, batch.t_ns, batch.end_ns)) for batch in batches} == {1}
    assert count(events, "send", "PUSH") == count(events, "send", "TAKE") >= (n_workers - 1) * 96
    for index, path in enumerate(ring.traces):
        events = read_trace(path)
        assert any(event.event == "push" for event in events) == (index < n_workers - 1)
        assert any(event.event == "take" for event in events) == (index > 0)
    assert all(joint.copied_bytes > 96 * 4 * WIDTH for joint in ring.joints)


def test_slots_that_share_batches_give_the_same_tokens(
    engine_bin: Path, folder: Path, six_layers: Path, expected: list[Answer]
) -> None:
    slots = ["-np", "3", "-c", "768", "-kvu"]
    with ring_of(engine_bin, folder, 3, "--gguf", six_layers) as ring:
        write_ring(folder / "ring", ring.workers)
        with served(engine_bin, folder, six_layers, ring, *slots) as (server, _):
            for _ in range(2):
                answers = ask_at_once(server, PROMPTS)
                assert [a.tokens for a in answers] == [a.tokens for a in expected]


def test_a_ring_may_close_while_answers_are_given(
    engine_bin: Path, folder: Path, six_layers: Path, expected: list[Answer]
) -> None:
    with (
        ring_of(engine_bin, folder, 2, "--gguf", six_layers) as ring,
        served(engine_bin, folder, six_layers, ring) as (server, trace),
    ):
        assert ask_in_turn(server, PROMPTS) == expected
        assert ring.joints[0].copied_bytes == len(b"meshpsh1")
        write_ring(folder / "ring", ring.workers)
        assert ask_in_turn(server, PROMPTS) == expected
    events = read_trace(trace)
    assert connections_asked(events) == {0, 1}
    assert connections_asked(within(events, decodes(events)[-20].t_ns, 2**63)) == {1}


def test_another_client_after_one_that_was_killed_takes_nothing_of_its(
    engine_bin: Path, folder: Path, six_layers: Path, expected: list[Answer]
) -> None:
    with ring_of(engine_bin, folder, 2, "--gguf", six_layers) as ring:
        write_ring(folder / "ring", ring.workers)
        for _ in range(3):
            with (
                served(engine_bin, folder, six_layers, ring) as (server, _),
                an_answer(server) as tokens,
            ):
                next(tokens)
                server.process.kill()
                server.process.wait()
        with served(engine_bin, folder, six_layers, ring) as (server, _):
            assert ask_in_turn(server, PROMPTS) == expected


@contextmanager
def an_answer(server: Running) -> Iterator[Iterator[list[int]]]:
    """The tokens of a long answer as they come."""
    body = {"prompt": PROMPTS[0], "n_predict": 5000, "ignore_eos": True, "stream": True}
    transport = httpx.HTTPTransport(uds=server.address)
    with (
        httpx.Client(transport=transport, timeout=END_LIMIT_S) as client,
        client.stream("POST", "http://engine/completion", json=body) as reply,
    ):
        yield (
            json.loads(line.removeprefix("data: "))["tokens"]
            for line in reply.iter_lines()
            if line.startswith("data: ")
        )


@pytest.mark.parametrize("comes_back", [False, True])
def test_a_joint_that_dies_in_an_answer_ends_it_within_bounds(
    engine_bin: Path, folder: Path, six_layers: Path, expected: list[Answer], comes_back: bool
) -> None:
    with ring_of(engine_bin, folder, 2, "--gguf", six_layers) as ring:
        write_ring(folder / "ring", ring.workers)
        with served(engine_bin, folder, six_layers, ring, "-c", "8192") as (server, _):
            with an_answer(server) as tokens:
                next(tokens)
                ring.joints[0].cut()
                begun = time.monotonic()
                if comes_back:
                    ring.joints.append(Joint(*ring.workers))
                with pytest.raises(httpx.TransportError):
                    list(tokens)
            server.process.wait(END_LIMIT_S)
            assert time.monotonic() - begun < END_LIMIT_S
        assert all(worker.alive for worker in ring.workers)
        if not comes_back:
            ring.joints.append(Joint(*ring.workers))
        with served(engine_bin, folder, six_layers, ring) as (server, _):
            assert ask_in_turn(server, PROMPTS) == expected


@pytest.mark.parametrize("n_workers", [1, 4])
def test_from_the_start_to_readiness_eight_round_trips_follow_one_another(
    engine_bin: Path, folder: Path, six_layers: Path, n_workers: int
) -> None:
    with ring_of(engine_bin, folder, n_workers, "--gguf", six_layers) as ring:
        write_ring(folder / "ring", ring.workers)
        with served(engine_bin, folder, six_layers, ring, "--warmup") as (server, trace):
            greedy_tokens(server)
    events = read_trace(trace)
    batches = decodes(events)
    first_prompt = next(at for at, batch in enumerate(batches) if batch.size_bytes > 2)
    ready = within(events, 0, batches[first_prompt].t_ns)
    assert depth(ready) <= 8
    # the batches that are computed before: one round trip each
    assert depth(ready) == 5 + first_prompt


def test_an_output_layer_at_home_has_the_last_worker_return_a_row_of_numbers(
    engine_bin: Path, folder: Path, six_layers: Path, expected: list[Answer]
) -> None:
    with ring_of(engine_bin, folder, 3, "--gguf", six_layers) as ring:
        write_ring(folder / "ring", ring.workers)
        with served(engine_bin, folder, six_layers, ring, GGML_RPC_MESH_OUTPUT="CPU") as (
            server,
            trace,
        ):
            assert ask_in_turn(server, PROMPTS) == expected
    events = read_trace(trace)
    for batch in decodes(events)[-20:]:
        replies = [e for e in within(events, batch.t_ns, batch.end_ns) if e.event == "reply"]
        assert [(e.command, e.conn, e.size_bytes) for e in replies] == [("GET", 2, 4 * WIDTH + 8)]
