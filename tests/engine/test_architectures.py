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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import pytest

from meshnode.models.facts import read_facts
from meshnode.pipeline.speculation import Circumstances, choose_speculation
from tests.engine.answers import (
    Answer,
    ask_at_once,
    ask_in_turn,
    embed,
    largest_difference,
)
from tests.engine.architectures import GENERATING, bert
from tests.engine.processes import Running, llama_server, loads, mesh_env, rpc_server, rpc_servers
from tests.engine.random_models import WORDS, write_model
from tests.engine.ring import Joint, joined, push_arguments, write_ring
from tests.engine.vocabulary import FIRST_WORD

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
LONG_PROMPTS = [
    [1, *(FIRST_WORD + index * step % WORDS for index in range(400))] for step in (1, 7)
]
PIECES = ("-c", "1024", "--ubatch-size", "128")
MOST_WORKERS = 3
OUTPUT_VARIABLE = "GGML_RPC_MESH_OUTPUT"
RING_VARIABLE = "GGML_RPC_MESH_RING"
DTYPE_VARIABLE = "GGML_RPC_MESH_WIRE_DTYPE"
NARROW_BOUNDS = {"f16": 0.1, "q8": 2.0}
"""The most that fewer bits may change the log probabilities of the best first tokens."""
TEXTS_AT_ONCE = ("-np", "4", "-c", "2048", "--embedding")
"""Upstream's engine aborts with mean pooling and a number of slots that does not divide 512."""


@dataclass(frozen=True)
class Subject:
    """One architecture's model, servers that have its file, what the engine alone answers."""

    model: Path
    workers: list[Running]
    alone: list[Answer]


@dataclass(frozen=True)
class Way:
    """How a model lies over workers, and how activations travel between them."""

    n_workers: int
    output_at_home: bool = False
    ring: bool = False
    dtype: str | None = None
    """Of activations on the wire; None: as they are computed."""

    def __str__(self) -> str:
        home = " output at home" if self.output_at_home else ""
        dtype = f" {self.dtype}" if self.dtype else ""
        return f"{self.n_workers} workers{' in a ring' if self.ring else ''}{home}{dtype}"


@contextmanager
def over_workers(
    engine_bin: Path, folder: Path, subject: Subject, way: Way, *arguments: str
) -> Iterator[Running]:
    """A llama-server with that model's layers on workers that read all they need from its file."""
    workers = subject.workers[: way.n_workers]
    env = mesh_env(folder)
    joints: list[Joint] = []
    with ExitStack() as stack:
        if way.output_at_home:
            env[OUTPUT_VARIABLE] = "CPU"
        if way.ring:
            joints = stack.enter_context(joined(workers))
            env[RING_VARIABLE] = str(write_ring(folder / "ring", workers))
        if way.dtype:
            env[DTYPE_VARIABLE] = way.dtype
        yield stack.enter_context(
            llama_server(engine_bin, folder, subject.model, *arguments, rpc=workers, env=env)
        )
        assert all(joint.copied_bytes > 0 for joint in joints)
    reports = loads(folder / "report.jsonl")
    assert {load.server for load in reports} == {worker.address for worker in workers}
    assert all(load.sent_tensors == load.failures == 0 for load in reports)
    assert sum(load.local_bytes for load in reports) == lent_bytes(subject.model, way)


def lent_bytes(model: Path, way: Way) -> int:
    """What the workers hold of a file: the layers, what all layers share once each, the output."""
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(model).tensors}
    layers = sum(size for name, size in sizes.items() if name.startswith("blk."))
    shared = sum(size for name, size in sizes.items() if name.startswith("rope_factors"))
    output = sum(size for name, size in sizes.items() if name.startswith(("output", "token_embd_")))
    if "output.weight" not in sizes:
        output += sizes["token_embd.weight"]
    return layers + way.n_workers * shared + (0 if way.output_at_home else output)


@pytest.fixture(scope="module", params=GENERATING)
def subject(request: pytest.FixtureRequest, engine_bin: Path) -> Iterator[Subject]:
    name = request.param
    folder = Path(tempfile.mkdtemp(prefix="mesh-", dir="/tmp"))
    model = write_model(folder / "model.gguf", GENERATING[name](), seed=SEEDS[name])
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        with llama_server(engine_bin, folder, model, *PRECISE) as server:
            alone = ask_in_turn(server, PROMPTS)
        yield Subject(model, start_workers(stack, engine_bin, folder, model), alone)


def start_workers(stack: ExitStack, engine_bin: Path, folder: Path, model: Path) -> list[Running]:
    """Servers that have the model's file; they can be in a ring."""
    found = []
    for index in range(MOST_WORKERS):
        name = f"worker{index}"
        pushes = push_arguments(folder, name)
        server = rpc_server(engine_bin, folder, "--gguf", model, *pushes, name=name)
        found.append(stack.enter_context(server))
    return found


def tokens(answers: list[Answer]) -> list[tuple[int, ...]]:
    return [answer.tokens for answer in answers]


def test_no_choice_is_close_and_no_answer_like_another(subject: Subject) -> None:
    assert min(min(answer.margins) for answer in subject.alone) > MARGIN
    assert len(set(tokens(subject.alone))) == len(PROMPTS)


@pytest.mark.parametrize("way", [Way(2), Way(3), Way(3, ring=True)], ids=str)
def test_one_after_another_every_probability_is_the_same(
    subject: Subject, engine_bin: Path, folder: Path, way: Way
) -> None:
    with over_workers(engine_bin, folder, subject, way, *PRECISE) as server:
        assert ask_in_turn(server, PROMPTS) == subject.alone
        together = ask_at_once(server, PROMPTS)
    assert tokens(together) == tokens(subject.alone)
    assert max(map(largest_difference, together, subject.alone)) < BATCH_BOUND


@pytest.mark.parametrize("subject", ["llama", "gemma2", "lfm2", "deepseek2"], indirect=True)
def test_an_output_layer_at_home_gives_the_same_probabilities(
    subject: Subject, engine_bin: Path, folder: Path
) -> None:
    """Two of these have an output of their own, two take the embedding for it."""
    way = Way(2, output_at_home=True)
    with over_workers(engine_bin, folder, subject, way, *PRECISE) as server:
        assert ask_in_turn(server, PROMPTS) == subject.alone


@pytest.mark.parametrize("way", [Way(2), Way(3), Way(3, output_at_home=True, ring=True)], ids=str)
def test_guessed_tokens_change_nothing(
    subject: Subject, engine_bin: Path, folder: Path, way: Way
) -> None:
    with over_workers(engine_bin, folder, subject, way, *PRECISE, *GUESSES) as server:
        in_turn = ask_in_turn(server, PROMPTS)
        together = ask_at_once(server, PROMPTS)
    assert tokens(in_turn) == tokens(together) == tokens(subject.alone)
    for answers in (in_turn, together):
        assert 0 < sum(a.accepted for a in answers) < sum(a.drafted for a in answers)
        assert max(map(largest_difference, answers, subject.alone)) < BATCH_BOUND


@pytest.mark.parametrize(
    "subject", ["llama", "gemma3", "gpt-oss", "qwen35", "deepseek2"], indirect=True
)
def test_the_engine_s_defaults_too_give_the_same_probabilities(
    subject: Subject, engine_bin: Path, folder: Path
) -> None:
    """Flash attention where the architecture has any, and a float16 cache."""
    with llama_server(engine_bin, folder, subject.model, *SLOTS) as server:
        alone = ask_in_turn(server, PROMPTS)
    with over_workers(engine_bin, folder, subject, Way(3), *SLOTS) as server:
        assert ask_in_turn(server, PROMPTS) == alone


@pytest.mark.parametrize("subject", ["qwen3", "gemma2", "gemma3", "phi2"], indirect=True)
@pytest.mark.parametrize("way", [Way(2, output_at_home=True), Way(3, ring=True)], ids=str)
def test_what_mesh_has_guessed_changes_nothing(
    subject: Subject, engine_bin: Path, folder: Path, way: Way
) -> None:
    """With the options that `--speculate auto` picks for them. The others' answers are too short
    for four tokens to come again."""
    found = Circumstances(read_facts(subject.model), False, 1, False, ())
    picked = choose_speculation("auto", found, None)
    with over_workers(engine_bin, folder, subject, way, *PRECISE, *picked.options) as server:
        answers = ask_in_turn(server, PROMPTS)
    assert tokens(answers) == tokens(subject.alone)
    assert 0 < sum(a.accepted for a in answers) < sum(a.drafted for a in answers)


@pytest.mark.parametrize(
    "subject", ["llama", "gemma3", "gpt-oss", "qwen3moe", "jamba", "deepseek2"], indirect=True
)
@pytest.mark.parametrize("way", [Way(2), Way(3, ring=True)], ids=str)
def test_a_long_prompt_in_pieces_gives_what_the_same_pieces_give_alone(
    subject: Subject, engine_bin: Path, folder: Path, way: Way
) -> None:
    """While one worker has a piece, the next has the one before."""
    with llama_server(engine_bin, folder, subject.model, *PIECES) as server:
        alone = ask_in_turn(server, LONG_PROMPTS)
    with over_workers(engine_bin, folder, subject, way, *PIECES) as server:
        assert ask_in_turn(server, LONG_PROMPTS) == alone


@pytest.mark.parametrize("subject", ["llama", "gemma3", "qwen3moe", "jamba"], indirect=True)
@pytest.mark.parametrize(
    "way", [Way(3, dtype="f16"), Way(3, dtype="q8"), Way(3, ring=True, dtype="q8")], ids=str
)
def test_fewer_bits_on_the_wire_change_probabilities_a_little(
    subject: Subject, engine_bin: Path, folder: Path, way: Way
) -> None:
    """Where both begin: later each goes on with the tokens that it chose."""
    with over_workers(engine_bin, folder, subject, way, *PRECISE) as server:
        answers = ask_in_turn(server, PROMPTS)
    changes = [
        largest_difference(replace(one, best=one.best[:1]), replace(other, best=other.best[:1]))
        for one, other in zip(answers, subject.alone, strict=True)
    ]
    assert way.dtype is not None
    assert 0 < max(changes) < NARROW_BOUNDS[way.dtype]


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
    env = mesh_env(folder)
    with (
        rpc_servers(engine_bin, folder, model, n_workers) as workers,
        llama_server(engine_bin, folder, model, *TEXTS_AT_ONCE, rpc=workers, env=env) as server,
    ):
        assert [embed(server, prompt) for prompt in PROMPTS] == expected
    reports = loads(folder / "report.jsonl")
    assert {load.server for load in reports} == {worker.address for worker in workers}
    assert all(load.sent_tensors == load.failures == 0 for load in reports)
