"""The table of expected outcomes, derived a second time: from what each kind of network is."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tests.netlab.expected import CELLS, KINDS, NAMED, NEIGHBOURS, Outcome, letter_of


@dataclass(frozen=True)
class Side:
    """How one address family stands. known: peers can be told where to send (the mapping is the
    same for all). admits: whom it lets in unasked, or after which of its own packets."""

    known: bool = True
    admits: str = "all"  # "all", "address" once sent to, "socket" once sent to


OPEN, FIREWALLED = Side(), Side(admits="socket")
BLOCKED = "no UDP"
SIDES: dict[str, dict[int, Side] | str] = {
    "open": {4: OPEN, 6: OPEN},
    "full": {4: OPEN},
    "addr": {4: Side(admits="address")},
    "port": {4: FIREWALLED},
    "home": {4: FIREWALLED},
    "sym": {4: Side(known=False, admits="socket")},
    "stealth": {4: FIREWALLED, 6: FIREWALLED},
    "blocked": BLOCKED,
    "cgnat": {4: FIREWALLED},
    "ipv6": {6: FIREWALLED},
    "broken4": {6: OPEN},
    "short": {4: FIREWALLED},
    "upnp": {4: OPEN},
}
BEST_FIRST = "TRPBS"


def derived(printer: str, joiner: str) -> str:
    left, right = SIDES[printer], SIDES[joiner]
    if isinstance(left, str) or isinstance(right, str):
        others = [side for side in (left, right) if isinstance(side, dict)]
        return "U" if all(4 in side for side in others) else "F"
    common = left.keys() & right.keys()
    return min((one_way(left[f], right[f]) for f in common), key=BEST_FIRST.index, default="F")


def one_way(printer: Side, joiner: Side) -> str:
    if printer == OPEN:
        return "T"
    if joiner == OPEN:
        return "R"
    if printer.known and joiner.known:
        return "P"
    if not printer.known and not joiner.known:
        return "S"
    easy = printer if printer.known else joiner
    return "P" if easy.admits == "address" else "B"


@pytest.mark.parametrize("printer", KINDS)
def test_each_letter_follows_from_what_the_two_networks_are(printer: str) -> None:
    table = "".join(letter_of(printer, joiner) for joiner in KINDS)
    assert table == "".join(derived(printer, joiner) for joiner in KINDS)


def test_every_pair_is_there_with_and_without_a_relay_and_either_side_may_print() -> None:
    pairs = len(KINDS) ** 2 + len(NEIGHBOURS)
    assert len(CELLS) == 2 * pairs


@pytest.mark.parametrize("name", CELLS)
def test_swapping_printer_and_joiner_changes_no_outcome(name: str) -> None:
    cell = CELLS[name]
    swapped = next(
        other
        for other in CELLS.values()
        if (other.printer, other.joiner, other.relay) == (cell.joiner, cell.printer, cell.relay)
    )
    assert swapped.outcome is cell.outcome


def test_with_a_relay_nothing_is_impossible_and_what_was_direct_still_is() -> None:
    for name, cell in CELLS.items():
        if cell.relay:
            without = CELLS[name.removesuffix("+relay")].outcome
            assert cell.outcome is not Outcome.IMPOSSIBLE
            assert (cell.outcome is Outcome.DIRECT) == (without is Outcome.DIRECT)


def test_twelve_cells_are_named_with_reasons() -> None:
    assert len(NAMED) == 12
    assert NAMED.keys() <= CELLS.keys()
