"""One try of one cell: a node prints a token, another joins, and what came of it is measured."""

from __future__ import annotations

from dataclasses import dataclass

import trio

from tests.netlab.expected import Cell, Outcome
from tests.netlab.stations import Failed, Station, Stations

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


async def try_once(stations: Stations, cell: Cell) -> Try:
    async with stations.pair(cell) as (sites, printer, joiner):
        for site in sites:
            site.forget_mappings()
        try:
            async with trio.open_nursery() as nursery:
                for station in (printer, joiner):
                    nursery.start_soon(station.ask, "start")
            token = await printer.ask("token")
            try:
                met = await joiner.ask("join", token=token)
            except Failed as error:
                return Try(Outcome.IMPOSSIBLE, took_reply_code=True, said=str(error))
            return await _see_it_through(cell, joiner, token["peer"], met)
        finally:
            for station in (printer, joiner):
                await station.ask("stop")


async def _see_it_through(cell: Cell, joiner: Station, other: str, met: dict[str, object]) -> Try:
    began_s = float(str(met["began_s"]))
    within_s = DIRECT_WITHIN_S if cell.outcome is Outcome.DIRECT else STAYS_RELAYED_S
    last = await joiner.ask("direct", peer=other, within_s=within_s)
    direct = not last["relayed"]
    return Try(
        Outcome.DIRECT if direct else Outcome.RELAYED,
        link=str(last["link"]),
        first_byte_s=float(str(met["at_s"])) - began_s,
        direct_s=last["at_s"] - began_s if direct else None,
    )
