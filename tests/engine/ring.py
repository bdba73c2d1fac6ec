"""Workers in a ring: what a node does between two of them, here a thread that copies bytes.

A worker listens at both ends, for what is pushed to it and for whoever carries on what it pushes.
"""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.engine.processes import Running, rpc_server

RECEIVE_BYTES = 1 << 16


@dataclass(frozen=True)
class Ring:
    """`workers[i]` pushes through `joints[i]` to `workers[i + 1]`; `traces` are the workers'."""

    workers: list[Running]
    joints: list[Joint]
    traces: list[Path]


def push_arguments(folder: Path, name: str) -> list[str]:
    """Of a worker of that name that can be in a ring: its two sockets lie beside its RPC socket."""
    return [
        *("--push-listen", f"unix:{folder / name}.in"),
        *("--push-to", f"unix:{folder / name}.out"),
    ]


class Joint:
    """Copies what one worker pushes to the next, until it is cut."""

    def __init__(self, source: Running, target: Running) -> None:
        self._ends = [socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)]
        for end, worker, suffix in zip(self._ends, (source, target), (".out", ".in"), strict=True):
            end.connect(str(Path(worker.address.removeprefix("unix:")).with_suffix(suffix)))
        self.copied_bytes = 0
        self._thread = threading.Thread(target=self._copy)
        self._thread.start()

    def _copy(self) -> None:
        source, target = self._ends
        with suppress(OSError):
            while piece := source.recv(RECEIVE_BYTES):
                target.sendall(piece)
                self.copied_bytes += len(piece)

    def cut(self) -> None:
        for end in self._ends:
            with suppress(OSError):  # the worker was faster
                end.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for end in self._ends:
            end.close()


@contextmanager
def joined(workers: Sequence[Running]) -> Iterator[list[Joint]]:
    """A joint between each of `workers` and the next; what is added to the list is cut as well."""
    joints: list[Joint] = []
    try:
        for source, target in itertools.pairwise(workers):
            joints.append(Joint(source, target))
        yield joints
    finally:
        for joint in joints:
            joint.cut()


@contextmanager
def ring_of(bin_dir: Path, folder: Path, n: int, *options: str | Path) -> Iterator[Ring]:
    names = [f"w{number}" for number in range(n)]
    traces = [folder / f"{name}.trace" for name in names]
    with ExitStack() as stack:
        workers = [
            stack.enter_context(
                rpc_server(
                    bin_dir,
                    folder,
                    *options,
                    *push_arguments(folder, name),
                    name=name,
                    env={"GGML_RPC_TRACE": str(trace)},
                )
            )
            for name, trace in zip(names, traces, strict=True)
        ]
        yield Ring(workers, stack.enter_context(joined(workers)), traces)


def write_ring(path: Path, workers: Sequence[Running]) -> Path:
    """What GGML_RPC_MESH_RING names; it appears whole."""
    pairs = itertools.pairwise(workers)
    growing = path.with_suffix(".new")
    growing.write_text("".join(f"{one.address}\t{other.address}\n" for one, other in pairs))
    return growing.rename(path)
