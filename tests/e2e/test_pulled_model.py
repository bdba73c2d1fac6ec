"""A model from a web server, with a node that is killed on the way, and a disk that rots after."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path

import pytest

from meshnode.crash_points import CRASH_AT_VARIABLE
from meshnode.demo.nodes import NodeProcess, open_node
from meshnode.models.store.slice import open_slice
from meshnode.models.store.writer import SliceWriter
from tests.conftest import require
from tests.e2e.conftest import ANY_HTTP, LOOPBACK, ONE_THREAD, SAME_LAYOUT, Mesh, World
from tests.e2e.test_two_nodes import alone, greedy_tokens, url_of
from tests.engine.synthetic import make_model_of_size
from tests.lab.nginx import nginx_program, running_nginx

pytestmark = pytest.mark.engine

MODEL_BYTES = 80 * 10**6  # five pieces or so
RESOURCE = 7
ROTTEN = "blk.3.ffn_up.weight"


@contextmanager
def served(model: Path, scratch: Path) -> Iterator[str]:
    """The model's address."""
    program = nginx_program()
    require("nginx", program is not None, "nginx is not installed")
    assert program is not None
    scratch.mkdir(exist_ok=True)
    with running_nginx(program, model.parent, scratch) as address:
        yield f"{address}{model.name}"


def serving(world: World, url: str, **environment: str) -> AbstractAsyncContextManager[NodeProcess]:
    return open_node(
        *("serve", *LOOPBACK, *ONE_THREAD, *ANY_HTTP, "--model", url, "--split", "never"),
        name="puller",
        home=world.folder / "puller",
        log_folder=world.folder,
        engine_options=SAME_LAYOUT,
        environment=environment,
    )


def rot(path: Path, offset: int) -> None:
    """A bit flips on the disk, and nobody wrote."""
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 0x40]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


async def tokens_of(node: NodeProcess) -> list[int]:
    return await greedy_tokens(await url_of(node))


async def test_a_pull_that_was_killed_goes_on_and_what_rots_is_pulled_again(
    world: World, mesh: Mesh
) -> None:
    (world.folder / "served").mkdir()
    model = make_model_of_size(world.folder / "served" / "big.gguf", size_bytes=MODEL_BYTES)
    expected = await alone(world, model)
    folder = world.folder / "puller" / "models" / "big"
    with served(model, world.folder / "nginx") as url:
        async with serving(world, url, **{CRASH_AT_VARIABLE: "slice.journalled:3"}) as node:
            assert await node.wait_exit() == -signal.SIGKILL
        total_bytes = open_slice(folder).facts.weight_bytes
        names = [tensor.name for tensor in open_slice(folder).facts.tensors]
        with SliceWriter(folder) as writer:
            assert 0 < writer.missing_bytes(names) < 0.6 * total_bytes, "the rest is there"
        async with serving(world, url) as node:
            assert await tokens_of(node) == expected

        place = next(t.offset for t in open_slice(folder).facts.tensors if t.name == ROTTEN)
        rot(folder / "big.gguf", place + 1000)
        home = ("--home", str(world.folder / "puller"))
        mesh("models", "verify", "big", *home).check(6, ROTTEN, "pulled again")
        assert ROTTEN not in open_slice(folder).document.held
        async with serving(world, url) as node:
            assert await tokens_of(node) == expected
    async with serving(world, url) as node:
        assert await tokens_of(node) == expected, "the web server is gone, and not needed"
    mesh("models", "verify", "big", *home).check(0)


async def test_a_disk_too_small_for_the_model_is_told_before_its_weights_come(
    world: World, own_disk: tuple[str, ...]
) -> None:
    for name in ("served", "disk"):
        (world.folder / name).mkdir()
    model = make_model_of_size(world.folder / "served" / "big.gguf", size_bytes=MODEL_BYTES)
    with served(model, world.folder / "nginx") as url:
        async with open_node(
            *("serve", *LOOPBACK, *ONE_THREAD, *ANY_HTTP, "--model", url, "--split", "never"),
            name="puller",
            home=world.folder / "disk" / "home",
            log_folder=world.folder,
            prefix=(*own_disk, str(world.folder / "disk")),
            environment={"XDG_RUNTIME_DIR": str(world.folder / "disk")},
        ) as node:
            assert await node.wait_exit() == RESOURCE
            said = "\n".join(node.last_lines)
    assert "pulling big needs 73.6 MiB more" in said
    assert "gc --keep" in said
    assert "Traceback" not in said
