"""Which nodes compute, in which order, which layers on which device: the fastest there is. Sans-IO.

The engine's rules (`plan.py`): the orchestrator's CPU has the first items or none, then come the
lenders in any order, each one's devices together, then the orchestrator's accelerators.

For a given order the best ranges are found exactly (`chain.py`). Orders are searched depth first,
an order cut off as soon as what it has cost and the least that is still to come reach the best
known; of nodes that are alike in all respects the first is tried. That is exact, and the answer
says so, where it ends within its budget: five lenders nearly always, more where they are alike.
Where it does not, the best known stands. It comes from the lenders that give the most memory for
the least time, in the order of the shortest way through them, improved by leaving out, taking in,
changing places.

The prompts of several streams follow each other through a ring in pieces, and the slowest stage
counts many times over. There the ranges are searched again and again under a smaller cap for that
stage: in small cases until no cap can help, in others a few steps, and then nothing is exact.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from meshnode.pipeline.chain import Row
from meshnode.pipeline.lineup import Chain, Lineup, Mode, Problem
from meshnode.pipeline.predict import Pricing, Stage

BUDGET_CELLS = 60_000
"""Of rows, about half a microsecond each: what an answer in a tenth of a second has time for."""
MAX_CAPS = 6
EXACT_CELLS = 150
"""Of an order, up to which every cap is tried that may help."""
MIN_SETS = 3


@dataclass(frozen=True)
class Found:
    """`is_exact`: by these figures there is nothing faster."""

    stages: tuple[Stage, ...]
    cost_s: float
    is_exact: bool


def search(problem: Problem, budget_cells: int = BUDGET_CELLS) -> Found | None:
    """The fastest chain for the load; None where the model has no room."""
    chains = []
    is_exact = True
    modes = list(_modes(problem))
    for mode in modes:
        one = _Search(Lineup(problem, mode), budget_cells // len(modes))
        chains.append(one.run())
        is_exact = is_exact and one.is_exact
    best = min(chains, key=lambda chain: chain.cost_s)
    return Found(best.stages, best.cost_s, is_exact) if best.stages else None


def _modes(problem: Problem) -> Iterator[Mode]:
    pricing = Pricing(problem.work, problem.links, problem.load, problem.cpu.site)
    several = len(problem.lenders)
    few, few_tokens = pricing.pieces(1)
    if not few:
        yield Mode(0, 0.0, 0, 0, several)
        return
    yield Mode(few, few_tokens, 0, 0, 1)
    if several > 1:
        many, many_tokens = pricing.pieces(2)
        if not problem.links.ring or problem.links.parted or problem.gpus:
            yield Mode(many, many_tokens, 0, 2, several)
        if problem.links.ring:
            yield Mode(1, many_tokens, many - 1, 2, several)


class _Search:
    """One mode being searched."""

    def __init__(self, lineup: Lineup, budget_cells: int) -> None:
        self._lineup = lineup
        self._mode = lineup.mode
        self._budget_cells = budget_cells
        self._reserve_cells = budget_cells // 2  # for making better what is not exact
        self._best = Chain((), math.inf)
        self._tried: set[tuple[int, ...]] = set()
        self._alike = [
            [other for other in range(index) if lineup.are_alike(other, index)]
            for index in range(len(lineup.names))
        ]
        self._back_s = min(lineup.return_s, default=0.0)
        if lineup.problem.gpus or not lineup.names:
            self._back_s = 0.0
        self.is_exact = True

    def run(self) -> Chain:
        for order in self._first_orders():
            self._try(order)
        n_lenders = len(self._lineup.names)
        self._explore(self._lineup.start(), (), n_lenders)
        if not self.is_exact:
            self._improve()
        return self._best

    def _try(self, order: tuple[int, ...]) -> bool:
        """Whether this order is better than all before it."""
        lineup = self._lineup
        if order in self._tried or not self._mode.fewest <= len(order) <= self._mode.most:
            return False
        if lineup.n_devices(order) > lineup.problem.max_devices:
            return False
        self._tried.add(order)
        n_caps = None if (len(order) + 1) * lineup.n_items <= EXACT_CELLS else MAX_CAPS
        if n_caps and self._mode.repeats:
            self.is_exact = False
        found = lineup.best(order, n_caps)
        if found.cost_s < self._best.cost_s:
            self._best = found
            return True
        return False

    def _cells_left(self) -> int:
        return self._budget_cells - self._lineup.n_cells

    # -- orders to begin with -----------------------------------------------------------------

    def _first_orders(self) -> Iterator[tuple[int, ...]]:
        """None, the best lenders alone, and more and more of those worth most."""
        yield ()
        ranked = self._ranked()
        for index in ranked[: max(8, MIN_SETS)]:
            yield (index,)
        lineup = self._lineup
        whole_bytes = sum(lineup.problem.sizes)
        rooms = [self._room_bytes(index) for index in range(len(lineup.names))]
        own = (lineup.problem.cpu, *lineup.problem.gpus)
        room_bytes = sum(max(0.0, seat.room_bytes) for seat in own)
        sets, due = 0, 0
        for count, index in enumerate(ranked, 1):
            room_bytes += rooms[index]
            has_room = room_bytes >= whole_bytes and count >= due
            if count > 1 and (has_room or count == len(ranked)):
                order = self._shortest(tuple(ranked[:count]))
                yield order
                if not self._best.stages:  # the output may be more than the last one has room for
                    last = max(order, key=self._room_bytes)
                    yield (*(index for index in order if index != last), last)
                sets += 1
                due = count + 1 + max(0, sets - MIN_SETS)  # ever larger steps
                if sets >= MIN_SETS and self._best.stages and self._cells_left() < 0:
                    return

    def _room_bytes(self, index: int) -> float:
        return sum(max(0.0, seat.room_bytes) for seat in self._lineup.problem.lenders[index])

    def _ranked(self) -> list[int]:
        """Lenders by the price of a byte there: its time, and its share of what the node costs."""
        lineup = self._lineup
        whole_bytes = max(1, sum(lineup.problem.sizes))
        prices = []
        for index, seats in enumerate(lineup.problem.lenders):
            nearest_s = min(
                (
                    *lineup.between_s[index][:index],
                    *lineup.between_s[index][index + 1 :],
                    lineup.out_s[index],
                )
            )
            price = math.inf
            for seat in seats:
                room_bytes = min(whole_bytes, max(0.0, seat.room_bytes))
                if room_bytes:
                    each_s = lineup.whole_s(seat) / whole_bytes
                    price = min(price, each_s + nearest_s / room_bytes)
            prices.append((price, index))
        return [index for _, index in sorted(prices)]

    def _shortest(self, chosen: tuple[int, ...]) -> tuple[int, ...]:
        """These in the order of a short way through them: the nearest next, then stretches of it
        turned round as long as that helps."""
        lineup = self._lineup
        left, order = list(chosen), list[int]()
        while left:
            at = order[-1] if order else None
            nearest = min(left, key=lambda index: lineup.entry_s(at, index))
            left.remove(nearest)
            order.append(nearest)
        for _ in range(3):
            if not self._turn(order):
                break
        return tuple(order)

    def _turn(self, order: list[int]) -> bool:
        """One round of 2-opt, over hops that may differ by direction."""
        lineup, improved, count = self._lineup, False, len(order)
        between_s = lineup.between_s
        for first in range(count - 1):
            entry_s = between_s[order[first - 1]] if first else lineup.out_s
            one, forward_s, backward_s = order[first], 0.0, 0.0
            for last in range(first + 1, count):
                before, other = order[last - 1], order[last]
                forward_s += between_s[before][other]
                backward_s += between_s[other][before]
                if last + 1 < count:
                    after = order[last + 1]
                    exits_s = between_s[other][after], between_s[one][after]
                else:
                    exits_s = lineup.return_s[other], lineup.return_s[one]
                now_s = entry_s[one] + forward_s + exits_s[0]
                if entry_s[other] + backward_s + exits_s[1] < now_s - 1e-12:
                    order[first : last + 1] = reversed(order[first : last + 1])
                    improved = True
                    break
        return improved

    # -- all orders ---------------------------------------------------------------------------

    def _explore(self, row: Row, order: tuple[int, ...], n_lenders: int) -> None:
        """Every order that begins so, unless it cannot be better than the best."""
        lineup, mode = self._lineup, self._mode
        if len(order) >= mode.fewest and order not in self._tried:
            if mode.repeats:
                self._try(order)
            else:
                found = lineup.finish(row, order)
                self._best = min(self._best, found, key=lambda chain: chain.cost_s)
        if len(order) == mode.most:
            return
        last = order[-1] if order else None
        for index in range(n_lenders):
            if index in order or not set(self._alike[index]) <= set(order):
                continue
            longer = (*order, index)
            if lineup.n_devices(longer) > lineup.problem.max_devices:
                self.is_exact = False  # its devices are counted, though some may stay empty
                continue
            if self._cells_left() < self._reserve_cells:
                self.is_exact = False
                return
            further = lineup.follow(row, last, index)
            if self._least_s(further) < self._best.cost_s:
                self._explore(further, longer, n_lenders)

    def _least_s(self, row: Row) -> float:
        """What no order that begins with this row can be below."""
        least = self._lineup.least_s
        so_far_s = min(map(float.__add__, row.cost, least))
        return so_far_s + self._back_s + self._lineup.slowest_least_s()

    # -- better and better --------------------------------------------------------------------

    def _improve(self) -> None:
        """Changes of the best order, the first that helps, until none does or time is up."""
        while any(self._cells_left() > 0 and self._try(one) for one in self._changed()):
            pass

    def _changed(self) -> Iterator[tuple[int, ...]]:
        """The best order with a lender less, one for another, one more, two in exchange."""
        order = self._best.order
        unused = [index for index in self._ranked() if index not in order]
        for at in range(len(order)):
            yield order[:at] + order[at + 1 :]
        for at, index in itertools.product(range(len(order)), unused[:8]):
            yield (*order[:at], index, *order[at + 1 :])
        for index in unused[:8]:
            ways = (self._shortest((*order, index)), (*order, index), (index, *order))
            yield from ways
        for one, other in itertools.combinations(range(len(order)), 2):
            swapped = list(order)
            swapped[one], swapped[other] = swapped[other], swapped[one]
            yield tuple(swapped)
