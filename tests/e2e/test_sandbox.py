"""What a worker says of its sandbox, and what another user of its machine can reach: nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import trio

from discovery.token import PREFIX
from meshnode.control import RUNTIME_RECORD
from meshnode.demo.nodes import NodeProcess
from tests.conftest import require
from tests.e2e.conftest import LOOPBACK, Mesh, World
from tests.e2e.test_two_nodes import greedy_tokens, url_of
from tests.probe import NOBODY, PACKAGES, WITHOUT_LANDLOCK, attempt, compile_probe

pytestmark = pytest.mark.engine

FULL = "sandbox: landlock"
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="landlock and seccomp: Linux")


@linux_only
async def test_a_worker_says_what_confines_its_servers(world: World) -> None:
    async with world.worker("--sandbox", "require") as worker:
        event = await worker.wait_event("node", containing="sandbox:")
    assert event["text"].startswith(FULL)
    assert event["text"].endswith("no network")
    assert {"files", "calls"} <= set(event["sandbox"])


async def test_off_is_said_and_serves_the_same_tokens(world: World, small_model: Path) -> None:
    tokens = []
    for mode in ("off", "auto"):
        models = ("--models", str(small_model.parent))
        async with world.worker("--sandbox", mode, *models, name=mode) as worker:
            event = await worker.wait_event("node", containing="sandbox:")
            assert (event["text"] == "sandbox: off: asked for with --sandbox off") == (
                mode == "off"
            )
            joins = ("--join-file", str(await world.join_file(worker)))
            arguments = ("--model", str(small_model), "--split", "always", *joins)
            async with world.serve(*arguments, name=f"to-{mode}") as node:
                tokens.append(await greedy_tokens(await url_of(node)))
    assert tokens[0] == tokens[1]


def old_kernel(*arguments: str) -> list[str]:
    """`mesh ARGUMENTS` where landlock's calls are answered as a kernel without it would."""
    return [sys.executable, "-c", WITHOUT_LANDLOCK, str(PACKAGES), "meshnode.cli.main", *arguments]


@linux_only
def test_require_refuses_to_start_on_a_kernel_that_cannot(tmp_path: Path) -> None:
    argv = old_kernel("worker", "--sandbox", "require", "--home", str(tmp_path / "home"), *LOOPBACK)
    run = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 3, run.stderr
    assert "Traceback" not in run.stderr
    (sentence,) = run.stderr.splitlines()
    assert sentence.startswith("mesh: --sandbox require: files: this kernel has no landlock")
    assert "--sandbox auto" in sentence


@linux_only
def test_auto_goes_on_with_what_there_is_and_warns(tmp_path: Path) -> None:
    home = tmp_path / "home"
    argv = old_kernel("worker", *LOOPBACK, "--home", str(home), "--log-format", "json")
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as node:
        assert node.stdout is not None
        try:
            events = (json.loads(line) for line in node.stdout)
            event = next(each for each in events if each["text"].startswith("sandbox:"))
        finally:
            node.terminate()
    assert event["event"] == "warning"
    assert event["text"].startswith("sandbox: partial: seccomp, no network, but files: this kernel")


def test_the_doctor_says_what_is_here_and_what_is_not_well(mesh: Mesh, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir(mode=0o700)
    told = mesh("doctor", "--json")
    assert told.exit_code == 0, told.stdout + told.stderr
    checks = {check["name"]: check for check in json.loads(told.stdout)["checks"]}
    assert {"engine", "sandbox", "home", "disk of the home", "open files"} <= set(checks)
    assert checks["engine"]["verdict"] == "ok"
    assert checks["home"]["verdict"] == "ok"
    (tmp_path / "home").chmod(0o755)
    told = mesh("doctor")
    assert told.exit_code == 1
    (line,) = [line for line in told.stdout.splitlines() if line.startswith("bad")]
    assert "is open to other users: chmod 700" in line


def test_the_sandbox_of_a_node_that_lends_nothing_is_a_mistake(mesh: Mesh) -> None:
    mesh("serve", "--sandbox", "require").check(2, "--lend")


# -- another user of the machine ------------------------------------------------------------------


@pytest.fixture
def open_world() -> Iterator[World]:
    """A world whose folder others may enter: nothing but a node's own care keeps them out."""
    with tempfile.TemporaryDirectory(prefix="mesh-", dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield World(Path(name))


@dataclass(frozen=True)
class Places:
    """Where two nodes that serve together keep what is theirs."""

    sockets: list[Path]
    folders: list[Path]
    files: list[Path]
    processes: list[psutil.Process]


def places(world: World, nodes: list[NodeProcess]) -> Places:
    homes = [world.folder / node.name for node in nodes]
    runtimes = [Path(os.fsdecode((home / RUNTIME_RECORD).read_bytes())) for home in homes]
    found = [path for folder in runtimes for path in folder.rglob("*")]
    family = [psutil.Process(node.pid) for node in nodes]
    family += [child for process in family for child in process.children(recursive=True)]
    return Places(
        sockets=[path for path in found if path.is_socket()],
        folders=[*homes, *runtimes, *(path for path in found if path.is_dir())],
        files=[path for home in homes for path in home.rglob("*") if path.is_file()],
        processes=family,
    )


async def test_another_user_of_the_machine_reaches_nothing(
    open_world: World, small_model: Path
) -> None:
    require("root", os.geteuid() == 0, "only root can become somebody else")
    probe = compile_probe(open_world.folder)
    async with open_world.worker("--models", str(small_model.parent)) as worker:
        joins = ("--join-file", str(await open_world.join_file(worker)))
        arguments = ("--model", str(small_model), "--split", "always", *joins)
        async with open_world.serve(*arguments) as node:
            url = await url_of(node)
            there = await trio.to_thread.run_sync(places, open_world, [worker, node])
            names = {path.name for path in there.sockets}
            assert {"node.sock", "rpc.sock"} <= names
            assert {"in.sock", "out.sock"} <= names, "for what neighbours in a ring push"
            assert len(there.sockets) == 7, "and a llama-server, and the way to the worker"
            assert {"node.key", "rpc-server.log"} <= {path.name for path in there.files}
            await trio.to_thread.run_sync(check_closed, probe, there)
            assert await greedy_tokens(url), "and its owner still uses it"


def check_closed(probe: Path, there: Places) -> None:
    """Every place is shut to nobody, and open to us."""
    attempts: list[tuple[str, object]] = [
        *(("connect", path) for path in there.sockets),
        *(("list", path) for path in there.folders),
        *(("read", path) for path in there.files),
        *(("read", f"/proc/{process.pid}/environ") for process in there.processes),
        *(("ptrace", process.pid) for process in there.processes),
        *(("signal", process.pid) for process in there.processes),
    ]
    for action, target in attempts:
        theirs = attempt(probe, action, target, user=NOBODY)
        assert theirs.error in ("EACCES", "EPERM"), (action, target, theirs)
        if action != "ptrace":  # which would stop a process for a moment
            ours = attempt(probe, action, target)
            assert ours.ok, (action, target, ours)
    for process in there.processes:
        # What all users see: a process's arguments, and the ports it listens on.
        assert PREFIX not in " ".join(process.cmdline())
        if process.name() in ("ggml-rpc-server", "llama-server"):
            assert process.net_connections(kind="inet") == []
