"""Routers that forget and a relay that is started again, while an answer is under way: it
completes, and is the undisturbed one. `./just outages` repeats them at their full length."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from meshnode.demo.nodes import NodeProcess, invite_token, open_node, write_token
from tests.netlab.answering import Scene, open_scene, small_model
from tests.netlab.netns import Namespace
from tests.netlab.topology import Internet, Site, internet

pytestmark = [pytest.mark.engine, pytest.mark.netlab]

ALL = "MESH_TEST_ALL_OUTAGES" in os.environ
GONE_S = float(os.environ.get("MESH_TEST_OUTAGE_S", "6"))
NEAR_S = 0.001  # of a wire: each token crosses it several times
FORGOTTEN_WITHIN_S = {"quic": 1.0, "tcp": 4.0}
RELAY_BACK_WITHIN_S = 15.0
SLACK_S = 0.3  # of a busy machine
QUIETLY = ("--no-mdns", "--no-portmap", "--stun", "none", "--no-offline")


@pytest.fixture
def net() -> Iterator[Internet]:
    with internet() as laid:
        yield laid


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, engine_bin: Path) -> Path:
    return small_model(tmp_path_factory.mktemp("outages"))


ROUTERS = [("home", "quic"), ("home", "tcp"), ("sym", "quic"), ("sym", "tcp")]


@pytest.mark.parametrize(("router", "kind"), ROUTERS if ALL else ROUTERS[2:])
async def test_an_answer_survives_a_router_that_forgets(
    net: Internet, model: Path, tmp_path: Path, router: str, kind: str
) -> None:
    """A symmetric one takes another port then."""
    here, there = net.site(router), net.site("open")
    for site in (here, there):
        site.weather(delay_s=NEAR_S)

    before: set[int] = set()

    async def forget(_: Scene) -> None:
        before.update(ports_outside(here))
        here.forget_mappings()

    options = (*QUIETLY, "--transport", kind)
    async with open_scene(here.host, there.host, model, tmp_path, options) as scene:
        answer, took_s = await scene.survives(forget, 180)
        if router == "sym":
            assert before
            assert not before & ports_outside(here), "others than before"
    assert took_s <= FORGOTTEN_WITHIN_S[kind] + SLACK_S + answer.pause_s


def ports_outside(site: Site) -> set[int]:
    """Which its router gives to what goes on behind it."""
    flows = [line for line in site.routers[0].run("conntrack", "-L").splitlines() if "192." in line]
    return {int(line.rpartition(" dport=")[2].split()[0]) for line in flows}


class RestartedRelay:
    """I run one on a host, and start it again where it was."""

    node: NodeProcess

    def __init__(self, host: Namespace, folder: Path, nursery: trio.Nursery) -> None:
        self._host = host
        self._folder = folder
        self._nursery = nursery
        self._starts = 0

    async def start(self) -> str:
        """Its token."""
        self._starts += 1
        self.node = await self._nursery.start(self._run)
        return invite_token(await self.node.wait_event("invite"))

    async def is_killed_and_started_again(self, _: Scene) -> None:
        os.kill(self.node.pid, signal.SIGKILL)
        await self.node.wait_exit()
        await trio.sleep(GONE_S)
        await self.start()

    async def _run(self, task_status: trio.TaskStatus[NodeProcess]) -> None:
        logs = self._folder / f"relay-{self._starts}"
        logs.mkdir()
        async with open_node(
            *("relay", *QUIETLY, "--tcp", "443"),
            name="relay",
            home=self._folder / "relay",
            log_folder=logs,
            prefix=self._host.prefix,
        ) as node:
            task_status.started(node)
            await trio.sleep_forever()


LETS_OUT = [("blocked", "blocked"), ("home", "home")]


@pytest.mark.parametrize("sites", LETS_OUT if ALL else LETS_OUT[:1])
async def test_an_answer_survives_a_relay_that_is_killed_and_started_again(
    net: Internet, model: Path, tmp_path: Path, sites: tuple[str, str]
) -> None:
    """It carries what two nodes say who know no other way: over port 443 alone, or UDP too."""
    here, there = (net.site(kind) for kind in sites)
    for site in (here, there):
        site.weather(delay_s=NEAR_S)
    options = (*QUIETLY, "--transport", "relay")
    async with trio.open_nursery() as nursery:
        relay = RestartedRelay(net.relay, tmp_path, nursery)
        token = write_token(tmp_path / "relay-token", await relay.start())
        async with open_scene(
            *(here.host, there.host, model, tmp_path, options), token=token
        ) as scene:
            answer, took_s = await scene.survives(relay.is_killed_and_started_again, 240)
        nursery.cancel_scope.cancel()
    assert took_s <= RELAY_BACK_WITHIN_S + SLACK_S + answer.pause_s
