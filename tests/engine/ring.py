"""Rings of RPC servers: between each and the next, what mesh does, as a thread that copies bytes.

A server listens at both ends, for what is pushed to it and for whoever carries on what it pushes.
"""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.engine.processes import Running

CHUNK_BYTES = 1 << 16


def push_arguments(folder: Path, name: str) -> list[str]:
    """Of an RPC server that can be in a ring."""
    return [
        *("--push-listen", f"unix:{folder / name}.in"),
        *("--push-to", f"unix:{folder / name}.out"),
    ]


class Carrier:
    """I carry from one server's outlet to the next one's inlet, and count."""

    def __init__(self, outlet: Path, inlet: Path) -> None:
        self.carried_bytes = 0
        self._outlet = _connected(outlet)
        self._inlet = _connected(inlet)
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._outlet.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._outlet.close()
        self._inlet.close()

    def _carry(self) -> None:
        while data := self._outlet.recv(CHUNK_BYTES):
            self._inlet.sendall(data)
            self.carried_bytes += len(data)


def _connected(path: Path) -> socket.socket:
    found = socket.socket(socket.AF_UNIX)
    found.connect(str(path))
    return found


@contextmanager
def ring(folder: Path, workers: Sequence[Running]) -> Iterator[list[Carrier]]:
    """Carriers between each of `workers`, whose sockets lie beside their RPC sockets, and the next.

    `folder`/ring is the file for llama-server's GGML_RPC_MESH_RING.
    """
    sockets = [Path(worker.address.removeprefix("unix:")) for worker in workers]
    pairs = list(itertools.pairwise(workers))
    lines = [f"{one.address}\t{next_one.address}\n" for one, next_one in pairs]
    (folder / "ring").write_text("".join(lines))
    with ExitStack() as stack:
        carriers = [
            Carrier(one.with_suffix(".out"), next_one.with_suffix(".in"))
            for one, next_one in itertools.pairwise(sockets)
        ]
        for carrier in carriers:
            stack.callback(carrier.close)
        yield carriers
