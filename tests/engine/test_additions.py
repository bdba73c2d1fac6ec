"""Adapters, control vectors and images on top of a model whose layers lie with workers.

Their tensors are in no file that a worker has: they are sent. The answers are those of the engine
alone, which differ from what the model answers without the addition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.engine.additions import (
    bitmap,
    write_control_vector,
    write_image_encoder,
    write_lora,
)
from tests.engine.answers import MEDIA_MARKER, Answer, ask, ask_in_turn
from tests.engine.architectures import GENERATING
from tests.engine.processes import Running, llama_server, loads, mesh_env, rpc_servers
from tests.engine.random_models import write_model
from tests.engine.vocabulary import FIRST_WORD

pytestmark = pytest.mark.engine

PROMPTS = [[1, *range(FIRST_WORD, FIRST_WORD + 12)]]
PARTS = ("attn_q", "attn_output", "ffn_down", "ffn_up_exps", "ffn_gate_exps", "ffn_down_exps")


def answers(
    engine_bin: Path,
    folder: Path,
    model: Path,
    arguments: Sequence[str],
    question: Callable[[Running], list[Answer]],
    n_workers: int,
) -> list[Answer]:
    """What `question` gets from a llama-server whose workers read the model from its file."""
    env = mesh_env(folder) | {"LLAMA_MEDIA_MARKER": MEDIA_MARKER}
    with (
        rpc_servers(engine_bin, folder, model, n_workers) as workers,
        llama_server(engine_bin, folder, model, *arguments, rpc=workers, env=env) as server,
    ):
        found = question(server)
    if workers:
        assert all(
            load.sent_tensors == load.failures == 0 for load in loads(folder / "report.jsonl")
        )
    return found


def asked_in_turn(server: Running) -> list[Answer]:
    return ask_in_turn(server, PROMPTS)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "qwen2moe", "jamba"])
def test_an_adapter_works_where_the_layers_are(engine_bin: Path, folder: Path, arch: str) -> None:
    architecture = GENERATING[arch]()
    model = write_model(folder / "model.gguf", architecture)
    adapted = [name for name in architecture.tensors if name.split(".")[-2] in PARTS]
    lora = write_lora(folder / "lora.gguf", architecture, adapted)
    given = ("--lora", str(lora))
    expected = answers(engine_bin, folder, model, given, asked_in_turn, 0)
    assert expected != answers(engine_bin, folder, model, (), asked_in_turn, 0)
    assert expected == answers(engine_bin, folder, model, given, asked_in_turn, 2)


def test_a_control_vector_steers_all_layers_wherever_they_are(
    engine_bin: Path, folder: Path
) -> None:
    architecture = GENERATING["llama"]()
    model = write_model(folder / "model.gguf", architecture)
    given = ("--control-vector", str(write_control_vector(folder / "vector.gguf", architecture)))
    expected = answers(engine_bin, folder, model, given, asked_in_turn, 0)
    assert expected != answers(engine_bin, folder, model, (), asked_in_turn, 0)
    assert expected == answers(engine_bin, folder, model, given, asked_in_turn, 2)


@pytest.mark.parametrize(
    ("where", "encoder_is_lent"), [("--no-mmproj-offload", False), ("--mmproj-offload", True)]
)
def test_images_are_seen_wherever_their_encoder_is(
    engine_bin: Path, folder: Path, where: str, encoder_is_lent: bool
) -> None:
    """llama-server puts the encoder on the first worker if it is not told to keep it."""
    model = write_model(folder / "model.gguf", GENERATING["llama"]())
    given = ("--mmproj", str(write_image_encoder(folder / "encoder.gguf")), where, "-lv", "4")

    def shown_images(server: Running) -> list[Answer]:
        return [ask(server, PROMPTS[0], bitmap(seed)) for seed in (1, 2)]

    def shown_images_there(server: Running) -> list[Answer]:
        assert ("CLIP using RPC" in server.log) == encoder_is_lent
        return shown_images(server)

    expected = answers(engine_bin, folder, model, given, shown_images, 0)
    assert expected[0] != expected[1]
    assert expected == answers(engine_bin, folder, model, given, shown_images_there, 2)
