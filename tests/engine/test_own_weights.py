"""Servers load weights from their own files (patches 3 and 4): what is sent, and what is not."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import gguf
import pytest

from tests.engine.manifests import write_manifest, write_roots
from tests.engine.processes import (
    alone,
    greedy_tokens,
    llama_server,
    loads,
    mesh_env,
    rpc_server,
    rpc_servers,
)
from tests.engine.synthetic import make_model

pytestmark = pytest.mark.engine


def test_no_weight_is_sent_to_a_server_that_has_the_file(
    engine_bin: Path, folder: Path, model: Path
) -> None:
    expected = alone(engine_bin, folder, model)
    copy = Path(shutil.copy(model, folder / "copy.gguf"))
    with (
        rpc_server(engine_bin, folder, "--gguf", copy) as worker,
        llama_server(engine_bin, folder, model, rpc=[worker], env=mesh_env(folder)) as server,
    ):
        assert greedy_tokens(server) == expected
        (load,) = loads(folder / "report.jsonl")
    assert load.server == worker.address
    assert (load.sent_tensors, load.sent_bytes, load.failures) == (0, 0, 0)
    # everything but the token embedding, which llama.cpp keeps beside the tokenizer
    offloaded = [t for t in gguf.GGUFReader(model).tensors if t.name != "token_embd.weight"]
    assert load.local_tensors == len(offloaded)
    assert load.local_bytes == sum(tensor.n_bytes for tensor in offloaded)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param({"shards": 3}, id="split into three files"),
        pytest.param({"tied": True, "type": "F16"}, id="output tied to the embedding"),
        pytest.param({"experts": 4}, id="mixture of experts"),
    ],
)
@pytest.mark.parametrize("mode", ["mmap", "none"])
def test_every_kind_of_model_loads_from_the_server_s_disk(
    engine_bin: Path, folder: Path, kind: dict[str, int], mode: str
) -> None:
    path = make_model(folder / "model.gguf", seed=3, **kind)  # type: ignore[arg-type]
    files = sorted(folder.glob("model*.gguf"))
    offers = [word for file in files for word in ("--gguf", str(file))]
    expected = alone(engine_bin, folder, path)
    with (
        rpc_server(engine_bin, folder, *offers) as worker,
        llama_server(
            engine_bin, folder, path, "--load-mode", mode, rpc=[worker], env=mesh_env(folder)
        ) as server,
    ):
        assert greedy_tokens(server) == expected
    (load,) = loads(folder / "report.jsonl")
    assert (load.sent_tensors, load.failures) == (0, 0)
    assert load.local_tensors > 0


def test_two_models_with_equal_names_and_shapes_each_get_their_own_weights(
    engine_bin: Path, folder: Path, model: Path, twin: Path
) -> None:
    answers = [alone(engine_bin, folder, path) for path in (model, twin)]
    assert answers[0] != answers[1]
    with rpc_server(engine_bin, folder, "--gguf", model, "--gguf", twin) as worker:
        for path, expected in zip((model, twin), answers, strict=True):
            with llama_server(
                engine_bin, folder, path, rpc=[worker], env=mesh_env(folder)
            ) as server:
                assert greedy_tokens(server) == expected
    assert [load.sent_tensors for load in loads(folder / "report.jsonl")] == [0, 0]


def test_a_server_with_only_the_fine_tune_is_sent_the_right_weights(
    engine_bin: Path, folder: Path, model: Path, twin: Path
) -> None:
    expected = alone(engine_bin, folder, model)
    with (
        rpc_server(engine_bin, folder, "--gguf", twin) as worker,
        llama_server(engine_bin, folder, model, rpc=[worker], env=mesh_env(folder)) as server,
    ):
        assert greedy_tokens(server) == expected
    (load,) = loads(folder / "report.jsonl")
    assert load.local_tensors == 0
    assert load.sent_tensors > 0


def test_a_tensor_left_out_of_the_manifest_is_sent(
    engine_bin: Path, folder: Path, model: Path
) -> None:
    """How mesh treats a file with one flipped byte: that tensor is not listed, the rest is used."""
    expected = alone(engine_bin, folder, model)
    damaged = Path(shutil.copy(model, folder / "damaged.gguf"))
    victim = next(t for t in gguf.GGUFReader(model).tensors if t.name == "blk.2.ffn_up.weight")
    data = bytearray(damaged.read_bytes())
    data[int(victim.data_offset) + 1000] ^= 0xFF
    damaged.write_bytes(data)
    manifest = write_manifest(folder / "manifest", [damaged], without=[victim.name])
    roots = write_roots(folder / "roots", [model])
    with (
        rpc_server(engine_bin, folder, "--gguf-manifest", manifest) as worker,
        llama_server(
            engine_bin, folder, model, rpc=[worker], env=mesh_env(folder, roots)
        ) as server,
    ):
        assert greedy_tokens(server) == expected
    (load,) = loads(folder / "report.jsonl")
    assert (load.sent_tensors, load.sent_bytes) == (1, victim.n_bytes)
    assert load.failures == 0


def test_one_root_covers_all_shards_of_a_split_model(engine_bin: Path, folder: Path) -> None:
    path = make_model(folder / "model.gguf", seed=4, shards=3)
    files = sorted(folder.glob("model*.gguf"))
    expected = alone(engine_bin, folder, path)
    manifest = write_manifest(folder / "manifest", files)
    roots = write_roots(folder / "roots", files)
    with (
        rpc_server(engine_bin, folder, "--gguf-manifest", manifest) as worker,
        llama_server(engine_bin, folder, path, rpc=[worker], env=mesh_env(folder, roots)) as server,
    ):
        assert greedy_tokens(server) == expected
    (load,) = loads(folder / "report.jsonl")
    assert (load.sent_tensors, load.failures) == (0, 0)


def test_layers_split_over_here_and_there_are_reported_per_server(
    engine_bin: Path, folder: Path, model: Path
) -> None:
    expected = alone(engine_bin, folder, model)
    with (
        rpc_server(engine_bin, folder, "--gguf", model, name="has") as has,
        rpc_server(engine_bin, folder, name="not") as has_not,
        llama_server(
            engine_bin,
            folder,
            model,
            *("-ngl", "4", "-ts", "2,2"),
            rpc=[has, has_not],
            env=mesh_env(folder),
        ) as server,
    ):
        assert greedy_tokens(server) == expected
    by_server = {load.server: load for load in loads(folder / "report.jsonl")}
    assert by_server[has.address].sent_tensors == 0
    assert by_server[has.address].local_tensors > 0
    assert by_server[has_not.address].local_tensors == 0
    assert by_server[has_not.address].sent_tensors > 0


def test_a_model_without_a_fingerprint_is_sent_to_every_server(
    engine_bin: Path, folder: Path, model: Path
) -> None:
    """Its header has a key longer than our reader takes; llama.cpp does not mind."""
    odd = folder / "odd.gguf"
    _copy_with_long_key(model, odd)
    expected = alone(engine_bin, folder, odd)
    with (
        rpc_servers(engine_bin, folder, model, 3) as workers,
        llama_server(
            *(engine_bin, folder, odd, "--tensor-split", "1,1,1"),
            rpc=workers,
            env=mesh_env(folder),
        ) as server,
    ):
        assert greedy_tokens(server) == expected
    found = loads(folder / "report.jsonl")
    assert len(found) == len(workers)
    assert all(load.sent_tensors and not load.local_tensors for load in found)


def _copy_with_long_key(model: Path, copy: Path) -> None:
    """The same model with one pair more in front of the others, 70,016 bytes of it: what follows
    stays aligned."""
    content = model.read_bytes()
    magic, version, n_tensors, n_keys = struct.unpack_from("<IIQQ", content)
    head = struct.pack("<IIQQ", magic, version, n_tensors, n_keys + 1)
    key = b"k" * 70_003
    pair = struct.pack("<Q", len(key)) + key + struct.pack("<IB", gguf.GGUFValueType.UINT8, 1)
    copy.write_bytes(head + pair + content[len(head) :])
