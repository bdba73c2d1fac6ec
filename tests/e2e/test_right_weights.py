"""Which weights are used is decided by digest: a copy that differs in one byte is found out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from meshnode.models.facts import read_facts
from tests.e2e.conftest import World
from tests.e2e.test_two_nodes import alone, greedy_tokens, status_of, url_of
from tests.engine.synthetic import make_model

pytestmark = pytest.mark.engine

FLIPPED_TENSOR = "blk.5.ffn_up.weight"


def flip_one_byte(path: Path, tensor_name: str) -> None:
    """Changes the tensor's middle byte and keeps the file's size."""
    tensor = next(one for one in read_facts(path).tensors if one.name == tensor_name)
    with path.open("r+b") as file:
        file.seek(tensor.offset + tensor.nbytes // 2)
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 0x40]))


async def test_one_flipped_byte_is_reported_and_that_tensor_not_used(
    world: World, small_model: Path
) -> None:
    expected = await alone(world, small_model)
    folder = world.folder / "damaged"
    folder.mkdir()
    copy = Path(shutil.copy(small_model, folder))
    flip_one_byte(copy, FLIPPED_TENSOR)
    tensors = read_facts(small_model).tensors
    nbytes = next(one.nbytes for one in tensors if one.name == FLIPPED_TENSOR)
    async with world.worker("--models", str(folder)) as worker:
        joins = ("--join-file", str(await world.join_file(worker)))
        arguments = ("--model", str(small_model), "--layers", "local=0:1,worker=2:output", *joins)
        async with world.serve(*arguments) as node:
            warning = await node.wait_event("warning", containing=FLIPPED_TENSOR)
            url = await url_of(node)
            assert await greedy_tokens(url) == expected
            (load,) = (await status_of(url))["load"]
    assert warning["differing_tensors"] == [FLIPPED_TENSOR]
    assert (load["sent_tensors"], load["sent_bytes"]) == (1, nbytes), "that tensor and no other"


async def test_two_models_of_one_shape_each_get_their_own_weights(world: World) -> None:
    folder = world.folder / "models"
    folder.mkdir()
    models = [
        make_model(folder / f"{name}.gguf", layers=6, width=128, ffn=256, seed=seed, name="twin")
        for name, seed in (("base", 10), ("tuned", 11))
    ]
    expected = [await alone(world, model, model.stem) for model in models]
    assert expected[0] != expected[1], "the test needs two models that answer differently"
    async with world.worker("--models", str(folder)) as worker:
        joins = ("--join-file", str(await world.join_file(worker)))
        for model, tokens in zip(models, expected, strict=True):
            arguments = ("--model", str(model), "--split", "always", *joins)
            async with world.serve(*arguments, name=f"serve-{model.stem}") as node:
                url = await url_of(node)
                assert await greedy_tokens(url) == tokens
                assert (await status_of(url))["load"][0]["sent_bytes"] == 0


async def test_a_model_in_shards_matches_the_same_model_in_one_file(world: World) -> None:
    """The root is the model's, not the file's."""
    whole, cut = world.folder / "whole", world.folder / "cut"
    whole.mkdir()
    cut.mkdir()
    sizes: dict[str, Any] = {"layers": 6, "width": 128, "ffn": 256, "seed": 12}
    model = make_model(whole / "model.gguf", **sizes)
    make_model(cut / "model.gguf", **sizes, shards=3)
    expected = await alone(world, model)
    async with world.worker("--models", str(cut)) as worker:
        joins = ("--join-file", str(await world.join_file(worker)))
        async with world.serve("--model", str(model), "--split", "always", *joins) as node:
            url = await url_of(node)
            assert await greedy_tokens(url) == expected
            (load,) = (await status_of(url))["load"]
    assert load["sent_bytes"] == 0
