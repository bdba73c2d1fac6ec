"""The machine that asks does not read what others compute, with mmap and without."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import psutil
import pytest

from tests.conftest import require
from tests.engine.manifests import write_manifest, write_roots
from tests.engine.page_cache import PAGE_BYTES, drop, read_ahead_bytes, resident_pages
from tests.engine.processes import (
    EngineFailed,
    greedy_tokens,
    llama_server,
    loads,
    mesh_env,
    rpc_server,
)
from tests.engine.slices import write_slice
from tests.engine.synthetic import make_model

pytestmark = pytest.mark.engine

LAYERS = 8
LAYER_BYTES = (4 * 1024 * 1024 + 3 * 1024 * 2048) * 34 // 32
EMBEDDING_BYTES = 2048 * 1024 * 34 // 32
# The header, the tables, and pages shared by a tensor that is read and one that is not.
SLACK_BYTES = 1 << 20


def _slack_bytes(path: Path, mode: str) -> int:
    """What may be read beyond the tensors needed.

    With mmap nothing: the needed ranges are fetched exactly. A reader of a file (and a lock,
    which faults pages in) has the kernel read ahead behind it: one window, or two in sequence.
    """
    return SLACK_BYTES if mode == "mmap" else SLACK_BYTES + 2 * read_ahead_bytes(path)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 90 MB, of which 2 MB are the embedding."""
    folder = tmp_path_factory.mktemp("large")
    return make_model(
        folder / "large.gguf", layers=LAYERS, width=1024, vocab=2048, heads=8, ffn=2048, seed=5
    )


@pytest.fixture
def cold(large: Path) -> Path:
    drop(large)
    left = sum(resident_pages(large))
    require("pagecache", left == 0, "this file system does not drop its pages (tmpfs?)")
    return large


def _pages_read(path: Path, *, of: str) -> int:
    """Bytes of pages in memory inside tensors whose name begins with `of`."""
    pages = resident_pages(path)
    read = 0
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name.startswith(of):
            first = int(tensor.data_offset) // PAGE_BYTES
            last = (int(tensor.data_offset) + int(tensor.n_bytes)) // PAGE_BYTES
            read += sum(pages[first:last]) * PAGE_BYTES
    return read


@pytest.mark.parametrize("mode", ["mmap", "none", "mmap+mlock"])
def test_with_every_layer_elsewhere_only_the_embedding_is_read(
    engine_bin: Path, folder: Path, cold: Path, mode: str
) -> None:
    copy = Path(shutil.copy(cold, folder / "copy.gguf"))
    manifest = write_manifest(folder / "manifest", [copy])
    roots = write_roots(folder / "roots", [cold])
    drop(cold)
    with (
        rpc_server(engine_bin, folder, "--gguf-manifest", manifest) as worker,
        llama_server(
            engine_bin,
            folder,
            cold,
            *("--load-mode", mode),
            rpc=[worker],
            env=mesh_env(folder, roots),
        ) as server,
    ):
        assert greedy_tokens(server)
    (load,) = loads(folder / "report.jsonl")
    assert load.sent_tensors == 0
    read = sum(resident_pages(cold)) * PAGE_BYTES
    assert read <= EMBEDDING_BYTES + _slack_bytes(cold, mode)


@pytest.mark.parametrize("mode", ["mmap", "none"])
def test_a_fingerprint_reads_a_sample_of_each_tensor_not_the_tensors(
    engine_bin: Path, folder: Path, cold: Path, mode: str
) -> None:
    copy = Path(shutil.copy(cold, folder / "copy.gguf"))
    drop(cold)
    with (
        rpc_server(engine_bin, folder, "--gguf", copy) as worker,
        llama_server(
            engine_bin, folder, cold, "--load-mode", mode, rpc=[worker], env=mesh_env(folder)
        ) as server,
    ):
        assert greedy_tokens(server)
    (load,) = loads(folder / "report.jsonl")
    assert load.sent_tensors == 0
    # The samples are read, not mapped, in every mode: the kernel reads ahead behind them.
    assert _pages_read(cold, of="blk.") <= _slack_bytes(cold, "none") < LAYERS * LAYER_BYTES / 2


def test_layers_that_stay_here_are_read_here(engine_bin: Path, folder: Path, cold: Path) -> None:
    """The measure itself works: the two local layers are seen to be read, the others not."""
    copy = Path(shutil.copy(cold, folder / "copy.gguf"))
    manifest = write_manifest(folder / "manifest", [copy])
    roots = write_roots(folder / "roots", [cold])
    drop(cold)
    with (
        rpc_server(engine_bin, folder, "--gguf-manifest", manifest) as worker,
        llama_server(
            engine_bin,
            folder,
            cold,
            *("-ngl", str(LAYERS - 1), "--load-mode", "mmap"),
            rpc=[worker],
            env=mesh_env(folder, roots),
        ) as server,
    ):
        # At once: a system may take back what was read once and not looked at since.
        read = [_pages_read(cold, of=f"blk.{layer}.") for layer in range(LAYERS)]
        assert greedy_tokens(server)
    assert min(read[:2]) >= LAYER_BYTES * 0.99
    for layer in range(2, LAYERS):
        assert _pages_read(cold, of=f"blk.{layer}.") <= SLACK_BYTES


@pytest.mark.parametrize("mode", ["mmap", "none", "mmap+mlock"])
def test_a_load_that_a_hole_ends_has_read_no_weight(
    engine_bin: Path, folder: Path, cold: Path, mode: str
) -> None:
    here = write_slice(folder / "here", [cold], lambda name: name != "output.weight")
    drop(here.model)
    with (
        pytest.raises(EngineFailed, match="this machine does not hold it"),
        llama_server(
            *(engine_bin, folder, here.model, "--load-mode", mode),
            env={"GGML_RPC_MESH_PRESENCE": str(here.presence(folder / "presence"))},
        ),
    ):
        pass
    assert sum(resident_pages(here.model)) * PAGE_BYTES <= _slack_bytes(cold, mode)


def test_a_worker_without_the_file_makes_the_whole_of_it_be_read(
    engine_bin: Path, folder: Path, cold: Path
) -> None:
    """And the other way round: what is sent is read. Counted by the system for the process: pages
    that were sent are of no more use, and some systems take them back at once."""
    with (
        rpc_server(engine_bin, folder) as worker,
        llama_server(engine_bin, folder, cold, "--load-mode", "mmap", rpc=[worker]) as server,
    ):
        read_bytes = psutil.Process(server.process.pid).io_counters().read_bytes
        assert greedy_tokens(server)
    assert read_bytes >= LAYERS * LAYER_BYTES * 0.99
