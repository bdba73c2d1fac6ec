"""`./just bench pull`, second part: a model from other members, beside the bare link.

Processes with TLS/TCP links between them, as nodes on one network have. By turns: bytes out of
memory over streams of the link, received and dropped; then as many of a slice's by the `store`
service into a sparse file, read from a disk that the system has in memory.

A stream can be used by the event loop, as most services of a node do, and by threads
(`tunnels.as_socket`), which costs half and is what a pull does: that is the link's rate.

Hosts of virtual machines may take free memory away within a second and be slow to give it again: on
the machine of docs/benchmarks.md a gigabyte of a new file takes 1.7 s of a core then, and 0.2 s in
memory that was in use before. So there are two pulls: over a file that is in memory from the turn
before, which shows what this way of the bytes costs; and into a new one, as a user's pull is.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio

from meshnode.models.peers.source import Holders, PeerSource
from meshnode.models.pull.pull import Pull, Supply
from meshnode.models.spans import Span, size_of, within
from tests.bench.peer_givers import Giver, bare_s, fill_store, givers, line
from tests.bench.processes import LOOPBACK, verdict
from tests.bench.pull_speed import SparseFile
from tests.netlab import netns
from tunnels import Candidate, Endpoint, Identity, PeerId, Session

TO_REACH = 0.80
MODEL_BYTES = 10**9
CONNECTIONS = (1, 4)
LINE_MBIT = 1000
LINE_BYTES = 250 * 10**6
LIMITS_MB = ((20,), (20, 20), (20, 4))
LIMITED_BYTES = 300 * 10**6
WITHIN = 0.05
WAYS = ("loop", "thread")
PULLS = ("kept", "new")
T = TypeVar("T")


@dataclass(frozen=True)
class Scene:
    """The asking end: members that hold all of a model, and where to put it."""

    sessions: tuple[Session, ...]
    sources: tuple[PeerSource, ...]
    folder: Path

    def wanted(self, size_bytes: int) -> tuple[Span, ...]:
        """The first of what they hold."""
        assert self.sources[0].holds is not None
        return within((Span(0, 0, size_bytes),), self.sources[0].holds)

    async def pull_s(self, wanted: Sequence[Span], connections: int, name: str) -> float:
        """`kept` stays for the next time."""
        path = self.folder / name
        sink = SparseFile(path, self.sources[0].files[0].size_bytes, is_new=not path.exists())
        try:
            began = time.monotonic()
            supplies = [Supply(source, connections) for source in self.sources]
            await Pull(wanted, supplies, sink).run()
            return time.monotonic() - began
        finally:
            sink.close()
            if name != "kept":
                path.unlink()


Rates = dict[str, float]
"""Bytes a second, by what was measured."""


async def beside_the_link(scene: Scene, rounds: int, size_bytes: int) -> dict[int, list[Rates]]:
    """By connections, of each round."""
    (session,), wanted = scene.sessions, scene.wanted(size_bytes)
    found: dict[int, list[Rates]] = {count: [] for count in CONNECTIONS}
    for turn in range(rounds + 1):  # the first makes the file that is kept, and does not count
        for count in CONNECTIONS:
            steps: dict[str, Callable[[], Awaitable[float]]] = {
                **{way: partial(bare_s, session, way, size_of(wanted), count) for way in WAYS},
                **{name: partial(scene.pull_s, wanted, count, name) for name in PULLS},
            }
            rates = {}
            for name in steps if turn % 2 else reversed(steps):
                os.sync()
                rates[name] = size_of(wanted) / await steps[name]()
            found[count] += [rates] if turn else []
    return found


async def from_limited(scene: Scene) -> float:
    """Bytes a second that came."""
    wanted = scene.wanted(LIMITED_BYTES)
    return size_of(wanted) / await scene.pull_s(wanted, CONNECTIONS[-1], "new")


def run_scene(
    folder: Path,
    identity: str,
    found: Sequence[Giver],
    work: Callable[[Scene], Awaitable[T]],
    host: str = LOOPBACK,
) -> T:
    async def main() -> T:
        endpoint = Endpoint(Identity.generate(), authorize=lambda *_: False, transports=("tcp",))
        async with trio.open_nursery() as nursery:
            await nursery.start(endpoint.run, host, 0)
            sessions = [
                await endpoint.connect(PeerId(one.key), [Candidate("tcp", one.host, one.port)])
                for one in found
            ]
            sources = await Holders(lambda: sessions, lambda _: "peer").find(identity)
            assert len(sources) == len(found)
            outcome = await work(Scene(tuple(sessions), tuple(sources), folder))
            nursery.cancel_scope.cancel()
        return outcome

    return trio.run(main)


# --- what is shown -------------------------------------------------------------------------


def peer_rows(rounds: int) -> list[str]:
    with tempfile.TemporaryDirectory(prefix="mesh-bench-peer-") as name:
        folder = Path(name)
        identity = trio.run(fill_store, folder, MODEL_BYTES)
        return [
            *on_loopback(folder, identity, rounds),
            *on_a_line(folder, identity, rounds),
            *under_limits(folder, identity),
        ]


def on_loopback(folder: Path, identity: str, rounds: int) -> list[str]:
    work = partial(beside_the_link, rounds=rounds, size_bytes=MODEL_BYTES)
    with givers(folder / "store", LOOPBACK) as found:
        measured = run_scene(folder, identity, found, work)
    title = f"{MODEL_BYTES // 10**6} MB from a member (tcp, loopback)"
    return table(title, measured, "pull from a member, of the link's rate")


def on_a_line(folder: Path, identity: str, rounds: int) -> list[str]:
    if not netns.can_be_made():
        return [
            "",
            f"A line of {LINE_MBIT} Mbit/s: not measured, that needs root and ./just setup.",
        ]
    work = partial(beside_the_link, rounds=rounds, size_bytes=LINE_BYTES)
    with line(LINE_MBIT) as (near, far), ExitStack() as stack:
        with far.entered():
            found = stack.enter_context(givers(folder / "store", "10.78.0.2"))
        with near.entered():
            measured = run_scene(folder, identity, found, work, "10.78.0.1")
    title = f"{LINE_BYTES // 10**6} MB over a line of {LINE_MBIT} Mbit/s"
    return table(title, measured, f"the same over {LINE_MBIT} Mbit/s")


def table(title: str, measured: dict[int, list[Rates]], what: str) -> list[str]:
    rows, worst = [], dict.fromkeys(PULLS, 1.0)
    for count, rounds in measured.items():
        cells = [f"{_median(rounds, way) / 1e6:.0f} MB/s" for way in WAYS]
        for name in PULLS:
            ratio = statistics.median(one[name] / one["thread"] for one in rounds)
            worst[name] = min(worst[name], ratio)
            cells += [f"{_median(rounds, name) / 1e6:.0f} MB/s", f"{ratio:.2f}"]
        rows.append(f"| {count} | {' | '.join(cells)} |")
    return [
        "",
        f"| {title}, connections | link, event loop | link, threads | pull, file in memory "
        "| of the link's | pull, new file | of the link's |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
        verdict(f"{what}, file in memory", worst["kept"], at_least=TO_REACH),
        "",
        verdict(f"{what}, new file", worst["new"], at_least=TO_REACH),
    ]


def _median(rounds: Sequence[Rates], name: str) -> float:
    return statistics.median(one[name] for one in rounds)


def under_limits(folder: Path, identity: str) -> list[str]:
    rows, verdicts = [], []
    for limits in LIMITS_MB:
        with givers(folder / "store", LOOPBACK, [limit * 1e6 for limit in limits]) as found:
            rate = run_scene(folder, identity, found, from_limited) / 1e6
        share = rate / sum(limits)
        shown = " + ".join(str(limit) for limit in limits)
        rows.append(f"| {shown} MB/s | {rate:.1f} MB/s | {share:.3f} |")
        what = f"pull under limits of {shown} MB/s, of their sum"
        verdicts += ["", verdict(what, share, at_least=1 - WITHIN, at_most=1 + WITHIN)]
    return [
        "",
        f"| {LIMITED_BYTES // 10**6} MB, `--upload-limit` of each member | pull | of the limits |",
        "|---|---|---|",
        *rows,
        *verdicts,
    ]
