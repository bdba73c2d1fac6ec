"""Named points at which a test kills a process, or holds it while it kills another one.

A test facility, off unless the environment names a point:

- `MESH_CRASH_AT=POINT[:N]`: the process ends by SIGKILL when it reaches the point (for the N-th
  time; the first without a number). `POINT` is one of `POINTS`.
- `MESH_CRASH_GATE=SOCKET` beside it: instead of dying, the process connects to that unix socket,
  writes the point's name and a line break, and stands still, all its tasks with it, until the
  other end closes. Whoever listens there may kill it, its peer or its engine exactly then.

An unknown point is an error at the start: a test that waits for it would wait for ever.
"""

from __future__ import annotations

import os
import signal
import socket

CRASH_AT_VARIABLE = "MESH_CRASH_AT"
CRASH_GATE_VARIABLE = "MESH_CRASH_GATE"

POINTS = frozenset(
    (
        # A file of the home being replaced (meshnode/state.py).
        "state.opened",  # the new file is there, empty
        "state.half",  # half of it is written
        "state.written",  # all of it, not flushed
        "state.flushed",  # not yet in its place
        "state.renamed",  # in its place, the folder not flushed
        # Joining by token (meshnode/joining.py, bootstrap.py).
        "join.asked",  # joiner: the secret is sent
        "join.burned",  # inviter: a use is burned in memory, not on disk
        "join.saved",  # inviter: on disk, the grant not sent
        "join.granted",  # joiner: the grant has come, not on disk
        "join.introduced",  # joiner: both sides know each other
        # A lease (meshnode/pipeline/borrow.py, lease.py).
        "lease.asked",  # orchestrator: the request is sent
        "lease.reserved",  # worker: its memory is promised
        "lease.manifest",  # worker: the manifest for rpc-server is written
        "lease.started",  # worker: rpc-server runs, the grant not sent
        "lease.granted",  # orchestrator: the grant has come
        # A load (meshnode/engine/llama_server.py).
        "load.started",  # llama-server runs
        "load.first",  # the first bytes are loaded
        "load.half",
        "load.loaded",  # the model is loaded and committed, not yet announced
        # A slice being filled, and made smaller (meshnode/models/store/).
        "slice.created",  # its header is there, in a folder that is not in its place
        "slice.written",  # a range was received, not flushed
        "slice.flushed",  # the journal does not tell of it
        "slice.journalled",
        "slice.digested",  # tensors are whole, the document does not tell of them
        "slice.held",  # it does
        "slice.dropped",  # it tells of some no more, their bytes are still there
        # The end of a deployment, in order (meshnode/pipeline/deployment.py, lease.py).
        "end.deployment",  # orchestrator: llama-server is gone, the leases are held still
        "end.lease",  # worker: rpc-server is gone, the memory not yet free
    )
)


class CrashPoint:
    """I wait for one point to be reached for the n-th time, and act then, once."""

    def __init__(self, text: str, gate: str | None) -> None:
        """`ValueError` where `text` is no `POINT[:N]`."""
        self._point, _, number = text.partition(":")
        self._left = int(number or "1")
        self._gate = gate
        if self._point not in POINTS or self._left < 1:
            raise ValueError(f"{CRASH_AT_VARIABLE}={text}: no such point, see {__name__}")

    def reached(self, point: str) -> None:
        if point != self._point:
            return
        self._left -= 1
        if self._left == 0:
            self._act()

    def _act(self) -> None:
        if self._gate is None:
            os.kill(os.getpid(), signal.SIGKILL)
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as gate:
            gate.connect(self._gate)
            gate.sendall(self._point.encode() + b"\n")
            gate.recv(1)  # blocks the event loop with all that runs in it, as is wanted


def _from_environment() -> CrashPoint | None:
    text = os.environ.get(CRASH_AT_VARIABLE)
    return CrashPoint(text, os.environ.get(CRASH_GATE_VARIABLE)) if text else None


_WAITED_FOR = _from_environment()


def reached(point: str) -> None:
    """The calling code is at this point. Costs one comparison in a normal run."""
    if _WAITED_FOR is not None:
        _WAITED_FOR.reached(point)
