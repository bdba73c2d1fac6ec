"""Greedy answers over workers are those of the engine alone, for one architecture after another.

Asked one after another, the computation is the same down to the last bit, wherever its layers lie.
Several users at once, and guessed tokens, change which tokens share a batch, and so the order of
sums: then the tokens are the same as long as no choice was close, which the first test makes sure
of. Attention without flash attention and with a float32 cache keeps what the order of sums changes
small (below BATCH_BOUND). As the engine computes by default, it is up to a hundredth, and 0.2 where
it changes the choice of an expert.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.engine.answers import (
    Answer,
    ask_at_once,
    ask_in_turn,
    embed,
    largest_difference,
)
from tests.engine.architectures import GENERATING, bert
from tests.engine.processes import Running, llama_server, loads, mesh_env, rpc_server
from tests.engine.random_models import FIRST_WORD, WORDS, write_model

pytestmark = pytest.mark.engine

MARGIN = 0.05
"""The least lead of a chosen token, in logits (whose standard deviation is about 8)."""

BATCH_BOUND = 0.01
"""The most that sharing a batch may change a log probability: some 0.00001 for most, but 0.003
where the engine looks GELU up in a table of float16."""

SEEDS = {
    "llama": 5,
    "qwen3": 4,
    "gemma2": 25,
    "gemma3": 35,
    "phi2": 4,
    "phi3": 13,
    "qwen3moe": 4,
    "qwen2moe": 3,
    "gpt-oss": 0,
    "mamba": 9,
    "mamba2": 12,
    "jamba": 12,
    "lfm2": 46,
    "qwen35": 27,
    "deepseek2": 10,
}
"""Found by trying from 0: no close choice, and n-grams that come again, some with the same
continuation and some with another, so that guesses are accepted and refused."""

PROMPTS = [[1, *(FIRST_WORD + index * step % WORDS for index in range(20))] for step in (1, 3, 7)]
SLOTS = ("-np", str(len(PROMPTS)), "-c", str(512 * len(PROMPTS)))
PRECISE = (*SLOTS, "-fa", "off", "-ctk", "f32", "-ctv", "f32")
GUESSES = (
    *("--spec-type", "ngram-simple"),
    *("--spec-ngram-simple-size-n", "2", "--spec-ngram-simple-size-m", "4"),
)
MOST_WORKERS = 3
TEXTS_AT_ONCE = ("-np", "4", "-c", "2048", "--embedding")
"""Upstream's engine aborts with mean pooling and a number of slots that does not divide 512."""


@dataclass(frozen=True)
class Subject:
    """One architecture's model, servers that have its file, what the engine alone answers."""

    model: Path
    workers: list[Running]
    alone: list[Answer]


@pytest.fixture(scope="module", params=GENERATING)
def subject(request: pytest.FixtureRequest, engine_bin: Path) -> Iterator[Subject]:
    name = request.param
    folder = Path(tempfile.mkdtemp(prefix="mesh-", dir="/tmp"))
    model = write_model(folder / "model.gguf", GENERATING[name](), seed=SEEDS[name])
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        with llama_server(engine_bin, folder, model, *PRECISE) as server:
            alone = ask_in_turn(server, PROMPTS)
        workers = [
            stack.enter_context(
                rpc_server(engine_bin, folder, "--gguf", model, name=f"worker{index}")
            )
            for index in range(MOST_WORKERS)
        ]
        yield Subject(model, workers, alone)


def all_read_their_own(folder: Path, workers: list[Running]) -> bool:
    """Each worker has layers, and loaded them from its own file."""
    reports = loads(folder / "report.jsonl")
    return {load.server for load in reports} == {worker.address for worker in workers} and all(
        load.local_tensors > 0 and load.sent_tensors == 0 and load.failures == 0 for load in reports
    )


def tokens(answers: list[Answer]) -> list[tuple[int, ...]]:
    return [answer.tokens for answer in answers]


def test_no_choice_is_close_and_no_answer_like_another(subject: Subject) -> None:
    assert min(min(answer.margins) for answer in subject.alone) > MARGIN
    assert len(set(tokens(subject.alone))) == len(PROMPTS)


@pytest.mark.parametrize("n_workers", [2, 3])
def test_one_after_another_every_probability_is_the_same(
    subject: Subject, engine_bin: Path, folder: Path, n_workers: int
) -> None:
    workers = subject.workers[:n_workers]
    with llama_server(
        engine_bin, folder, subject.model, *PRECISE, rpc=workers, env=mesh_env(folder)
    ) as server:
        assert ask_in_turn(server, PROMPTS) == subject.alone
        together = ask_at_once(server, PROMPTS)
    assert tokens(together) == tokens(subject.alone)
    assert max(map(largest_difference, together, subject.alone)) < BATCH_BOUND
    assert all_read_their_own(folder, workers)


@pytest.mark.parametrize("n_workers", [2, 3])
def test_guessed_tokens_change_nothing(
    subject: Subject, engine_bin: Path, folder: Path, n_workers: int
) -> None:
    workers = subject.workers[:n_workers]
    with llama_server(
        engine_bin, folder, subject.model, *PRECISE, *GUESSES, rpc=workers, env=mesh_env(folder)
    ) as server:
        in_turn = ask_in_turn(server, PROMPTS)
        together = ask_at_once(server, PROMPTS)
    assert tokens(in_turn) == tokens(together) == tokens(subject.alone)
    for answers in (in_turn, together):
        assert 0 < sum(a.accepted for a in answers) < sum(a.drafted for a in answers)
        assert max(map(largest_difference, answers, subject.alone)) < BATCH_BOUND
    assert all_read_their_own(folder, workers)


def test_the_engine_s_defaults_too_give_the_same_probabilities(
    subject: Subject, engine_bin: Path, folder: Path
) -> None:
    """Flash attention where the architecture has any, and a float16 cache."""
    with llama_server(engine_bin, folder, subject.model, *SLOTS) as server:
        alone = ask_in_turn(server, PROMPTS)
    with llama_server(
        engine_bin, folder, subject.model, *SLOTS, rpc=subject.workers, env=mesh_env(folder)
    ) as server:
        assert ask_in_turn(server, PROMPTS) == alone
    assert all_read_their_own(folder, subject.workers)


@pytest.mark.parametrize("subject", ["gemma2", "phi3", "qwen2moe", "jamba"], indirect=True)
def test_a_worker_without_the_file_is_sent_tied_and_duplicated_tensors_too(
    subject: Subject, engine_bin: Path, folder: Path
) -> None:
    """It comes last, and so has the output: for gemma2 the embedding once more."""
    with (
        rpc_server(engine_bin, folder) as without,
        llama_server(
            engine_bin,
            folder,
            subject.model,
            *PRECISE,
            rpc=[subject.workers[0], without],
            env=mesh_env(folder),
        ) as server,
    ):
        assert ask_in_turn(server, PROMPTS) == subject.alone
    sent = {load.server: load.sent_tensors for load in loads(folder / "report.jsonl")}
    assert sent[subject.workers[0].address] == 0
    assert sent[without.address] > 0


@pytest.mark.parametrize("n_workers", [2, 3])
def test_an_encoder_gives_the_same_vectors(engine_bin: Path, folder: Path, n_workers: int) -> None:
    model = write_model(folder / "model.gguf", bert())
    with llama_server(engine_bin, folder, model, *TEXTS_AT_ONCE) as server:
        expected = [embed(server, prompt) for prompt in PROMPTS]
    assert len({tuple(vector) for vector in expected}) == len(PROMPTS)
    with ExitStack() as stack:
        workers = [
            stack.enter_context(
                rpc_server(engine_bin, folder, "--gguf", model, name=f"worker{index}")
            )
            for index in range(n_workers)
        ]
        server = stack.enter_context(
            llama_server(
                engine_bin,
                folder,
                model,
                *TEXTS_AT_ONCE,
                rpc=workers,
                env=mesh_env(folder),
            )
        )
        assert [embed(server, prompt) for prompt in PROMPTS] == expected
    assert all_read_their_own(folder, workers)
