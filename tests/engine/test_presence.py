"""Slices (patch 30): what is in no file of this machine comes from a worker's, or nothing loads."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import gguf
import pytest
import trio

from meshnode.engine.cache import load_engine
from meshnode.engine.errors import WeightsAbsent
from meshnode.engine.llama_server import LlamaServerOptions, open_llama_server
from tests.engine.manifests import write_roots
from tests.engine.processes import (
    START_LIMIT_S,
    EngineFailed,
    Running,
    alone,
    greedy_tokens,
    llama_server,
    loads,
    mesh_env,
    rpc_server,
)
from tests.engine.slices import Slice, of_layers, write_slice
from tests.engine.synthetic import make_model

pytestmark = pytest.mark.engine

EMBEDDING = "token_embd.weight"
OUTPUT = ("output_norm.weight", "output.weight")
VICTIM = "blk.2.ffn_up.weight"
# Layer 0 here, 1 and 2 on the first worker, 3 and the output on the second.
SPLIT = ("-ngl", "4", "-ts", "2,2")


def presence_env(folder: Path, presence: Path, roots: Path | None = None) -> dict[str, str]:
    return {**mesh_env(folder, roots), "GGML_RPC_MESH_PRESENCE": str(presence)}


@contextmanager
def workers_with(bin_dir: Path, folder: Path, slices: Sequence[Slice]) -> Iterator[list[Running]]:
    """One for each slice, which offers what its slice holds."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                rpc_server(
                    *(bin_dir, folder, "--gguf-manifest", part.manifest(folder / f"w{number}.tsv")),
                    name=f"w{number}",
                )
            )
            for number, part in enumerate(slices)
        ]


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param({}, id="one file"),
        pytest.param({"shards": 3}, id="split into three files"),
        pytest.param({"tied": True, "type": "F16"}, id="output tied to the embedding"),
    ],
)
@pytest.mark.parametrize("mode", ["mmap", "none", "dio", "mmap+mlock"])
def test_three_slices_answer_as_the_whole_does(
    engine_bin: Path, folder: Path, kind: dict[str, int], mode: str
) -> None:
    path = make_model(folder / "model.gguf", seed=3, **kind)  # type: ignore[arg-type]
    whole = sorted(folder.glob("model*.gguf"))
    expected = alone(engine_bin, folder, path)
    output = (*OUTPUT, EMBEDDING) if "tied" in kind else OUTPUT
    here = write_slice(folder / "here", whole, of_layers(0, also=[EMBEDDING]))
    parts = [
        write_slice(folder / "one", whole, of_layers(1, 2)),
        write_slice(folder / "two", whole, of_layers(3, also=output)),
    ]
    for file in whole:
        file.unlink()
    roots = write_roots(folder / "roots", list(here.files))
    env = presence_env(folder, here.presence(folder / "presence"), roots)
    with (
        workers_with(engine_bin, folder, parts) as workers,
        llama_server(
            *(engine_bin, folder, here.model, *SPLIT, "--load-mode", mode, "--check-tensors"),
            rpc=workers,
            env=env,
        ) as server,
    ):
        assert greedy_tokens(server) == expected
    found = loads(folder / "report.jsonl")
    assert len(found) == len(workers)
    assert all(load.local_tensors and not load.sent_tensors for load in found)


@pytest.mark.parametrize("mode", ["mmap", "none", "dio"])
def test_a_tensor_that_is_needed_here_and_not_there_fails_the_load_in_a_sentence(
    engine_bin: Path, folder: Path, model: Path, mode: str
) -> None:
    here = write_slice(folder / "here", [model], lambda name: name != VICTIM)
    env = presence_env(folder, here.presence(folder / "presence"))
    with (
        pytest.raises(EngineFailed) as failed,
        llama_server(engine_bin, folder, here.model, "--load-mode", mode, env=env),
    ):
        pass
    assert failed.value.returncode == 1
    assert (
        f"error loading model: tensor {VICTIM} of {here.model} is needed here, and this machine "
        "does not hold it\n"
    ) in failed.value.log


@pytest.mark.parametrize("has", ["all but that one", "another model", "nothing"])
def test_a_tensor_that_is_neither_here_nor_with_the_worker_is_not_sent_as_zeros(
    engine_bin: Path, folder: Path, model: Path, twin: Path, has: str
) -> None:
    here = write_slice(folder / "here", [model], of_layers(0, 1, 3, also=[EMBEDDING, *OUTPUT]))
    roots = write_roots(folder / "roots", [here.model])
    env = presence_env(folder, here.presence(folder / "presence"), roots)
    part = write_slice(folder / "one", [model], lambda name: name != VICTIM)
    missing = VICTIM if has == "all but that one" else "blk.2.attn_norm.weight"
    offers: dict[str, tuple[str | Path, ...]] = {
        "all but that one": ("--gguf-manifest", part.manifest(folder / "manifest")),
        "another model": ("--gguf", twin),
        "nothing": (),
    }
    with rpc_server(engine_bin, folder, *offers[has]) as worker:
        with (
            pytest.raises(EngineFailed) as failed,
            llama_server(engine_bin, folder, here.model, rpc=[worker], env=env),
        ):
            pass
        assert worker.alive
        assert failed.value.returncode == 1
        assert (
            f"error loading model: {worker.address} has no tensor {missing} like that of "
            f"{here.model}, and this machine does not hold it\n"
        ) in failed.value.log


def test_a_stock_server_is_sent_no_hole(
    engine_bin: Path, stock_bin: Path, folder: Path, model: Path
) -> None:
    here = write_slice(folder / "here", [model], lambda name: name != VICTIM)
    env = presence_env(folder, here.presence(folder / "presence"))
    with (
        rpc_server(stock_bin, folder, tcp=True) as worker,
        pytest.raises(EngineFailed, match=f"{worker.address} has no tensor {VICTIM} like that of"),
        llama_server(engine_bin, folder, here.model, rpc=[worker], env=env),
    ):
        pass


def test_a_tied_embedding_that_only_the_worker_has_is_missed_here(
    engine_bin: Path, folder: Path
) -> None:
    path = make_model(folder / "model.gguf", seed=3, tied=True, type="F16")
    here = write_slice(folder / "here", [path], lambda name: name != EMBEDDING)
    whole = write_slice(folder / "whole", [path], lambda name: True)
    roots = write_roots(folder / "roots", [here.model])
    env = presence_env(folder, here.presence(folder / "presence"), roots)
    with (
        workers_with(engine_bin, folder, [whole]) as workers,
        pytest.raises(
            EngineFailed, match=f"tensor {EMBEDDING} of .* is needed here, and this mach"
        ),
        llama_server(engine_bin, folder, here.model, rpc=workers, env=env),
    ):
        pass


def test_what_is_here_is_still_sent_to_a_worker_that_lacks_it(
    engine_bin: Path, folder: Path, model: Path
) -> None:
    expected = alone(engine_bin, folder, model)
    here = write_slice(folder / "here", [model], of_layers(2, also=[EMBEDDING]))
    part = write_slice(folder / "one", [model], lambda name: name != VICTIM)
    roots = write_roots(folder / "roots", [here.model])
    env = presence_env(folder, here.presence(folder / "presence"), roots)
    with (
        workers_with(engine_bin, folder, [part]) as workers,
        llama_server(engine_bin, folder, here.model, rpc=workers, env=env) as server,
    ):
        assert greedy_tokens(server) == expected
    (load,) = loads(folder / "report.jsonl")
    assert (load.sent_tensors, load.failures) == (1, 0)


def test_a_file_is_known_by_any_of_its_names_and_one_that_is_not_named_is_whole(
    engine_bin: Path, folder: Path, model: Path, twin: Path
) -> None:
    expected = alone(engine_bin, folder, model)
    shutil.copy(model, folder / "model.gguf")
    linked = folder / "linked.gguf"
    linked.symlink_to(twin)
    presence = folder / "presence"
    presence.write_text(f"mesh-presence\t1\nfile\t0\t{linked}\nend\t0\n")
    env = presence_env(folder, presence)
    with llama_server(engine_bin, folder, folder / "model.gguf", env=env) as server:
        assert greedy_tokens(server) == expected
    with (
        pytest.raises(EngineFailed, match="is needed here, and this machine does not hold it"),
        llama_server(engine_bin, folder, twin, env=env),
    ):
        pass


FILE = "file\t0\tMODEL\n"
DAMAGED = {
    "empty": ("", "cannot be read"),
    "another version": (f"mesh-presence\t2\n{FILE}end\t0\n", "line 1 of"),
    "cut short": (f"mesh-presence\t1\n{FILE}", "is cut short"),
    "one line lost": (f"mesh-presence\t1\n{FILE}held\t0\ta\nend\t2\n", "line 4 of"),
    "more after its end": (f"mesh-presence\t1\n{FILE}end\t0\nheld\t0\ta\n", "line 4 of"),
    "an unknown line": (f"mesh-presence\t1\n{FILE}surprise\t0\ta\nend\t0\n", "line 3 of"),
    "a tensor of no file": (f"mesh-presence\t1\n{FILE}held\t1\ta\nend\t1\n", "line 3 of"),
    "a tensor twice": (f"mesh-presence\t1\n{FILE}held\t0\ta\nheld\t0\ta\nend\t2\n", "line 4 of"),
    "a number that is none": (f"mesh-presence\t1\n{FILE}held\t-0\ta\nend\t1\n", "line 3 of"),
    "files out of order": ("mesh-presence\t1\nfile\t1\tMODEL\nend\t0\n", "line 2 of"),
    "a file twice": (f"mesh-presence\t1\n{FILE}file\t1\tMODEL\nend\t0\n", "twice"),
    "a file that is gone": ("mesh-presence\t1\nfile\t0\t/nowhere\nend\t0\n", "cannot be found"),
}


@pytest.mark.parametrize(("text", "complaint"), DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_map_is_refused_in_a_sentence(
    engine_bin: Path, folder: Path, model: Path, text: str, complaint: str
) -> None:
    presence = folder / "presence"
    presence.write_text(text.replace("MODEL", str(model)))
    _assert_refused(engine_bin, folder, model, complaint)


@pytest.mark.parametrize("kind", ["missing", "a folder"])
def test_a_map_that_cannot_be_read_is_refused_in_a_sentence(
    engine_bin: Path, folder: Path, model: Path, kind: str
) -> None:
    if kind == "a folder":
        (folder / "presence").mkdir()
    _assert_refused(engine_bin, folder, model, "cannot be read")


def _assert_refused(bin_dir: Path, folder: Path, model: Path, complaint: str) -> None:
    presence = folder / "presence"
    with (
        pytest.raises(EngineFailed) as failed,
        llama_server(bin_dir, folder, model, env=presence_env(folder, presence)),
    ):
        pass
    assert failed.value.returncode == 1
    (sentence,) = [line for line in failed.value.log.splitlines() if "error loading" in line]
    assert f"the presence map {presence} (GGML_RPC_MESH_PRESENCE)" in sentence
    assert complaint in sentence


async def test_the_failure_is_an_error_of_its_own(
    engine_bin: Path, folder: Path, model: Path
) -> None:
    here = write_slice(folder / "here", [model], lambda name: name != VICTIM)
    options = LlamaServerOptions(
        here.model, folder / "http.sock", 256, presence=here.presence(folder / "presence")
    )
    engine = load_engine(engine_bin)
    with trio.fail_after(START_LIMIT_S), pytest.raises(WeightsAbsent) as failed:
        async with open_llama_server(engine, options, log=folder / "log"):
            pass
    assert str(failed.value) == (
        f"the load ended: tensor {VICTIM} of {here.model} is needed here, and this machine does "
        "not hold it: fetch it, or plan with what is here"
    )


def test_a_slice_is_as_long_as_the_whole_and_reads_zeros_in_its_holes(
    folder: Path, model: Path
) -> None:
    """What the tests above rest on."""
    here = write_slice(folder / "here", [model], lambda name: name != VICTIM)
    assert here.model.stat().st_size == model.stat().st_size
    whole, part = (
        {tensor.name: bytes(tensor.data) for tensor in gguf.GGUFReader(path).tensors}
        for path in (model, here.model)
    )
    assert {name for name in whole if whole[name] != part[name]} == {VICTIM}
    assert not any(part[VICTIM])
