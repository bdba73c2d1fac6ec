"""One try of one cell: a node prints a token, another joins, and what came of it is measured."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import trio

from tests.netlab.expected import Cell, Outcome
from tests.netlab.stations import Failed, Station, Stations
from tests.netlab.topology import STUN, STUN6, STUN_PORT

DIRECT_WITHIN_S = 30.0  # given up then
STAYS_RELAYED_S = 8.0  # where no direct path is expected, as long as one is waited for


@dataclass(frozen=True)
class Try:
    """What was seen. first_byte_s: since the joiner began, or since the printer took its reply
    code. direct_s: likewise, until bytes went straight. said: the last error's sentence."""

    outcome: Outcome
    link: str = ""
    took_reply_code: bool = False
    first_byte_s: float | None = None
    direct_s: float | None = None
    said: str = ""

    def agrees(self, cell: Cell) -> bool:
        return (self.outcome, self.took_reply_code) == (cell.outcome, cell.needs_reply_code)


async def try_cells(
    stations: Stations,
    cells: Iterable[Cell],
    count: Callable[[Cell], int],
    at_once: int,
    tell: Callable[[Cell, list[Try]], None] = lambda _cell, _tries: None,
) -> dict[str, list[Try]]:
    """Each cell `count` times, several cells at once. tell: of each that is done."""
    waiting = deque(cells)
    tried: dict[str, list[Try]] = {}

    async def work() -> None:
        while waiting:
            cell = waiting.popleft()
            tried[cell.name] = [await try_once(stations, cell) for _ in range(count(cell))]
            tell(cell, tried[cell.name])

    async with trio.open_nursery() as nursery:
        for _ in range(at_once):
            nursery.start_soon(work)
    return tried


async def try_once(stations: Stations, cell: Cell) -> Try:
    async with stations.pair(cell) as (sites, printer, joiner):
        for site in sites:
            site.forget_mappings()
        try:
            await start(printer, joiner, relay=stations.relay if cell.relay else None)
            return await _connect(cell, printer, joiner)
        finally:
            for station in (printer, joiner):
                await station.ask("stop")


async def start(
    printer: Station, joiner: Station, relay: dict[str, Any] | None = None, **options: Any
) -> None:
    """relay: which the printer is to be reachable through. options: of both endpoints (peer.py)."""
    stun = [[host, STUN_PORT] for host in (*STUN, *STUN6)]
    async with trio.open_nursery() as nursery:
        for station in (printer, joiner):
            mine = {"stun": stun, "portmap": station.has_upnp, **options}
            if station is printer:
                mine["relay"] = relay
            nursery.start_soon(partial(station.ask, "start", **mine))


async def _connect(cell: Cell, printer: Station, joiner: Station) -> Try:
    token = await printer.ask("token")
    try:
        met = await joiner.ask("join", token=token)
    except Failed as error:
        if cell.relay:
            return Try(Outcome.IMPOSSIBLE, said=str(error))
        return await _call_back(cell, printer, joiner, token)
    return await _see_it_through(cell, joiner, token["peer"], met)


async def _call_back(cell: Cell, printer: Station, joiner: Station, token: dict[str, Any]) -> Try:
    """Nothing answered: the joiner's reply code is carried to the printer."""
    code = (await joiner.ask("call", token=token))["code"]
    answers: dict[str, dict[str, Any]] = {}
    errors: list[str] = []

    async def ask(station: Station, command: str, **arguments: Any) -> None:
        try:
            answers[command] = await station.ask(command, **arguments)
        except Failed as error:
            errors.append(f"{command}: {error}")
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(ask, printer, "accept", code=code))
        nursery.start_soon(partial(ask, joiner, "called_back", peer=token["peer"]))
    if errors:
        return Try(Outcome.IMPOSSIBLE, took_reply_code=True, said=errors[0])
    met = {**answers["called_back"], "began_s": answers["accept"]["began_s"]}
    seen = await _see_it_through(cell, joiner, token["peer"], met)
    return replace(seen, took_reply_code=True)


async def _see_it_through(cell: Cell, joiner: Station, other: str, met: dict[str, Any]) -> Try:
    began_s = met["began_s"]
    within_s = DIRECT_WITHIN_S if cell.outcome is Outcome.DIRECT else STAYS_RELAYED_S
    last = await joiner.ask("direct", peer=other, within_s=within_s)
    direct = not last["relayed"]
    return Try(
        Outcome.DIRECT if direct else Outcome.RELAYED,
        link=str(last["link"]),
        first_byte_s=met["at_s"] - began_s,
        direct_s=last["at_s"] - began_s if direct else None,
    )
