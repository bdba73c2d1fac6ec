"""A worker fetches its part of a model, and something happens on the way: its link is cut, it is
killed, its disk is filled, a member lies. The answer is right in the end, or somebody says why."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import trio

from meshnode.crash_points import CRASH_AT_VARIABLE, CRASH_GATE_VARIABLE
from meshnode.demo.nodes import NodeProcess, invite_token, open_node, write_token
from meshnode.models.facts import read_facts
from tests.e2e.test_pulled_model import rot
from tests.engine.synthetic import make_model_of_size
from tests.kills import Gate
from tests.lab.pulling import Puller
from tests.netlab.hall import HTTP_PORT, INTERFACE, Machine, hall, nginx
from tests.netlab.test_whole_nodes import ask

pytestmark = [pytest.mark.engine, pytest.mark.netlab]

OK, NETWORK = 0, 4
MODEL_BYTES = 160 * 10**6
CHUNK_BYTES = 16 << 20
LAYERS = ("--layers", "local=0:2,ben=3:output")
"""ben's part is more than four pieces, so one is asked for after the first has come."""
QUIET = ("--no-mdns", "--no-portmap", "--stun", "none", "--threads", "1")
FIRST_DONE = "slice.journalled:1"
BODY = {
    "prompt": "one two three",
    "max_tokens": 16,
    "temperature": 0,
    "ignore_eos": True,
    "logprobs": 1,
}
NONE: Mapping[str, str] = MappingProxyType({})
FROM_WEB = ("--allow-pull", "url,peers")
OWN_DISK = (
    shutil.which("unshare") or "unshare",
    *("--mount", "/bin/sh", "-c"),
    'mount -t tmpfs -o size=160m mesh "$0" && exec "$@"',
)
"""Runs a command that sees a small disk of its own at the folder that follows."""


@dataclass
class Scene:
    """anna serves, ben lends, carl has copies; the web has the model. Homes outlive nodes."""

    machines: dict[str, Machine]
    folder: Path
    gate: Gate
    model: Path
    token: Path | None = None

    @property
    def url(self) -> str:
        return f"http://{self.machines['web'].address}/{self.model.name}"

    def home(self, name: str) -> Path:
        return self.folder / name

    @contextmanager
    def web(self) -> Iterator[None]:
        with nginx(self.machines["web"], self.model.parent, self.folder / "nginx"):
            yield

    def at(self, point: str, *, held: bool = False) -> dict[str, str]:
        """A node dies there, or stands still until the gate is released."""
        named = {CRASH_AT_VARIABLE: point}
        return named | {CRASH_GATE_VARIABLE: str(self.gate.path)} if held else named

    @asynccontextmanager
    async def node(
        self,
        name: str,
        *arguments: str,
        environment: Mapping[str, str] = NONE,
        prefix: tuple[str, ...] = (),
        home: Path | None = None,
    ) -> AsyncIterator[NodeProcess]:
        known = self.token is not None and not self.home(name).joinpath("membership.json").exists()
        join = ("--join-file", str(self.token)) if known else ()
        async with open_node(
            *(*arguments, *QUIET, *join),
            name=name,
            home=home or self.home(name),
            log_folder=self.folder,
            engine_options=("--no-repack",) if arguments[0] == "serve" else (),
            prefix=(*self.machines[name].prefix, *prefix),
            environment=environment,
        ) as node:
            if self.token is None:
                event = await node.wait_event("invite")
                self.token = write_token(self.folder / "token", invite_token(event))
            yield node

    @asynccontextmanager
    async def worker(self, name: str, *options: str, **more: Any) -> AsyncIterator[NodeProcess]:
        async with self.node(name, "worker", *options, **more) as node:
            yield node

    @asynccontextmanager
    async def serving(self, *options: str, **more: Any) -> AsyncIterator[NodeProcess]:
        arguments = ("serve", "--model", self.url, "--ctx", "512", *LAYERS, *options)
        async with self.node("anna", *arguments, **more) as node:
            yield node

    async def acquaint(self) -> None:
        """All three become members of one mesh, and know each other from then on."""
        async with self.worker("ben"), self.worker("carl") as carl, self.worker("anna") as anna:
            for node in (carl, anna):
                await node.wait_event("peer", containing="connected to ben")

    @asynccontextmanager
    async def borrowing(self, *options: str, **more: Any) -> AsyncIterator[NodeProcess]:
        """ben, who is connected to carl."""
        async with self.worker("ben", *options, **more) as ben:
            await ben.wait_event("peer", containing="connected to carl")
            yield ben

    def puller(self, name: str) -> Puller:
        return Puller(self.home(name), self.machines[name].prefix)

    async def answer(self, node: NodeProcess, after: int = 0) -> list[int]:
        url = (await node.wait_event("ready", after=after))["url"]
        space = self.machines["anna"].space
        answer = await trio.to_thread.run_sync(ask, space, f"{url}/v1/completions", BODY)
        return [token["id"] for token in answer["choices"][0]["logprobs"]["content"]]

    async def expected(self) -> list[int]:
        """What the model answers alone."""
        async with open_node(
            *("serve", "--model", str(self.model), "--split", "never", "--ctx", "512", *QUIET),
            name="alone",
            home=self.home("alone"),
            log_folder=self.folder,
            engine_options=("--no-repack",),
            prefix=self.machines["anna"].prefix,
        ) as node:
            return await self.answer(node)

    def replace_model(self) -> None:
        """The web has another model of the same shape from now on."""
        new = make_model_of_size(self.folder / "new.gguf", size_bytes=MODEL_BYTES, seed=4)
        os.utime(new, (self.model.stat().st_mtime + 5,) * 2)  # nginx tells files apart by seconds
        new.replace(self.model)

    def cut(self, name: str) -> None:
        self.machines[name].space.ip(f"link set {INTERFACE} down")

    def mend(self, name: str) -> None:
        self.machines[name].space.ip(f"link set {INTERFACE} up")


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    served = tmp_path / "served"
    served.mkdir()
    model = make_model_of_size(served / "big.gguf", size_bytes=MODEL_BYTES, seed=3)
    names = ("anna", "ben", "carl", "web")
    with hall(names) as machines, tempfile.TemporaryDirectory(prefix="mesh-gate-") as folder:
        async with Gate(Path(folder) / "gate").opened() as gate:
            yield Scene(dict(zip(names, machines, strict=True)), tmp_path, gate, model)


async def until_unheard(machine: Machine, port: int) -> None:
    """What it has sent to that port is not acknowledged: it feels that the link is cut."""

    def sent_in_vain() -> bool:
        shown = machine.space.run("ss", "-Htn", "state", "all", f"( dport = :{port} )")
        return any(int(line.split()[2]) > 0 for line in shown.splitlines())

    with trio.fail_after(30):
        while not await trio.to_thread.run_sync(sent_in_vain):
            pass


async def test_a_link_to_the_web_that_is_cut_midway_and_put_up_again(scene: Scene) -> None:
    expected = await scene.expected()
    with scene.web():
        async with (
            scene.worker("ben", *FROM_WEB, environment=scene.at(FIRST_DONE, held=True)),
            scene.serving() as anna,
        ):
            await scene.gate.wait("slice.journalled")
            scene.cut("web")
            await scene.gate.release()
            await until_unheard(scene.machines["ben"], HTTP_PORT)
            scene.mend("web")
            assert await scene.answer(anna) == expected
    part_bytes = sum(path.stat().st_blocks * 512 for path in scene.home("ben").rglob("big.gguf"))
    assert scene.machines["ben"].received_bytes() < 1.05 * part_bytes, "nothing came twice"


async def test_a_file_that_is_replaced_under_a_worker_alone_ends_who_asked_it(scene: Scene) -> None:
    """anna has her part already, so only ben, midway in his, can see it. She asks the web too."""
    from_web_alone = ("--allow-pull", "url")
    with scene.web():
        (await scene.puller("anna").run("pull", scene.url)).check(OK)
        async with (
            scene.worker("ben", *from_web_alone, environment=scene.at(FIRST_DONE, held=True)),
            scene.serving() as anna,
        ):
            await scene.gate.wait("slice.journalled")
            await trio.to_thread.run_sync(scene.replace_model)
            await scene.gate.release()
            assert await anna.wait_exit() == NETWORK
    said = anna.last_lines[-1]
    assert "big is another file at its source than the one begun here: start again" in said
    assert "mesh models rm big" in said


# -- from a member --------------------------------------------------------------------------------


@asynccontextmanager
async def a_member_has_all(scene: Scene) -> AsyncIterator[NodeProcess]:
    """carl is a member, and has the model from the web, which is gone then."""
    with scene.web():
        for name in ("carl", "anna"):
            (await scene.puller(name).run("pull", scene.url)).check(0)
    await scene.acquaint()
    async with scene.worker("carl") as carl:
        yield carl


async def test_a_link_to_a_member_that_is_cut_midway_and_put_up_again(scene: Scene) -> None:
    expected = await scene.expected()
    async with (
        a_member_has_all(scene),
        scene.borrowing(environment=scene.at(FIRST_DONE, held=True)) as ben,
        scene.serving() as anna,
    ):
        await scene.gate.wait("slice.journalled")
        scene.cut("carl")
        await scene.gate.release()
        await ben.wait_event("peer", containing="interrupted")
        scene.mend("carl")
        assert await scene.answer(anna) == expected


@pytest.mark.parametrize("how", ["killed", "cut off"])
async def test_a_member_that_does_not_come_back_is_left_and_the_web_asked(
    scene: Scene, how: str
) -> None:
    expected = await scene.expected()
    async with (
        a_member_has_all(scene) as carl,
        scene.borrowing(*FROM_WEB, environment=scene.at(FIRST_DONE, held=True)),
        scene.serving() as anna,
    ):
        await scene.gate.wait("slice.journalled")
        if how == "killed":
            os.kill(carl.pid, signal.SIGKILL)
        else:
            scene.cut("carl")
        with scene.web():
            await scene.gate.release()
            assert await scene.answer(anna) == expected


async def test_a_member_that_lies_is_found_out_where_the_digests_are_known(scene: Scene) -> None:
    """carl's disk has other bytes than it believes. ben had its part before, so it knows."""
    expected = await scene.expected()
    part = ("--layers", "3:output")
    tensors = read_facts(scene.model).tensors
    with scene.web():
        for name, layers in (("ben", part), ("carl", ())):
            (await scene.puller(name).run("pull", scene.url, *layers)).check(0)
        await scene.acquaint()
        for name in ("ben", "carl"):
            path = scene.home(name) / "models" / "big" / "big.gguf"
            for tensor in tensors:
                if tensor.name.startswith(("blk.4.ffn", "blk.9.ffn")):
                    rot(path, tensor.offset + 100)
        (await scene.puller("ben").run("models", "verify", "big")).check(6, "blk.4.ffn_up.weight")
        async with scene.worker("carl"), scene.borrowing(*FROM_WEB), scene.serving() as anna:
            assert await scene.answer(anna) == expected
    log = (scene.home("ben") / "logs" / "mesh.log").read_text()
    assert "carl has sent other bytes" in log
    (await scene.puller("ben").run("models", "verify", "big")).check(0)


# -- killed, and started again --------------------------------------------------------------------


@pytest.mark.parametrize(("victim", "seed"), [("ben", 1), ("anna", 2)])
async def test_who_is_killed_at_a_drawn_moment_goes_on_where_it_was(
    scene: Scene, victim: str, seed: int
) -> None:
    drawn = random.Random(seed)
    expected = await scene.expected()
    point = drawn.choice(("slice.written", "slice.flushed", "slice.journalled"))
    killed = scene.at(f"{point}:{drawn.randint(1, 2)}")
    with scene.web():
        if victim == "ben":
            async with (
                scene.worker("ben", *FROM_WEB, environment=killed) as ben,
                scene.serving() as anna,
            ):
                assert await ben.wait_exit() == -signal.SIGKILL
                async with scene.worker("ben", *FROM_WEB):
                    assert await scene.answer(anna) == expected
        else:
            async with scene.worker("ben", *FROM_WEB):
                async with scene.serving(environment=killed) as anna:
                    assert await anna.wait_exit() == -signal.SIGKILL
                async with scene.serving() as anna:
                    assert await scene.answer(anna) == expected
    for name in ("anna", "ben"):
        disk_bytes = sum(p.stat().st_blocks * 512 for p in scene.home(name).rglob("big.gguf"))
        # What was on the way comes again: the end of one ends the other's pull as well.
        most_bytes = 1.05 * disk_bytes + 4 * CHUNK_BYTES
        assert scene.machines[name].received_bytes() < most_bytes, name


# -- the disk is filled ---------------------------------------------------------------------------


def fill(disk: Path) -> Path:
    """Somebody else writes until nothing more fits; what they wrote."""
    filler = disk / "somebody-elses"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(1 << 20)):
            pass
    return filler


@pytest.mark.parametrize("victim", ["ben", "anna"])
async def test_a_disk_that_somebody_fills_midway_is_told_and_waited_for(
    scene: Scene, victim: str
) -> None:
    expected = await scene.expected()
    disk = scene.folder / "disk"
    disk.mkdir()
    held = scene.at(FIRST_DONE, held=True)
    shares = ("--layers", "local=0:8,ben=9:output") if victim == "anna" else ()
    small = {
        "environment": held,
        "prefix": (*OWN_DISK, str(disk)),
        "home": disk / victim,
    }
    with scene.web():
        async with (
            scene.worker("ben", *FROM_WEB, **(small if victim == "ben" else {})) as ben,
            scene.serving(*shares, **(small if victim == "anna" else {})) as anna,
        ):
            await scene.gate.wait("slice.journalled")
            inside = Path(
                f"/proc/{(ben if victim == 'ben' else anna).pid}/root"
            ) / disk.relative_to("/")
            filler = await trio.to_thread.run_sync(fill, inside)
            await scene.gate.release()
            told = await anna.wait_event("warning", containing="no space left")
            assert told["text"].startswith("ben: no space" if victim == "ben" else "no space")
            assert "gc --keep" in told["text"]
            assert told["text"].endswith("trying again"), "no worker can help there"
            filler.unlink()
            assert await scene.answer(anna) == expected
