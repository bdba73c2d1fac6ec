"""A worker computes with every type of tensor as the engine alone does, however it got it.

One model holds them all: each layer has its attention and its experts in another type. They are
256 wide, which is one block of the largest types and half of what the CPU's kernels pad rows to.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from zlib import crc32

import gguf
import pytest

from tests.engine.answers import Answer, ask_in_turn
from tests.engine.blocks import VOCAB, Architecture, Shape
from tests.engine.processes import llama_server, loads, mesh_env, rpc_server
from tests.engine.random_models import Encoded, write_model
from tests.engine.tensor_types import TYPES, random_tensor
from tests.engine.vocabulary import FIRST_WORD

pytestmark = pytest.mark.engine

WIDTH = 256
HEADS = 4
EXPERTS = 3
PROMPTS = [[1, *range(FIRST_WORD, FIRST_WORD + 12)]]


def layer() -> Mapping[str, Shape]:
    return {
        "attn_norm.weight": (WIDTH,),
        **{f"attn_{part}.weight": (WIDTH, WIDTH) for part in ("q", "k", "v", "output")},
        "ffn_norm.weight": (WIDTH,),
        "ffn_gate_inp.weight": (EXPERTS, WIDTH),
        **{f"ffn_{part}_exps.weight": (EXPERTS, WIDTH, WIDTH) for part in ("gate", "up", "down")},
    }


def architecture() -> Architecture:
    tensors: dict[str, Shape] = {"token_embd.weight": (VOCAB, WIDTH)}
    for index in range(len(TYPES)):
        tensors |= {f"blk.{index}.{name}": shape for name, shape in layer().items()}
    tensors |= {"output_norm.weight": (WIDTH,), "output.weight": (VOCAB, WIDTH)}
    metadata = {
        "context_length": 256,
        "embedding_length": WIDTH,
        "block_count": len(TYPES),
        "feed_forward_length": WIDTH,
        "attention.head_count": HEADS,
        "attention.head_count_kv": HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": WIDTH // HEADS,
        "vocab_size": VOCAB,
        "expert_count": EXPERTS,
        "expert_used_count": 2,
    }
    return Architecture("llama", metadata, tensors)


def encode(name: str, shape: Shape) -> Encoded | None:
    if not name.startswith("blk.") or "norm" in name or "gate_inp" in name:
        return None
    return random_tensor(TYPES[int(name.split(".")[1])], shape, seed=crc32(name.encode()))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(
        tmp_path_factory.mktemp("types") / "types.gguf", architecture(), encode=encode
    )


@pytest.fixture(scope="module")
def expected(
    engine_bin: Path, tmp_path_factory: pytest.TempPathFactory, path: Path
) -> list[Answer]:
    with llama_server(engine_bin, tmp_path_factory.mktemp("alone"), path) as server:
        return ask_in_turn(server, PROMPTS)


def test_no_type_that_the_package_knows_is_left_out() -> None:
    """What is left: types of activations, and of whole numbers."""
    others = {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"}
    assert {kind.name for kind in gguf.GGMLQuantizationType} <= {*TYPES} | others


@pytest.mark.parametrize("mode", ["mmap", "none", "dio"])
@pytest.mark.parametrize("has_the_file", [True, False], ids=["read there", "sent"])
def test_every_type_computes_over_a_worker_as_it_does_alone(
    engine_bin: Path,
    folder: Path,
    path: Path,
    expected: list[Answer],
    mode: str,
    has_the_file: bool,
) -> None:
    offers = ["--gguf", str(path)] if has_the_file else []
    with (
        rpc_server(engine_bin, folder, *offers) as worker,
        llama_server(
            engine_bin, folder, path, "--load-mode", mode, rpc=[worker], env=mesh_env(folder)
        ) as server,
    ):
        assert ask_in_turn(server, PROMPTS) == expected
    (load,) = loads(folder / "report.jsonl")
    assert load.failures == 0
    assert (load.sent_tensors == 0) == has_the_file
    assert (load.local_tensors > 0) == has_the_file
