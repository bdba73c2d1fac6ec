"""Workers in a ring: what a node does between two of them, here a thread that copies bytes."""

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


class Joint:
    """Copies what one worker pushes to the next, until it is cut."""

    def __init__(self, source: Path, target: Path) -> None:
        self._ends = [socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)]
        for end, path in zip(self._ends, (source, target), strict=True):
            end.connect(str(path))
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
def ring_of(bin_dir: Path, folder: Path, n: int, *options: str | Path) -> Iterator[Ring]:
    traces = [folder / f"w{index}.trace" for index in range(n)]
    with ExitStack() as stack:
        workers = [
            stack.enter_context(
                rpc_server(
                    bin_dir,
                    folder,
                    *options,
                    "--push-listen",
                    f"unix:{folder}/in{index}",
                    "--push-to",
                    f"unix:{folder}/out{index}",
                    name=f"w{index}",
                    env={"GGML_RPC_TRACE": str(traces[index])},
                )
            )
            for index in range(n)
        ]
        joints = []
        for index in range(n - 1):
            joints.append(Joint(folder / f"out{index}", folder / f"in{index + 1}"))
            stack.callback(joints[index].cut)
        yield Ring(workers, joints, traces)


def write_ring(path: Path, workers: Sequence[Running]) -> Path:
    """What GGML_RPC_MESH_RING names; it appears whole."""
    pairs = itertools.pairwise(workers)
    growing = path.with_suffix(".new")
    growing.write_text("".join(f"{one.address}\t{other.address}\n" for one, other in pairs))
    return growing.rename(path)
