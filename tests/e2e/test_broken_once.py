"""What once broke a node: careless users, full disks, odd names, files replaced at bad times."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from meshnode.crash_points import CRASH_AT_VARIABLE, CRASH_GATE_VARIABLE
from meshnode.demo.nodes import NodeProcess, write_token
from meshnode.demo.run import greedy
from meshnode.engine.llama_server import refuse_planned_options
from meshnode.errors import UsageError
from tests.e2e.conftest import ANY_HTTP, COMMAND_TIMEOUT_S, LOOPBACK, Mesh, World
from tests.engine.synthetic import make_model
from tests.kills import Gate

pytestmark = pytest.mark.engine

USAGE, MODEL, RESOURCES, HOME, INTERRUPTED = 2, 6, 7, 8, 130
MESH = (sys.executable, "-m", "meshnode.cli.main")
WAIT_S = 60
NO_SUCH_MODEL = ("serve", *LOOPBACK, *ANY_HTTP, "--split", "never", "--model", "/none.gguf")


def run_in_shell(script: str, *arguments: str, cwd: Path | None = None) -> tuple[int, str]:
    """`script` gets the command as "$@"; its exit code, and all that it said."""
    done = subprocess.run(
        ["/bin/sh", "-c", script, "sh", *MESH, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
        cwd=cwd,
        check=False,
    )
    return done.returncode, done.stdout


# -- files replaced between the digest and the load -----------------------------------------------


@pytest.fixture
async def gate(tmp_path: Path) -> AsyncIterator[Gate]:
    with tempfile.TemporaryDirectory(prefix="mesh-gate-") as folder:  # a short path
        async with Gate(Path(folder) / "gate").opened() as gate:
            yield gate


@asynccontextmanager
async def held_before_the_load(
    world: World, gate: Gate, models: Path
) -> AsyncIterator[NodeProcess]:
    """A worker that stands still after the digests, before its rpc-server starts."""
    environment = {CRASH_AT_VARIABLE: "lease.manifest", CRASH_GATE_VARIABLE: str(gate.path)}
    async with world.worker("--models", str(models), environment=environment) as worker:
        yield worker


def variant(path: Path, seed: int) -> Path:
    path.parent.mkdir(exist_ok=True)
    return make_model(path, layers=8, width=128, ffn=256, seed=seed, name="m")


async def tokens_of(node: NodeProcess) -> tuple[int, ...]:
    return (await greedy(str((await node.wait_event("ready"))["url"]))).tokens


async def tokens_alone(world: World, model: Path) -> tuple[int, ...]:
    async with world.serve("--model", str(model), "--split", "never", name="alone") as node:
        return await tokens_of(node)


async def test_a_model_replaced_after_its_digest_is_never_mixed_with_the_old_one(
    world: World, gate: Gate
) -> None:
    """Else the first layers are the new file's and the rest the old one's, and nobody is told."""
    theirs = variant(world.folder / "theirs" / "m.gguf", seed=1)
    ours = variant(world.folder / "ours" / "m.gguf", seed=1)
    new = variant(world.folder / "new" / "m.gguf", seed=2)
    expected = await tokens_alone(world, new)
    async with held_before_the_load(world, gate, theirs.parent) as worker:
        joins = ("--join-file", str(await world.join_file(worker)))
        async with world.serve("--model", str(ours), "--split", "always", *joins) as node:
            await gate.wait("lease.manifest")
            new.replace(ours)
            await gate.release()
            assert await tokens_of(node) == expected


async def test_a_workers_file_replaced_after_its_digest_does_not_end_the_orchestrator(
    world: World, gate: Gate
) -> None:
    theirs = variant(world.folder / "theirs" / "m.gguf", seed=1)
    ours = variant(world.folder / "ours" / "m.gguf", seed=1)
    new = variant(world.folder / "new" / "m.gguf", seed=2)
    expected = await tokens_alone(world, ours)
    async with held_before_the_load(world, gate, theirs.parent) as worker:
        joins = ("--join-file", str(await world.join_file(worker)))
        async with world.serve("--model", str(ours), "--split", "always", *joins) as node:
            await gate.wait("lease.manifest")
            new.replace(theirs)
            await gate.release()
            assert await tokens_of(node) == expected


# -- folders of models ----------------------------------------------------------------------------


async def test_a_link_to_itself_among_the_models_is_passed_over(world: World) -> None:
    folder = world.folder / "models"
    folder.mkdir()
    (folder / "loop.gguf").symlink_to("loop.gguf")
    async with world.worker("--models", str(folder)) as worker:
        await worker.wait_event("invite")


@pytest.mark.parametrize("name", [b"caf\xe9.gguf", b"line\nbreak.gguf"])
async def test_a_file_with_an_odd_name_does_not_keep_a_worker_from_lending(
    world: World, small_model: Path, name: bytes
) -> None:
    folder = world.folder / "models"
    folder.mkdir()
    shutil.copyfile(small_model, os.fsencode(folder) + b"/" + name)
    async with world.worker("--models", str(folder)) as worker:
        joins = ("--join-file", str(await world.join_file(worker)))
        async with world.serve("--model", str(small_model), "--split", "always", *joins) as node:
            with trio.fail_after(WAIT_S):
                await node.wait_event("ready")


# -- homes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["node.key", "root.key"])
def test_a_damaged_key_is_told_in_one_sentence(mesh: Mesh, tmp_path: Path, key: str) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / key).write_text("garbage")
    mesh("worker", *LOOPBACK).check(HOME, key)


def test_a_full_disk_is_told_in_one_sentence(tmp_path: Path) -> None:
    """A limit on file sizes stands for the full disk."""
    home = ("--home", str(tmp_path / "home"))
    exit_code, said = run_in_shell('ulimit -f 0; exec "$@"', "worker", *LOOPBACK, *home)
    assert "Traceback" not in said
    assert exit_code == RESOURCES, said


def test_an_empty_home_is_not_the_current_folder(tmp_path: Path) -> None:
    """`--home "$UNSET"`."""
    tmp_path.chmod(0o755)
    exit_code, said = run_in_shell('exec "$@"', *NO_SUCH_MODEL, "--home", "", cwd=tmp_path)
    assert not list(tmp_path.iterdir())
    assert tmp_path.stat().st_mode & 0o777 == 0o755
    assert exit_code == USAGE, said


def test_somebody_elses_folder_given_as_home_keeps_its_mode(mesh: Mesh, tmp_path: Path) -> None:
    """`--home /tmp` as root closed /tmp to all users."""
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "notes.txt").touch()
    shared.chmod(0o1777)
    mesh(*NO_SUCH_MODEL, "--home", str(shared))
    assert shared.stat().st_mode & 0o7777 == 0o1777


async def test_a_node_is_found_whatever_the_runtime_folder_of_the_shell(
    mesh: Mesh, world: World
) -> None:
    """A node started by the desktop's session, asked through ssh, sudo or cron."""
    with tempfile.TemporaryDirectory(dir="/tmp") as runtime:
        env = {"XDG_RUNTIME_DIR": runtime}
        async with world.worker() as worker:
            await worker.wait_event("invite")
            home = str(world.folder / "worker")
            ask = partial(mesh, "status", "--home", home, env=env)
            (await trio.to_thread.run_sync(ask)).check(0)


# -- terminals ------------------------------------------------------------------------------------


def test_a_closed_standard_output_is_no_defect(tmp_path: Path) -> None:
    home = ("--home", str(tmp_path / "home"))
    exit_code, said = run_in_shell('exec "$@" 3>&1 1>&-', *NO_SUCH_MODEL, *home)
    assert "internal error" not in said
    assert exit_code == MODEL, said


def test_a_standard_output_that_takes_nothing_is_no_defect(tmp_path: Path) -> None:
    home = ("--home", str(tmp_path / "home"))
    exit_code, said = run_in_shell('exec "$@" >/dev/full', "worker", *LOOPBACK, *home)
    assert exit_code != 0
    assert "internal error" not in said


def test_ctrl_c_while_python_still_imports_shows_no_traceback(tmp_path: Path, mesh: Mesh) -> None:
    (tmp_path / "blake3.py").write_text("raise KeyboardInterrupt\n")
    mesh("worker", env={"PYTHONPATH": str(tmp_path)}).check(INTERRUPTED)


# -- options --------------------------------------------------------------------------------------


def test_options_with_underscores_are_the_same_options() -> None:
    """llama-server reads --n_gpu_layers as --n-gpu-layers."""
    with pytest.raises(UsageError):
        refuse_planned_options(("--n_gpu_layers", "3"))


async def test_one_dead_invite_does_not_hold_up_the_others(world: World, small_model: Path) -> None:
    async with world.worker(name="dead") as dead:
        gone = write_token(world.folder / "gone", await world.token_of(dead))
    async with world.worker() as worker:
        alive = await world.join_file(worker)
        joins = ("--join-file", str(gone), "--join-file", str(alive))
        async with world.serve("--model", str(small_model), "--split", "always", *joins) as node:
            await node.wait_event("ready")


# -- the demo -------------------------------------------------------------------------------------


def test_a_second_demo_that_fails_leaves_the_first_to_be_stopped(
    mesh: Mesh, tmp_path: Path, engine_bin: Path
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(engine_bin.parent, cache / "engine" / "engines" / engine_bin.parent.name)
    env = {"MESH_CACHE": str(cache)}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        first = subprocess.Popen(
            [*MESH, "demo", "--stay", "--http", "127.0.0.1:0"],
            env={**os.environ, **env},
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert first.stdout
            assert "chat endpoint" in first.stdout.readline()
            reaper = threading.Thread(target=first.wait)  # `--stop` waits until it is reaped
            reaper.start()
            http = f"127.0.0.1:{taken.getsockname()[1]}"
            assert mesh("demo", "--stay", "--http", http, env=env).exit_code != 0
            mesh("demo", "--stop", env=env).check(0)
            reaper.join(WAIT_S)
            assert first.returncode == 0
        finally:
            first.terminate()
            first.wait(WAIT_S)
            if first.stdout:
                first.stdout.close()
