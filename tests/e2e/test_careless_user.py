"""Whatever a user gets wrong ends in one sentence and the exit code `meshnode.errors` lists."""

from __future__ import annotations

import os
import shutil
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from discovery.grants import Role
from discovery.token import Secret, Token, encode, parse_untrusted
from tests.e2e.conftest import Finished, Mesh, World
from tunnels import Candidate, Identity

pytestmark = pytest.mark.engine

USAGE, ENGINE, NETWORK, ACCESS, MODEL, RESOURCES, HOME = 2, 3, 4, 5, 6, 7, 8
QUIET = ("--listen", "127.0.0.1:0", "--log-format", "json")
GIVES_UP_S = 10


def some_token(port: int = 9, *, expires_in_s: int = 3600) -> Token:
    """A well-formed invite to a node that does not exist."""
    return Token(
        mesh=Identity.generate().peer.key,
        inviter=Identity.generate().peer,
        id=bytes(8),
        secret=Secret(bytes(range(16))),
        role=Role.PEER,
        expires_at=int(time.time()) + expires_in_s,
        uses=8,
        candidates=(Candidate("quic", "127.0.0.1", port),),
    )


def free_udp_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# -- tokens -------------------------------------------------------------------------------------


def test_a_text_that_is_no_token(mesh: Mesh) -> None:
    mesh("worker", *QUIET, "join=hello").check(ACCESS, "mesh1")


def test_a_token_with_one_letter_changed(mesh: Mesh) -> None:
    text = encode(some_token())
    changed = text[:-9] + ("q" if text[-9] != "q" else "p") + text[-8:]
    mesh("worker", *QUIET, f"join={changed}").check(ACCESS, "copy")


def test_a_token_cut_short(mesh: Mesh) -> None:
    mesh("worker", *QUIET, f"join={encode(some_token())[:60]}").check(ACCESS, "copy")


def test_an_expired_token(mesh: Mesh) -> None:
    text = encode(some_token(expires_in_s=-60))
    mesh("worker", *QUIET, f"join={text}").check(ACCESS, "expired", "mesh invite")


def test_no_token_on_standard_input(mesh: Mesh) -> None:
    mesh("worker", *QUIET, "join=-").check(ACCESS, "standard input")


def test_a_token_file_that_is_not_there(mesh: Mesh, tmp_path: Path) -> None:
    mesh("worker", *QUIET, "--join-file", str(tmp_path / "none")).check(ACCESS, "none")


def test_nobody_at_the_address_gives_up_and_says_what_was_tried(mesh: Mesh) -> None:
    def seconds(token: Token, code: int, words: str) -> float:
        began_s = time.monotonic()
        mesh("worker", *QUIET, "join=-", stdin=encode(token) + "\n").check(code, words)
        return time.monotonic() - began_s

    # The start of the program takes what the machine has left for it: it is measured, too.
    start_s = seconds(some_token(expires_in_s=-60), ACCESS, "expired")
    port = free_udp_port()
    assert seconds(some_token(port), NETWORK, f"127.0.0.1:{port}") < 2 * start_s + GIVES_UP_S


async def test_a_token_used_up(mesh: Mesh, world: World) -> None:
    async with world.worker() as inviter:
        await inviter.wait_event("invite")
        home = str(world.folder / "worker")
        token = (await in_thread(mesh, "invite", "--uses", "1", "--home", home)).stdout.strip()
        file = world.folder / "once"
        file.write_text(token)
        async with world.worker("--join-file", str(file), name="first") as first:
            await first.wait_event("peer")
        finished = await in_thread(mesh, "worker", *QUIET, "join=-", stdin=token + "\n")
        finished.check(ACCESS, "used up")


async def test_our_own_token(mesh: Mesh, world: World) -> None:
    async with world.worker() as inviter:
        token = await world.token_of(inviter)
    home = str(world.folder / "worker")
    finished = await in_thread(mesh, "worker", *QUIET, "--home", home, f"join={token}")
    finished.check(ACCESS, "another machine")


async def test_another_node_at_the_tokens_address(mesh: Mesh, world: World) -> None:
    async with world.worker() as other:
        token = parse_untrusted(await world.token_of(other))
        stray = replace(token, inviter=Identity.generate().peer)
        finished = await in_thread(mesh, "worker", *QUIET, "join=-", stdin=encode(stray) + "\n")
        finished.check(NETWORK, "wrong key")


# -- models -------------------------------------------------------------------------------------


def serve(mesh: Mesh, *arguments: str) -> Finished:
    return mesh("serve", *QUIET, "--http", "127.0.0.1:0", "--split", "never", *arguments)


def test_a_model_that_is_not_there(mesh: Mesh, tmp_path: Path) -> None:
    serve(mesh, "--model", str(tmp_path / "none.gguf")).check(MODEL, "none.gguf")


def test_a_model_name_nobody_knows(mesh: Mesh) -> None:
    serve(mesh, "--model", "mesh-dmo").check(MODEL, "did you mean mesh-demo")


def test_a_file_that_is_not_a_gguf(mesh: Mesh, tmp_path: Path) -> None:
    path = tmp_path / "notes.gguf"
    path.write_text("not a model at all, just some notes")
    serve(mesh, "--model", str(path)).check(MODEL, "notes.gguf", "GGUF")


def test_a_gguf_cut_short(mesh: Mesh, tmp_path: Path, small_model: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(small_model.read_bytes()[:-100_000])
    serve(mesh, "--model", str(path)).check(MODEL, "cut.gguf")


# -- ports, homes, options ----------------------------------------------------------------------


def test_the_chat_port_in_use(mesh: Mesh) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        mesh("serve", *QUIET, "--http", f"127.0.0.1:{port}").check(NETWORK, str(port), "--http")


def test_the_peer_port_in_use(mesh: Mesh) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        finished = mesh("worker", "--listen", f"127.0.0.1:{port}", "--log-format", "json")
        finished.check(NETWORK, str(port))


async def test_a_second_node_on_one_home(mesh: Mesh, world: World) -> None:
    async with world.worker() as first:
        await first.wait_event("invite")
        home = str(world.folder / "worker")
        finished = await in_thread(mesh, "serve", *QUIET, "--home", home)
        finished.check(HOME, "--home", "--lend")


def test_a_question_to_no_node(mesh: Mesh) -> None:
    mesh("invite").check(HOME, "mesh worker")
    mesh("status").check(HOME, "mesh worker")


def test_a_setting_that_does_not_exist(mesh: Mesh) -> None:
    mesh("serve", "jion=abc").check(USAGE, "jion", "join=TOKEN")
    mesh("worker", "--memory", "lots").check(USAGE, "12G")
    mesh("serve", "--http", "localhost").check(USAGE, "--http")
    mesh("worker", "rpc=10.0.0.5:50052").check(USAGE, "mesh serve")
    mesh("worker", "--device", "CUDA9", *QUIET).check(USAGE, "CUDA9", "CPU")


def test_a_pasted_token_in_the_wrong_place_is_not_shown(mesh: Mesh) -> None:
    text = encode(some_token())
    finished = mesh("worker", *QUIET, text)
    finished.check(USAGE, "join=TOKEN")
    assert text not in finished.stdout + finished.stderr


def test_a_llama_server_option_that_the_plan_decides(mesh: Mesh) -> None:
    serve(mesh, "--", "--n-gpu-layers", "3").check(USAGE, "--layers")


def test_a_layout_by_hand_that_is_none(mesh: Mesh) -> None:
    serve(mesh, "--layers", "everything").check(USAGE, "local=0:3")
    serve(mesh, "--layers", "local=0:3").check(USAGE, "--split never")


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ("local=0:3,nobody=4:output", "nobody"),
        ("worker=0:3,local=4:output", "local CPU first"),
        ("local=0:3,worker=5:output", "layer 4"),
    ],
)
async def test_layers_that_cannot_be_placed(
    mesh: Mesh, world: World, small_model: Path, layers: str, reason: str
) -> None:
    async with world.worker() as worker:
        joins = ("--join-file", str(await world.join_file(worker)))
        arguments = ("--model", str(small_model), "--layers", layers, "--http", "127.0.0.1:0")
        finished = await in_thread(mesh, "serve", *QUIET, *joins, *arguments)
        finished.check(USAGE, reason)


def test_too_little_memory_names_the_missing_bytes(mesh: Mesh, small_model: Path) -> None:
    finished = serve(mesh, "--model", str(small_model), "--ctx", "2000000000")
    finished.check(RESOURCES, "TiB")


async def test_a_context_longer_than_the_model_was_trained_on_is_told(world: World) -> None:
    async with world.serve("--split", "never", "--ctx", "1024") as node:
        warning = await node.wait_event("warning", containing="trained on")
        assert "1024" in warning["text"]
        assert "512" in warning["text"]


# -- the engine ---------------------------------------------------------------------------------


def test_no_compiler(mesh: Mesh, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "uname"):
        found = shutil.which(name)
        assert found
        (tools / name).symlink_to(found)
    env = {"PATH": str(tools), "MESH_CACHE": str(tmp_path / "cache"), "CC": "", "CXX": ""}
    mesh("engine", "build", "--backend", "cpu", env=env).check(ENGINE, "install")


async def test_an_engine_binary_deleted_underneath(world: World, engine_bin: Path) -> None:
    """The node says what to do instead of raising."""
    cache = world.folder / "cache"
    copy = cache / "engine" / "engines" / engine_bin.parent.name
    shutil.copytree(engine_bin.parent, copy)
    (copy / "bin" / "ggml-rpc-server").write_text("#!/bin/sh\nexit 1\n")
    old = os.environ.get("MESH_CACHE")
    os.environ["MESH_CACHE"] = str(cache)
    try:
        async with world.worker() as worker:
            file = await world.join_file(worker)
            async with world.serve("--join-file", str(file), "--split", "always") as node:
                warning = await node.wait_event("warning")
                assert "rpc-server" in warning["text"]
    finally:
        os.environ.pop("MESH_CACHE")
        if old is not None:
            os.environ["MESH_CACHE"] = old


async def in_thread(mesh: Mesh, *arguments: str, stdin: str = "") -> Finished:
    return await trio.to_thread.run_sync(lambda: mesh(*arguments, stdin=stdin))
