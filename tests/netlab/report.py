"""docs/nat-matrix.md: what was expected and what was seen."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping

from tests.netlab.expected import (
    CELLS,
    DIRECT_S,
    FIRST_BYTE_S,
    KINDS,
    NAMED,
    NEIGHBOURS,
    WAYS,
    Cell,
    Outcome,
)
from tests.netlab.seen import ROOT, Seen, times

PAGE = ROOT / "docs" / "nat-matrix.md"
HEAD = """# Which machines reach each other

Expected and seen for every pair of networks, with and without a relay, whoever prints the token.
The lab is made of network namespaces: real routers of the kernel, real sockets, two endpoints of
`tunnels`, 10 ms of wire before each site and each server (`tests/netlab`). What is expected stood
in `tests/netlab/expected.py` before it was made true.

```
./just netlab                       # all cells, and this page with --write
./just netlab --cells 'home-*'      # some
```

A whole run makes 3 tries in every cell and 100 in the twelve that matter most. Times depend on
what the machine has to do besides. Four cells at once, on two cores that had other tests to run,
`home-broken4+relay` took 8.95 s to the first byte and `sym-port+relay` 12.78 s until it was direct,
and 43 more cells missed a goal. Tried again one at a time (`--at-once 1`), those two took 0.87 s
and 2.74 s; the page shows the second tries of all 45.
"""
NOT_TRIED = Seen()


def write(seen: Mapping[str, Seen]) -> None:
    PAGE.write_text(page(seen))


def page(seen: Mapping[str, Seen]) -> str:
    parts = [HEAD, _summary(seen), _runs(seen), _kinds(), _letters()]
    parts += [_grid(seen, relay=False), _grid(seen, relay=True), _neighbours(seen)]
    parts += [_named(seen), _ways(seen), _slow(seen), _differing(seen), _all(seen)]
    return "\n".join(parts).rstrip() + "\n"


def _summary(seen: Mapping[str, Seen]) -> str:
    tried = [name for name in CELLS if seen.get(name, NOT_TRIED).tries]
    good = sum(seen[name].is_good(CELLS[name]) for name in tried)
    tries = sum(seen[name].tries for name in tried)
    slow = sum(_is_slow(seen[name]) for name in tried)
    return (
        f"**{good} of {len(CELLS)} cells as expected** ({len(tried)} tried, {tries} tries); "
        f"{slow or 'none'} of them [slower than the goals](#slower-than-the-goals).\n"
    )


def _runs(seen: Mapping[str, Seen]) -> str:
    """Of which runs the rows are: they need not be of one commit."""
    cells: dict[str, list[Seen]] = {}
    for name in CELLS:
        if (one := seen.get(name, NOT_TRIED)).tries:
            cells.setdefault(one.run or "not noted", []).append(one)
    rows = [
        f"| {run} | {len(cells[run])} | {sum(one.tries for one in cells[run])} |"
        for run in sorted(cells)
    ]
    note = (
        "Cells are taken run by run: a run of some cells replaces their rows and keeps the others, "
        "of earlier commits. Of each cell the newest run is shown.\n"
    )
    return _table("## The runs", "| run | cells | tries |", rows) + "\n" + note


def _kinds() -> str:
    rows = [f"| `{kind}` | {what} |" for kind, what in KINDS.items()]
    return _table("## The networks", "| | |", rows)


def _letters() -> str:
    rows = [
        f"| {letter} | {way.outcome.value} | {way.reason} | {_yes(way.needs_reply_code)} |"
        for letter, way in WAYS.items()
    ]
    head = "| | without a relay | | reply code |"
    note = (
        "With a relay no code is needed: the way is found over the relayed session. What is "
        "impossible without one is relayed with one.\n"
    )
    return _table("## The ways", head, rows) + "\n" + note


def _grid(seen: Mapping[str, Seen], *, relay: bool) -> str:
    head = "| printer \\ joiner | " + " | ".join(KINDS) + " |"
    cells = {(cell.printer, cell.joiner): cell for cell in CELLS.values() if cell.relay is relay}
    rows = [
        f"| **{printer}** | "
        + " | ".join(_mark(cells[printer, joiner], seen) for joiner in KINDS)
        + " |"
        for printer in KINDS
    ]
    title = "## With a relay" if relay else "## Without a relay"
    note = "The way expected, and of the tries those that went so; **bold** where not all did.\n"
    return _table(title, head, rows) + "\n" + note


def _mark(cell: Cell, seen: Mapping[str, Seen]) -> str:
    one = seen.get(cell.name, NOT_TRIED)
    letter = next(letter for letter, way in WAYS.items() if way is cell.way)
    if cell.outcome is Outcome.RELAYED:
        letter = letter.lower()
    if not one.tries:
        return f"{letter} –"
    text = f"{letter} {one.agreed}/{one.tries}"
    return text if one.is_good(cell) else f"**{text}**"


def _neighbours(seen: Mapping[str, Seen]) -> str:
    rows = [
        f"| {what} | {_mark(CELLS[kind], seen)} | {_mark(CELLS[f'{kind}+relay'], seen)} |"
        for kind, (_, what) in NEIGHBOURS.items()
    ]
    head = "| | without a relay | with |"
    return _table("## Two hosts behind one router", head, rows)


def _named(seen: Mapping[str, Seen]) -> str:
    rows = [f"| `{name}` | {why} | {_figures(CELLS[name], seen)} |" for name, why in NAMED.items()]
    head = f"| cell | why it matters | {_FIGURES} |"
    return _table("## The twelve that matter most", head, rows)


_FIGURES = "expected | as expected | links | first byte: median / worst | direct: median / worst"


def _figures(cell: Cell, seen: Mapping[str, Seen]) -> str:
    one = seen.get(cell.name, NOT_TRIED)
    links = ", ".join(f"{link} {count}" for link, count in one.links.items()) or "–"
    agreed = f"{one.agreed}/{one.tries}" if one.tries else "not tried"
    agreed = agreed if one.is_good(cell) else f"**{agreed}**"
    return (
        f"{cell.outcome.value} | {agreed} | {links} | {times(one.first_byte_s)} | "
        f"{times(one.direct_s)}"
    )


def _ways(seen: Mapping[str, Seen]) -> str:
    """The times asked for, over all cells of one way."""
    rows = []
    for relay in (False, True):
        for letter, way in WAYS.items():
            cells = [cell for cell in CELLS.values() if cell.way is way and cell.relay is relay]
            first = _gathered(cells, seen, lambda one: one.first_byte_s)
            direct = _gathered(cells, seen, lambda one: one.direct_s)
            if first:
                rows.append(
                    f"| {letter} | {_yes(relay)} | {times(first)} {_met(first, FIRST_BYTE_S)} | "
                    f"{times(direct)} {_met(direct, DIRECT_S)} |"
                )
    head = "| way | relay | first byte: median / worst | direct: median / worst |"
    note = (
        f"\nTo reach: the first byte within {FIRST_BYTE_S:.0f} s, direct within {DIRECT_S:.0f} s, "
        "in the median. A reply code's way is timed from the moment when the printer takes it.\n"
    )
    return _table("## How long it takes", head, rows) + note


def _gathered(
    cells: Iterable[Cell], seen: Mapping[str, Seen], take: Callable[[Seen], list[float]]
) -> list[float]:
    return [value for cell in cells for value in take(seen.get(cell.name, NOT_TRIED))]


def _met(values: list[float], most_s: float) -> str:
    return "" if not values or statistics.median(values) <= most_s else "**(too long)**"


def _slow(seen: Mapping[str, Seen]) -> str:
    """Each cell that misses a goal in its own median: over all cells of a way, it may not show."""
    rows = [
        f"| `{name}` | {times(one.first_byte_s)} {_met(one.first_byte_s, FIRST_BYTE_S)} | "
        f"{times(one.direct_s)} {_met(one.direct_s, DIRECT_S)} | {one.run or 'not noted'} |"
        for name, one in ((name, seen.get(name, NOT_TRIED)) for name in CELLS)
        if _is_slow(one)
    ]
    title = "## Slower than the goals"
    goals = f"{FIRST_BYTE_S:.0f} s to the first byte, {DIRECT_S:.0f} s until it is direct"
    if not rows:
        return f"{title}\n\nNone of the cells tried has a median beyond {goals}.\n"
    head = "| cell | first byte: median / worst | direct: median / worst | run |"
    return _table(title, head, rows) + f"\nThe goals, in each cell's median: {goals}.\n"


def _is_slow(one: Seen) -> bool:
    return bool(_met(one.first_byte_s, FIRST_BYTE_S) or _met(one.direct_s, DIRECT_S))


def _differing(seen: Mapping[str, Seen]) -> str:
    rows = []
    for name, cell in CELLS.items():
        one = seen.get(name, NOT_TRIED)
        if one.tries and not one.is_good(cell):
            got = ", ".join(f"{outcome} {count}" for outcome, count in one.outcomes.items())
            said = one.said.replace("|", "/").replace("\n", " ")
            rows.append(f"| `{name}` | {cell.outcome.value}: {cell.reason} | {got} | {said} |")
    if not rows:
        return "## Not as expected\n\nNone of the cells tried.\n"
    return _table("## Not as expected", "| cell | expected | seen | said |", rows)


def _all(seen: Mapping[str, Seen]) -> str:
    rows = [f"| `{name}` | {_figures(cell, seen)} |" for name, cell in CELLS.items()]
    return _table("## Every cell", f"| cell | {_FIGURES} |", rows)


def _table(title: str, head: str, rows: list[str]) -> str:
    ruler = "|" + "---|" * (head.replace("\\|", "").count("|") - 1)
    return "\n".join([title, "", head, ruler, *rows]) + "\n"


def _yes(truth: bool) -> str:
    return "yes" if truth else ""
