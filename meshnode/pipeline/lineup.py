"""Lenders in one order, and the best ranges of items for them. Sans-IO.

A `Lineup` is a problem with everything looked up that orders have in common: what items cost on
each seat, what each hop costs. Lenders go by their index in the problem.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from meshnode.pipeline.chain import Row, Seat, Terms, extend, first_row, lowest_starts, merge
from meshnode.pipeline.predict import Pricing, Stage
from meshnode.pipeline.speeds import Links
from meshnode.pipeline.work import Load, Work

_SLIGHTLY_LESS = 1 - 1e-9


@dataclass(frozen=True)
class Problem:
    """`sizes`: bytes of each item in memory. `lenders`: by node, in the order of its devices.
    `output_at_home`: the last item takes no time where it is counted, but on `cpu`. `shared`: what
    problems that differ in rooms alone have in common."""

    work: Work
    links: Links
    load: Load
    sizes: tuple[int, ...]
    cpu: Seat
    lenders: tuple[tuple[Seat, ...], ...]
    gpus: tuple[Seat, ...] = ()
    output_at_home: bool = False
    max_devices: int = 63
    shared: Pricing | None = None

    @cached_property
    def pricing(self) -> Pricing:
        return self.shared or Pricing(self.work, self.links, self.load, self.cpu.site)


@dataclass(frozen=True)
class Mode:
    """How prompts go through: `passes` pieces of `piece_tokens` through every stage, and `repeats`
    times more the slowest. It is for `fewest` to `most` lenders."""

    passes: int
    piece_tokens: float
    repeats: int
    fewest: int
    most: int


@dataclass(frozen=True)
class Chain:
    """An order with its best ranges; no stages, and infinity, where it has no room."""

    order: tuple[int, ...]
    cost_s: float
    stages: tuple[Stage, ...] = ()


class Lineup:
    """I know the best ranges for any order of lenders, and bounds on what they cost."""

    def __init__(self, problem: Problem, mode: Mode) -> None:
        self.problem = problem
        self.mode = mode
        self._pricing = problem.pricing
        self.n_items = len(problem.sizes)
        self.names = [seats[0].site.node for seats in problem.lenders]
        home = problem.cpu.site.node
        self.out_s = [self._hop_s(home, name) for name in self.names]
        self.between_s = self._steps_s()
        self.return_s = [
            self._pricing.return_s(name, mode.passes, output_at_home=problem.output_at_home)
            for name in self.names
        ]
        self._tail_s = [self._hop_s(name, home) for name in self.names]
        self._end_s = self._pricing.home_output_s() if problem.output_at_home else 0.0
        self._has_tail = bool(problem.gpus) and not problem.output_at_home and not mode.repeats
        self._sums_bytes = tuple(itertools.accumulate(problem.sizes, initial=0))
        sums = {seat: self._sums(seat) for seat in self._seats()}
        self._sums_s = {seat: whole for seat, (whole, _) in sums.items()}
        self._pieces = {seat: pieces for seat, (_, pieces) in sums.items()}
        self._byte_s = {
            seat: self._pricing.least_s_per_byte(seat.site, mode.piece_tokens)
            for seat in self._seats()
        }
        self._terms: dict[Seat, tuple[float, Terms]] = {}
        self.n_cells = 0
        self._seat_of = {seat.site: seat for seat in self._seats()}
        self.least_s = self._least()

    # -- tables -------------------------------------------------------------------------------

    def _seats(self) -> list[Seat]:
        problem = self.problem
        return [problem.cpu, *itertools.chain(*problem.lenders), *problem.gpus]

    def _hop_s(self, start: str, end: str) -> float:
        return self._pricing.hop_s(start, end, self.mode.passes, self.mode.piece_tokens)

    def _steps_s(self) -> list[list[float]]:
        """From worker to worker; those that do not push to each other are no pipeline."""
        mode, links, names = self.mode, self.problem.links, self.names
        table = self._pricing.hop_table(names, mode.passes, mode.piece_tokens)
        if mode.repeats and (links.parted or not links.ring):
            for row, one in zip(table, names, strict=True):
                for index, other in enumerate(names):
                    if one != other and not links.goes_straight(one, other):
                        row[index] = math.inf
        return table

    def _sums(self, seat: Seat) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Seconds of the items before each: for the whole load, and for a piece of a prompt."""
        answers = self._pricing.answer_sums(seat.site)
        pieces = list(self._pricing.piece_sums(seat.site, self.mode.piece_tokens))
        whole = [a + self.mode.passes * b for a, b in zip(answers, pieces, strict=True)]
        if self.problem.output_at_home:  # there it takes no time here
            whole[-1], pieces[-1] = whole[-2], pieces[-2]
        return tuple(whole), tuple(pieces)

    def _under(self, seat: Seat, cap_s: float) -> Terms:
        """What ranges cost on a seat that may take so long for a piece of a prompt."""
        kept_cap_s, found = self._terms.get(seat, (-1.0, None))
        if found is None or kept_cap_s != cap_s:
            pieces = self._pieces[seat]
            found = Terms(
                seat,
                self._sums_s[seat],
                lowest_starts(self._sums_bytes, seat.room_bytes, pieces, cap_s),
                self._pricing.fixed_s(seat.site, self.mode.passes),
            )
            self._terms[seat] = cap_s, found
        return found

    def _least(self) -> list[float]:
        """For each item, the least that it and all after it take anywhere but on the local CPU."""
        seats = [*itertools.chain(*self.problem.lenders), *self.problem.gpus]
        least = [0.0 if index == self.n_items else math.inf for index in range(self.n_items + 1)]
        if seats:
            sums = [self._sums_s[seat] for seat in seats]
            rows = ([after - before for before, after in itertools.pairwise(row)] for row in sums)
            each = list(map(min, zip(*rows, strict=True)))
            least = list(itertools.accumulate(reversed(each), initial=0.0))[::-1]
        return least

    def slowest_least_s(self) -> float:
        """What the slowest stage adds at least, were the work spread evenly over everything."""
        return self.mode.repeats * self._spread_s(self._seats()) if self.mode.repeats else 0.0

    def are_alike(self, one: int, other: int) -> bool:
        """Whether the two may change places in any order without any difference."""
        moving = self._pricing.moving
        if moving and moving.get(self.names[one]) != moving.get(self.names[other]):
            return False
        first, second = self.problem.lenders[one], self.problem.lenders[other]
        if [(s.site.speed, s.room_bytes) for s in first] != [
            (s.site.speed, s.room_bytes) for s in second
        ]:
            return False
        if (self.out_s[one], self.return_s[one]) != (self.out_s[other], self.return_s[other]):
            return False
        between_s = self.between_s
        return between_s[one][other] == between_s[other][one] and all(
            between_s[one][third] == between_s[other][third]
            and between_s[third][one] == between_s[third][other]
            for third in range(len(self.names))
            if third not in (one, other)
        )

    # -- rows ---------------------------------------------------------------------------------

    def start(self, cap_s: float = math.inf) -> Row:
        """The local CPU, with any number of the first items."""
        nothing = first_row(self.n_items)
        terms = self._under(self.problem.cpu, cap_s)
        return merge(nothing, self._extend(nothing, terms, 0.0))

    def follow(self, row: Row, last: int | None, index: int, cap_s: float = math.inf) -> Row:
        """One lender more, after the lender `last`; it takes at least one item."""
        within_s = self.between_s[index][index]
        if self._wire_s(self.names[index], self.names[index]) > cap_s:
            within_s = math.inf
        seats = self.problem.lenders[index]
        return self._over(row, seats, self.entry_s(last, index), within_s, cap_s)

    def _over(
        self, row: Row, seats: Sequence[Seat], entry_s: float, within_s: float, cap_s: float
    ) -> Row:
        """The devices of one node, of which any may stay empty, but not all."""
        used: Row | None = None
        for seat in seats:
            terms = self._under(seat, cap_s)
            entered = self._extend(row, terms, entry_s)
            if used is None:
                used = entered
            else:
                used = merge(used, entered, self._extend(used, terms, within_s))
        assert used is not None
        return used

    def _extend(self, row: Row, terms: Terms, entry_s: float) -> Row:
        self.n_cells += self.n_items
        return extend(row, terms, entry_s)

    def finish(self, row: Row, order: tuple[int, ...], cap_s: float = math.inf) -> Chain:
        """All items placed, and what came out of them brought home."""
        last = order[-1] if order else None
        if last is None and self.problem.output_at_home:
            return Chain(order, math.inf)
        cost_s = row.cost[-1] + (0.0 if last is None else self.return_s[last]) + self._end_s
        if self._has_tail:
            entry_s = 0.0 if last is None else self._tail_s[last]
            tail = self._over(row, self.problem.gpus, entry_s, 0.0, cap_s)
            if tail.cost[-1] < cost_s:
                cost_s, row = tail.cost[-1], tail
        if cost_s == math.inf:
            return Chain(order, math.inf)
        return Chain(order, cost_s, tuple(row.stages(self.n_items)))

    def n_devices(self, order: Sequence[int]) -> int:
        lenders = self.problem.lenders
        return sum(len(lenders[index]) for index in order) + len(self.problem.gpus)

    # -- whole orders -------------------------------------------------------------------------

    def best(self, order: tuple[int, ...], max_caps: int | None = None) -> Chain:
        """The best ranges for this order, every lender of it used. `max_caps`: so many steps are
        taken towards a faster slowest stage; None: as many as there are."""
        found = self._whole(order, math.inf)
        if not self.mode.repeats or not found.stages:
            return found
        names = [self.problem.cpu.site.node, *(self.names[index] for index in order)]
        floor_s = max(itertools.starmap(self._wire_s, itertools.pairwise(names)))
        least_s = found.cost_s + self.mode.repeats * floor_s
        best = Chain(order, math.inf)
        slowest_s = self._slowest_s(found.stages)
        factor = _SLIGHTLY_LESS
        if max_caps is not None and slowest_s > floor_s:
            factor = (max(floor_s, self._even_s(order)) / slowest_s) ** (1 / max_caps)
            factor = min(factor, _SLIGHTLY_LESS)
        while found.stages and least_s < best.cost_s:
            slowest_s = self._slowest_s(found.stages)
            whole_s = found.cost_s + self.mode.repeats * max(slowest_s, floor_s)
            if whole_s < best.cost_s:
                best = Chain(order, whole_s, found.stages)
            if slowest_s <= floor_s:
                break
            found = self._whole(order, slowest_s * factor)
        return best

    def _even_s(self, order: Sequence[int]) -> float:
        """A piece of a prompt on the slowest stage, were it spread evenly over all of them."""
        chosen = itertools.chain(*(self.problem.lenders[index] for index in order))
        return self._spread_s([self.problem.cpu, *chosen])

    def _spread_s(self, seats: Sequence[Seat]) -> float:
        """Bytes that a prompt's tokens are multiplied with, by what the seats do of them in a
        second where each is at its best."""
        n_counted = self.n_items - self.problem.output_at_home
        done_bytes = sum(self.problem.work.done[:n_counted])
        rates = (1 / self._byte_s[seat] for seat in seats)
        return done_bytes / max(1e-12, sum(rates))

    def _whole(self, order: tuple[int, ...], cap_s: float) -> Chain:
        row, last = self.start(cap_s), None
        for index in order:
            row = self.follow(row, last, index, cap_s)
            last = index
        return self.finish(row, order, cap_s)

    def _slowest_s(self, stages: Sequence[Stage]) -> float:
        """For a piece of a prompt: a device's time, or a wire's between devices of one lender."""
        slowest_s = 0.0
        for stage in stages:
            pieces = self._pieces[self._seat_of[stage.site]]
            slowest_s = max(slowest_s, pieces[stage.stop] - pieces[stage.start])
        for before, after in itertools.pairwise(stages):
            if before.site.node == after.site.node:
                slowest_s = max(slowest_s, self._wire_s(before.site.node, after.site.node))
        return slowest_s

    def _wire_s(self, start: str, end: str) -> float:
        return self._pricing.wire_s(start, end, self.mode.piece_tokens)

    def whole_s(self, seat: Seat) -> float:
        """All items on one seat."""
        return self._sums_s[seat][-1] + self._pricing.fixed_s(seat.site, self.mode.passes)

    def entry_s(self, last: int | None, index: int) -> float:
        return self.out_s[index] if last is None else self.between_s[last][index]
