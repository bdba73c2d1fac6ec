"""The table of kills: who is killed with kill -9 at which moment, and what must hold after it.

One case is a worker and an orchestrator in fresh homes. A node stands still at the case's point
(`meshnode.crash_points`), the victim is killed, and started again where it is a node. Then:

- no process of the victim's is left, and no socket or manifest of an ended lease;
- the other side lives, and said what happened; a joiner whose inviter died in the middle of the
  join may end with a sentence instead, and is started again;
- where a lease's owner was lost, the lease ended within two seconds of that being known;
- every file of both homes can be read, and is of the same node as before;
- the model answers again, by itself, with the same tokens as alone.

`./just kills 10 --write` runs the table ten times and writes docs/kills.md.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import httpx
import psutil
import trio

from meshnode.crash_points import CRASH_AT_VARIABLE, CRASH_GATE_VARIABLE
from meshnode.demo.nodes import NodeFailed, NodeProcess, invite_token, open_node, write_token
from meshnode.paths import runtime_folder
from tests.e2e.test_two_nodes import greedy_tokens
from tests.engine.synthetic import make_model

LEASE_FREED_WITHIN_S = 2.0
NOTICE_S = 60.0
ORPHANS_GONE_WITHIN_S = 10.0
MID_GENERATION_EVENTS = 20
COMPARED_TOKENS = 16


class Role(Enum):
    """A process of the scene."""

    WORKER = "worker"
    ORCHESTRATOR = "orchestrator"
    RPC_SERVER = "rpc-server"
    LLAMA_SERVER = "llama-server"

    @property
    def is_node(self) -> bool:
        return self in NODES


NODES = (Role.WORKER, Role.ORCHESTRATOR)
ENGINES = (Role.RPC_SERVER, Role.LLAMA_SERVER)


@dataclass(frozen=True)
class Kill:
    """`held`: who stands at the point; None for moments that are seen from outside."""

    point: str
    held: Role | None
    victim: Role

    def __str__(self) -> str:
        return f"{self.point}-{self.victim.value}"


def _table() -> tuple[Kill, ...]:
    joiner, inviter = Role.ORCHESTRATOR, Role.WORKER
    rows: list[tuple[str, Role | None, tuple[Role, ...]]] = [
        ("join.asked", joiner, NODES),
        ("join.burned", inviter, NODES),
        ("join.saved", inviter, NODES),
        ("join.granted", joiner, NODES),
        ("join.introduced", joiner, NODES),
        ("lease.asked", Role.ORCHESTRATOR, NODES),
        ("lease.reserved", Role.WORKER, NODES),
        ("lease.manifest", Role.WORKER, NODES),
        ("lease.started", Role.WORKER, (*NODES, Role.RPC_SERVER)),
        ("lease.granted", Role.ORCHESTRATOR, (*NODES, Role.RPC_SERVER)),
        ("load.started", Role.ORCHESTRATOR, (*NODES, *ENGINES)),
        ("load.first", Role.ORCHESTRATOR, (*NODES, *ENGINES)),
        ("load.half", Role.ORCHESTRATOR, (*NODES, *ENGINES)),
        ("load.loaded", Role.ORCHESTRATOR, (*NODES, *ENGINES)),
        ("ready", None, (*NODES, *ENGINES)),
        ("generation.first", None, (*NODES, *ENGINES)),
        ("generation.mid", None, (*NODES, *ENGINES)),
        ("end.deployment", Role.ORCHESTRATOR, NODES),
        ("end.lease", Role.WORKER, NODES),
    ]
    return tuple(Kill(point, held, victim) for point, held, victims in rows for victim in victims)


TABLE = _table()
_ONCE = ("lease.granted", "load.half", "ready", "generation.mid")
SHORT_TABLE = tuple(kill for kill in TABLE if kill.victim in NODES or kill.point in _ONCE)
"""Each point, either node, and the engines at some."""


def make_kill_model(folder: Path) -> Path:
    """Large enough that a load which crosses the wire is seen under way: 20 MB."""
    return make_model(folder / "small.gguf", layers=8, width=512, ffn=1024, seed=1, name="small")


async def tokens_alone(folder: Path, model: Path) -> list[int]:
    """What the model answers on one node."""
    async with open_node(
        *("serve", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--threads", "1"),
        *("--model", str(model), "--split", "never"),
        name="alone",
        home=folder / "alone",
        log_folder=folder,
        engine_options=("--no-repack",),
    ) as node:
        return await greedy_tokens((await node.wait_event("ready"))["url"], COMPARED_TOKENS)


# -- the gate -------------------------------------------------------------------------------------


class Gate:
    """Where a process stands still until it is released, or killed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held: trio.SocketStream | None = None

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Gate]:
        with trio.socket.socket(trio.socket.AF_UNIX) as listener:
            await listener.bind(str(self.path))
            listener.listen()
            self._listener = listener
            yield self

    async def wait(self, point: str) -> None:
        with trio.fail_after(NOTICE_S):
            connection, _ = await self._listener.accept()
            self._held = trio.SocketStream(connection)
            assert await self._held.receive_some() == point.encode() + b"\n"

    async def release(self) -> None:
        if self._held is not None:
            await self._held.aclose()
            self._held = None


# -- the scene ------------------------------------------------------------------------------------


@dataclass
class Scene:
    """Two nodes in one folder, started and started again."""

    folder: Path
    model: Path
    stack: AsyncExitStack
    gate: Gate
    nodes: dict[Role, NodeProcess] = field(default_factory=dict)
    token: Path | None = None
    peers: dict[Role, str] = field(default_factory=dict)

    async def start(self, role: Role, point: str | None = None) -> NodeProcess:
        environment = {}
        if point is not None:
            environment = {CRASH_AT_VARIABLE: point, CRASH_GATE_VARIABLE: str(self.gate.path)}
        node = await self.stack.enter_async_context(
            open_node(
                *self._arguments(role),
                name=role.value,
                home=self.home(role),
                log_folder=self.folder,
                engine_options=() if role is Role.WORKER else ("--no-repack",),
                environment=environment,
            )
        )
        self.nodes[role] = node
        if role is Role.WORKER and self.token is None:
            token = invite_token(await node.wait_event("invite"))
            self.token = write_token(self.folder / "token", token)
        return node

    def _arguments(self, role: Role) -> list[str]:
        common = ["--listen", "127.0.0.1:0", "--threads", "1"]
        if role is Role.WORKER:
            return ["worker", *common]  # without the file: the load crosses the wire
        serve = ["--model", str(self.model), "--split", "always", "--http", "127.0.0.1:0"]
        return ["serve", *common, *serve, "--join-file", str(self.token)]

    def home(self, role: Role) -> Path:
        return self.folder / role.value

    def processes(self, role: Role) -> list[psutil.Process]:
        """The node's engine processes."""
        return psutil.Process(self.nodes[role].pid).children(recursive=True)

    def pid_of(self, victim: Role) -> int:
        if victim.is_node:
            return self.nodes[victim].pid
        owner = Role.WORKER if victim is Role.RPC_SERVER else Role.ORCHESTRATOR
        name = "ggml-rpc-server" if victim is Role.RPC_SERVER else "llama-server"
        (pid,) = (one.pid for one in self.processes(owner) if name in " ".join(one.cmdline()[:1]))
        return pid

    def kill(self, victim: Role) -> list[psutil.Process]:
        """Returns the processes that must not outlive it."""
        orphans = self.processes(victim) if victim.is_node else []
        os.kill(self.pid_of(victim), signal.SIGKILL)
        return orphans


@asynccontextmanager
async def open_scene(folder: Path, model: Path) -> AsyncIterator[Scene]:
    async with Gate(folder / "gate").opened() as gate, AsyncExitStack() as stack:
        yield Scene(folder, model, stack, gate)


# -- one case -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """Seconds from the kill to an answer's being possible again; from the owner's loss to the end
    of its lease, where one was lost."""

    recovered_s: float
    freed_s: float | None


async def run_case(kill: Kill, folder: Path, model: Path, expected: list[int]) -> Outcome:
    """Raises `AssertionError` or `NodeFailed` where something does not hold."""
    async with open_scene(folder, model) as scene:
        async with _at_its_moment(kill, scene) as answer:
            ids = {role: scene.nodes[role].events for role in scene.nodes}
            before = {role: _peer_id(events) for role, events in ids.items()}
            seen = {role: len(node.events) for role, node in scene.nodes.items()}
            killed_at_s = trio.current_time()
            orphans = scene.kill(kill.victim)
            await scene.gate.release()
            await _until_gone(orphans)
            if kill.victim.is_node:
                await scene.nodes[kill.victim].wait_exit()
                await scene.start(kill.victim)
                seen[kill.victim] = 0
            if answer is not None and kill.victim is not Role.ORCHESTRATOR:
                assert '"error"' in await answer(), "the client was told"
        await _restart_a_joiner_that_gave_up(kill, scene, seen)
        node = scene.nodes[Role.ORCHESTRATOR]
        ready_at_s, tokens = await _first_answer(node, seen[Role.ORCHESTRATOR], len(expected))
        recovered_s = ready_at_s - killed_at_s
        assert tokens == expected
        for role, peer in before.items():
            assert _peer_id(scene.nodes[role].events) == peer, "the same node as before"
        _check_folders(scene)
        freed_s = _freed_s(scene.nodes[Role.WORKER], kill)
        await _stop_all(scene)
    _check_homes(folder)
    return Outcome(recovered_s, freed_s)


@asynccontextmanager
async def _at_its_moment(
    kill: Kill, scene: Scene
) -> AsyncIterator[Callable[[], Awaitable[str]] | None]:
    """Both nodes as they are at the moment of the kill; the reader of an answer under way."""
    gates = {kill.held: kill.point}
    await scene.start(Role.WORKER, gates.get(Role.WORKER))
    node = await scene.start(Role.ORCHESTRATOR, gates.get(Role.ORCHESTRATOR))
    if kill.point.startswith("end."):
        await node.wait_event("ready", timeout_s=NOTICE_S)
        os.kill(scene.pid_of(Role.LLAMA_SERVER), signal.SIGKILL)
    if kill.held is not None:
        await scene.gate.wait(kill.point)
        yield None
        return
    url = (await node.wait_event("ready", timeout_s=NOTICE_S))["url"]
    if kill.point == "ready":
        yield None
        return
    body = {"prompt": "one", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    async with (
        httpx.AsyncClient(base_url=url, timeout=NOTICE_S) as client,
        client.stream("POST", "/v1/completions", json=body) as response,
    ):
        lines = response.aiter_lines()
        for _ in range(1 if kill.point == "generation.first" else 2 * MID_GENERATION_EVENTS):
            await anext(lines)

        async def rest() -> str:
            return "".join([line async for line in lines][-3:])

        yield rest


async def _restart_a_joiner_that_gave_up(kill: Kill, scene: Scene, seen: dict[Role, int]) -> None:
    """A join that loses its inviter ends in a sentence; the user joins again, once that listens:
    before, a join is refused at once, as it should be."""
    if not kill.point.startswith("join.") or kill.victim is not Role.WORKER:
        return
    node = scene.nodes[Role.ORCHESTRATOR]
    try:
        await node.wait_event("ready", timeout_s=NOTICE_S)
    except NodeFailed:
        assert await node.wait_exit() == 4, node.last_lines
        assert "joining failed" in " ".join(node.last_lines)
        await scene.nodes[Role.WORKER].wait_event("node", containing="listens at")
        await scene.start(Role.ORCHESTRATOR)
    seen[Role.ORCHESTRATOR] = 0


async def _first_answer(node: NodeProcess, seen: int, count: int) -> tuple[float, list[int]]:
    """When the node was ready for it, and its tokens. A model that was loaded already as a worker
    died under it is announced, and withdrawn with the news: then the next one counts."""
    while True:
        ready = await node.wait_event("ready", after=seen, timeout_s=NOTICE_S)
        seen = node.events.index(ready, seen) + 1
        try:
            tokens = await greedy_tokens(ready["url"], count)
        except AssertionError as refused:
            if not any(word in str(refused) for word in ("upstream_lost", "not_ready")):
                raise
        else:
            return node.heard_at_s[seen - 1], tokens


def _peer_id(events: list[dict[str, object]]) -> object:
    return next(
        (event["peer"] for event in events if event["event"] == "node" and "peer" in event), None
    )


async def _until_gone(processes: list[psutil.Process]) -> None:
    _, alive = await trio.to_thread.run_sync(psutil.wait_procs, processes, ORPHANS_GONE_WITHIN_S)
    assert not alive, f"orphans: {alive}"


def _freed_s(worker: NodeProcess, kill: Kill) -> float | None:
    """From the worker's word that the owner is lost to its word that the lease has ended."""
    lost_s = freed_s = None
    for event, heard_s in zip(worker.events, worker.heard_at_s, strict=True):
        if event["event"] == "peer" and not event["up"]:
            lost_s = heard_s
        if event["event"] == "lease" and "free again" in event["text"] and lost_s is not None:
            freed_s = heard_s - lost_s
            assert freed_s < LEASE_FREED_WITHIN_S, f"{kill}: freed after {freed_s:.1f} s"
    leases = [event["text"] for event in worker.events if event["event"] == "lease"]
    assert sum("lent" in text for text in leases) <= 1 + sum("free" in text for text in leases)
    return None if freed_s is None else max(0.0, freed_s)


def _check_folders(scene: Scene) -> None:
    """Only what the running lease and deployment need is there."""
    worker, node = (runtime_folder(scene.home(role)) for role in NODES)
    left = [path.name for path in worker.iterdir() if path.name != "node.sock"]
    assert len(left) == 1, f"one lease's folder: {left}"
    (_one,) = (one for one in scene.processes(Role.WORKER) if "rpc-server" in one.cmdline()[0])
    names = [path.name for path in node.iterdir() if path.name != "node.sock"]
    assert len({name.split("-")[1].split(".")[0] for name in names}) == 1, names
    (_one,) = (one for one in scene.processes(Role.ORCHESTRATOR) if "llama-server" in one.name())


async def _stop_all(scene: Scene) -> None:
    for role in reversed(NODES):
        children = scene.processes(role)
        await scene.nodes[role].stop()
        assert await scene.nodes[role].wait_exit() == 0
        await _until_gone(children)


def _check_homes(folder: Path) -> None:
    for role in NODES:
        home = folder / role.value
        assert not list(home.glob(".*"))
        for name in ("membership.json", "invites.json", "port.json"):
            if (home / name).exists():
                assert isinstance(json.loads((home / name).read_bytes()), dict)
        for log in (folder / f"{role.value}.log", home / "logs" / "mesh.log"):
            assert "Traceback" not in log.read_text(errors="replace"), log
