"""Streams over networks that misbehave: two endpoints, a stream between them, then the fault."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.conftest import require
from tests.netlab.expected import Cell
from tests.netlab.servers import can_run
from tests.netlab.stations import Station, open_stations
from tests.netlab.topology import SHORT_MAPPING_S, Site, internet
from tests.netlab.tries import start

pytestmark = pytest.mark.netlab

MUCH_BYTES = 300_000
HOLE_BYTES = 1300


@dataclass
class Pair:
    """bob has joined alice, and holds a stream to her."""

    alice_site: Site
    bob_site: Site
    alice: Station
    bob: Station


@asynccontextmanager
async def joined(
    folder: Path,
    printer: str,
    joiner: str,
    *,
    spoilt: bool = False,
    relay: bool = False,
    **options: Any,
) -> AsyncIterator[Pair]:
    """spoilt: larger packets than HOLE_BYTES vanish from the beginning."""
    require("coturn", can_run("turnserver"), "needs turnserver (./just setup)")
    with internet() as net:
        async with (
            open_stations(net, folder) as stations,
            stations.pair(Cell(printer, joiner, relay=False)) as (sites, alice, bob),
        ):
            if spoilt:
                sites[-1].swallow_above(HOLE_BYTES)
            await start(alice, bob, relay=stations.relay if relay else None, **options)
            await bob.ask("join", token=await alice.ask("token"))
            yield Pair(sites[0], sites[-1], alice, bob)


@pytest.mark.parametrize("kind", ["home", "sym"])
async def test_a_stream_goes_on_when_the_router_has_forgotten_its_mapping(
    tmp_path: Path, kind: str
) -> None:
    async with joined(tmp_path, "open", kind) as pair:
        pair.bob_site.forget_mappings()
        await pair.bob.ask("carry", size_bytes=1000)


@pytest.mark.parametrize("kind", ["home", "sym"])
async def test_a_stream_on_a_punched_way_goes_on_when_a_router_has_forgotten_it(
    tmp_path: Path, kind: str
) -> None:
    """A symmetric one gives another port then, which the other router lets nobody in from: the
    relay carries on, until guessing is allowed again."""
    async with joined(tmp_path, "home", kind, relay=True) as pair:
        alice = (await pair.alice.ask("token"))["peer"]
        assert not (await pair.bob.ask("direct", peer=alice, within_s=60))["relayed"]
        pair.bob_site.forget_mappings()
        await pair.bob.ask("carry", size_bytes=1000)


async def test_a_mapping_that_is_short_lived_is_kept_while_nothing_is_said(tmp_path: Path) -> None:
    async with joined(tmp_path, "open", "short") as pair:
        await trio.sleep(1.2 * SHORT_MAPPING_S)
        rows = pair.bob_site.routers[0].run("conntrack", "-L", "-p", "udp", "-s", "192.168.1.3")
        assert rows.strip(), "nothing holds it open"
        bob = (await pair.bob.ask("token"))["peer"]
        await pair.alice.ask("reach", peer=bob)


async def test_a_black_hole_for_large_packets_holds_up_no_stream(tmp_path: Path) -> None:
    async with joined(tmp_path, "open", "home", spoilt=True, transports=["quic"]) as pair:
        await pair.bob.ask("carry", size_bytes=MUCH_BYTES)


async def test_a_black_hole_that_opens_later_holds_up_no_stream(tmp_path: Path) -> None:
    async with joined(tmp_path, "open", "home", transports=["quic"]) as pair:
        await pair.bob.ask("carry", size_bytes=MUCH_BYTES)
        pair.bob_site.swallow_above(HOLE_BYTES)
        await pair.bob.ask("carry", size_bytes=MUCH_BYTES)


@pytest.mark.parametrize("transports", [["quic"], ["tcp"]])
async def test_bytes_come_whole_over_a_wire_that_loses_and_disorders(
    tmp_path: Path, transports: list[str]
) -> None:
    async with joined(tmp_path, "open", "home", transports=transports) as pair:
        pair.bob_site.weather(loss=0.03, jitter_s=0.01)
        await pair.bob.ask("carry", size_bytes=MUCH_BYTES)


async def test_a_stream_outlives_a_cable_that_is_out(tmp_path: Path) -> None:
    async with joined(tmp_path, "open", "home") as pair:
        pair.bob_site.weather(cut=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(pair.bob.ask, "carry", size_bytes=1000))
            await trio.sleep(5)
            pair.bob_site.weather(cut=False)
