"""Three workers on lines of their own: what they measure of them, both ways, before and after."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from meshnode.control import ask_node
from meshnode.demo.nodes import invite_token, open_node, write_token
from meshnode.pipeline.sounding import FRESH_S
from tests.netlab.netns import Namespace
from tests.netlab.topology import internet

pytestmark = [pytest.mark.engine, pytest.mark.netlab]

QUIET = ("--no-mdns", "--no-portmap", "--stun", "none", "--threads", "1", "--transport", "tcp")
DELAYS_S = {"anna": 0.002, "ben": 0.005, "carl": 0.010}
FIRST = {"anna": 6e6, "ben": 3e6, "carl": 1.5e6}
THEN = {"anna": 1.5e6, "ben": 3e6, "carl": 6e6}
WITHIN = 0.25
TRIES = 4


@dataclass
class Line:
    """One node's way to the others: what it may send a second."""

    host: Namespace
    is_laid: bool = False

    def limit(self, bytes_per_s: float) -> None:
        # What a bucket lets through at once is not the line's rate.
        rate = ("rate", f"{bytes_per_s * 8:.0f}bit", "burst", "16kb", "latency", "100ms")
        verb = "change" if self.is_laid else "add"
        self.host.run("tc", "qdisc", verb, "dev", "wan", "root", "tbf", *rate)
        self.is_laid = True


@asynccontextmanager
async def three(folder: Path) -> AsyncIterator[dict[str, Line]]:
    """Members of one mesh, each connected with both others."""
    async with AsyncExitStack() as stack:
        net = stack.enter_context(internet())
        lines, token = {}, None
        nodes = []
        for name, delay_s in DELAYS_S.items():
            site = net.site("open")
            site.weather(delay_s=delay_s)
            lines[name] = Line(site.host)
            lines[name].limit(FIRST[name])
            join = ("--join-file", str(token)) if token else ()
            node = await stack.enter_async_context(
                open_node(
                    *("worker", *QUIET, "--no-offline", *join),
                    name=name,
                    home=folder / name,
                    log_folder=folder,
                    prefix=site.host.prefix,
                    environment={"MESH_MEASURE": "1"},
                )
            )
            nodes.append(node)
            if token is None:
                token = write_token(folder / "token", invite_token(await node.wait_event("invite")))
        for node in nodes:
            for other in DELAYS_S.keys() - {node.name}:
                await node.wait_event("peer", containing=f"connected to {other}")
        yield lines


def named(name: str) -> str:
    return "local" if name == "anna" else name


async def survey(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """What anna's node knows of all ways, when it is asked for a plan."""
    answer = await trio.to_thread.run_sync(ask_node, folder / "anna", {"op": "machines"})
    return {(link["from"], link["to"]): link for link in answer["links"]}


def wrong(
    links: dict[tuple[str, str], dict[str, Any]], rates: dict[str, float]
) -> dict[tuple[str, str], float | None]:
    """Ways whose rate is not what the sender's line has, with what they are said to have."""
    told = {}
    for start, rate in rates.items():
        for end in rates.keys() - {start}:
            link = links.get((named(start), named(end)))
            known = link["bytes_per_s"] if link and link["measured"] else None
            if known is None or abs(known / rate - 1) > WITHIN:
                told[start, end] = known
    return told


async def until_right(folder: Path, rates: dict[str, float]) -> None:
    """Asked anew some times, since this machine has other things to do too."""
    for _ in range(TRIES):
        links = await survey(folder)
        if not wrong(links, rates):
            break
        await trio.sleep(FRESH_S + 1)
    assert not wrong(links, rates), links
    for (start, end), link in links.items():
        ends = [("anna" if name == "local" else name) for name in (start, end)]
        rtt_ms = 2000 * sum(DELAYS_S[name] for name in ends)
        assert rtt_ms <= link["rtt_ms"] < rtt_ms + 30, (start, end)


async def test_rates_are_measured_both_ways_and_followed_when_they_fall_or_rise(
    tmp_path: Path, engine_bin: Path
) -> None:
    async with three(tmp_path) as lines:
        await until_right(tmp_path, FIRST)
        for name, line in lines.items():
            line.limit(THEN[name])
        assert wrong(await survey(tmp_path), THEN), "what was measured a moment ago is still told"
        await trio.sleep(FRESH_S + 1)
        await until_right(tmp_path, THEN)
