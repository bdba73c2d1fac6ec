"""How fast a worker reads its weights from its own disk, beside `dd` and a plain read.

Cold: the file's pages are dropped from memory before (posix_fadvise). The worker is asked as
llama-server asks it, but by a bare client, so that nothing but its reading is timed.
"""

from __future__ import annotations

import mmap
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import gguf

from tests.bench.engine_chapter import Chapter, Run, verdict
from tests.bench.engine_model import LARGE, written_model
from tests.bench.engine_sides import Side, prepare_cache
from tests.engine.manifests import ROOT, write_manifest
from tests.engine.processes import rpc_server
from tests.engine.rpc_client import LOAD_COMMIT, RpcClient, rpc_tensor

PIECE_BYTES = 4 << 20
ALIGNMENT = 64
TO_REACH = 0.9
LOAD_LIMIT_S = 600.0


@dataclass(frozen=True)
class Case:
    title: str
    compared_with: str
    read: Callable[[Path], float]
    is_cold: bool


def read_with_dd(path: Path) -> float:
    began = time.perf_counter()
    command = ["dd", f"if={path}", "of=/dev/null", f"bs={PIECE_BYTES}", "status=none"]
    subprocess.run(command, check=True)
    return time.perf_counter() - began


def read_plainly(path: Path) -> float:
    """Into memory that nobody has touched yet, as a worker's buffer is."""
    began = time.perf_counter()
    size = path.stat().st_size
    with path.open("rb", buffering=0) as file, mmap.mmap(-1, size) as memory:
        room = memoryview(memory)
        done = 0
        while done < size:
            done += file.readinto(room[done : done + PIECE_BYTES]) or 0
        took_s = time.perf_counter() - began
        room.release()
    return took_s


CASES = (
    Case("cold", "`dd`", read_with_dd, is_cold=True),
    Case("cold", "a plain read into fresh memory", read_plainly, is_cold=True),
    Case("warm", "a plain read into fresh memory", read_plainly, is_cold=False),
)


class Reader:
    """I hold a connection to one worker, and a buffer there for all the weights of one file."""

    def __init__(self, client: RpcClient) -> None:
        self._client = client
        self._root = bytes.fromhex(ROOT)
        self._index = client.index(self._root)
        self.size_bytes = sum(size for _, _, size in self._index.values())
        self._buffer = client.allocate(self.size_bytes + ALIGNMENT * len(self._index))
        self._base = client.base(self._buffer)

    def load_s(self) -> float:
        """From the first request to the answer to the last."""
        began = time.perf_counter()
        place = self._base
        for name, (kind, ne, size) in self._index.items():
            block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
            tensor = rpc_tensor(
                name,
                type=kind,
                ne=ne,
                buffer=self._buffer,
                data=place,
                row_bytes=ne[0] // block * block_bytes,
                type_bytes=block_bytes,
            )
            self._client.set_tensor_gguf(1, self._root, ne, tensor)
            place += -(-size // ALIGNMENT) * ALIGNMENT
        reply = self._client.ask(LOAD_COMMIT, struct.pack("<I", 1), limit_s=LOAD_LIMIT_S)
        took_s = time.perf_counter() - began
        assert reply is not None
        tensors, read_bytes, failures = struct.unpack_from("<QQQ", reply)
        assert (tensors, read_bytes, failures) == (len(self._index), self.size_bytes, 0)
        return took_s


@contextmanager
def _reader(side: Side, model: Path) -> Iterator[Reader]:
    with tempfile.TemporaryDirectory(prefix="mesh-b-", dir="/tmp") as name:
        folder = Path(name)
        manifest = write_manifest(folder / "manifest", [model])
        with (
            rpc_server(side.engine.bin_dir, folder, "--gguf-manifest", manifest) as worker,
            RpcClient(worker.address) as client,
        ):
            yield Reader(client)


def tell_reading(run: Run) -> str:
    if run.mesh is None:
        return ""
    model = written_model(LARGE, run.models)
    lines = [
        f"A worker reads its weights ({LARGE.describe()}, {model.stat().st_size / 1e6:.0f} MB), "
        "in MB/s:",
        "",
        "| | compared with | worker | to it | to reach | |",
        "|---|---|---|---|---|---|",
    ]
    for case in CASES:
        theirs, ours = _speeds(run, run.mesh, model, case)
        lines.append(
            f"| {case.title} | {case.compared_with}: {theirs:.0f} | {ours:.0f} "
            f"| {ours / theirs:.2f} × | ≥ {TO_REACH} × | {verdict(ours >= TO_REACH * theirs)} |"
        )
    return "\n".join(lines)


def _speeds(run: Run, side: Side, model: Path, case: Case) -> tuple[float, float]:
    """By turns who goes first: a virtual machine's host may still have what the other read."""
    theirs, ours = [], []

    def read_theirs() -> None:
        prepare_cache(model, is_cold=case.is_cold)
        theirs.append(model.stat().st_size / 1e6 / case.read(model))

    def read_ours() -> None:
        with _reader(side, model) as reader:
            prepare_cache(model, is_cold=case.is_cold)
            ours.append(reader.size_bytes / 1e6 / reader.load_s())

    for number in range(run.rounds):
        for read in (read_theirs, read_ours) if number % 2 == 0 else (read_ours, read_theirs):
            read()
        run.say(f"reading, {case.title}: {theirs[-1]:.0f} MB/s, a worker {ours[-1]:.0f} MB/s")
    return median(theirs), median(ours)


READING = Chapter("reading", "a worker's reading beside dd's", tell_reading)
