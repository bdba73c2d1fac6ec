"""The search finds what trying everything finds, and says how far that can be believed."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Iterator
from dataclasses import replace

import pytest

from meshnode.pipeline.chain import Seat
from meshnode.pipeline.lineup import Lineup, Mode, Problem
from meshnode.pipeline.predict import Pricing, Site, Stage, load_s
from meshnode.pipeline.search import BUDGET_CELLS, MAX_CAPS, search
from meshnode.pipeline.speeds import Link, Links, Speed
from meshnode.pipeline.work import ANSWER, CROWD, Load, Work

CASES = 250
"""A seed each, times ten."""
GAP = 0.3
"""How much longer what is tried first takes at most than the fastest, without any search."""
MEDIAN_GAP = 0.001


def any_seat(chance: random.Random, node: str, device: str, whole_bytes: int) -> Seat:
    decode = chance.choice([1, 2, 5, 20]) * chance.uniform(0.9, 1.1)
    speed = Speed(decode, decode * chance.uniform(5, 40), chance.choice([0.0, 0.5]))
    room = whole_bytes * chance.choice([0.2, 0.4, 0.7, 1.1])
    return Seat(Site(node, device, speed, node == "local"), room)


def any_problem(chance: random.Random) -> Problem:
    n_layers = chance.randint(2, 5)
    sizes = tuple(chance.randint(5, 15) for _ in range(n_layers))
    output = chance.randint(1, 20)
    whole = sum(sizes) + output
    names = [f"n{number}" for number in range(chance.randint(0, 3))]
    lenders = tuple(
        tuple(any_seat(chance, name, f"D{d}", whole) for d in range(chance.choice([1, 1, 2])))
        for name in names
    )
    if len(lenders) > 1 and chance.random() < 0.3:  # two of a kind
        lenders = (
            *lenders[:-1],
            tuple(replace(seat, site=replace(seat.site, node=names[-1])) for seat in lenders[0]),
        )
    at_home = chance.random() < 0.4
    everyone = ["local", *names]
    pairs = {
        pair: Link(chance.choice([0.1, 1, 8]), chance.choice([3.0, 30.0]))
        for pair in itertools.permutations(everyone, 2)
    }
    if chance.random() < 0.3:
        pairs = {pair: Link(1.0, 10.0) for pair in pairs}
    parted = {("n0", "n1")} if chance.random() < 0.15 else set[tuple[str, str]]()
    gpus = () if chance.random() < 0.7 else (any_seat(chance, "local", "GPU0", whole),)
    read = tuple(float(size) for size in (*sizes, output))
    return Problem(
        work=Work(read, (*read[:-1], 0.0), chance.uniform(0.1, 3), chance.uniform(1, 30)),
        links=Links(pairs, ring=chance.random() < 0.8, parted=frozenset(parted)),
        load=chance.choice([ANSWER, Load(300, 3, 4), CROWD]),
        sizes=(*sizes, 0 if at_home else output),
        cpu=any_seat(chance, "local", "CPU", whole),
        lenders=lenders,
        gpus=gpus,
        output_at_home=at_home,
    )


def every_chain(problem: Problem) -> Iterator[list[Stage]]:
    """All orders of all sets of lenders, and all ranges on their devices that have room."""
    n = len(problem.lenders)
    for count in range(n + 1):
        for order in itertools.permutations(range(n), count):
            row = [problem.cpu, *itertools.chain(*(problem.lenders[i] for i in order))]
            row += problem.gpus
            for cuts in itertools.combinations_with_replacement(
                range(len(problem.sizes) + 1), len(row) - 1
            ):
                edges = (0, *cuts, len(problem.sizes))
                ranges = list(zip(row, edges, edges[1:], strict=False))
                if any(sum(problem.sizes[a:b]) > seat.room_bytes for seat, a, b in ranges if a < b):
                    continue
                yield [Stage(seat.site, a, b) for seat, a, b in ranges if b > a]


def brute_force(problem: Problem) -> float:
    pricing = Pricing(problem.work, problem.links, problem.load, problem.cpu.site)
    best = math.inf
    for stages in every_chain(problem):
        if problem.output_at_home and stages[-1].site.is_local:
            continue
        best = min(best, cost(problem, pricing, stages))
    return best


def cost(problem: Problem, pricing: Pricing, stages: list[Stage]) -> float:
    return load_s(pricing, problem.cpu.site, stages, output_at_home=problem.output_at_home)


@pytest.mark.parametrize("block", range(10))
def test_an_exact_answer_is_what_trying_everything_finds(block: int) -> None:
    for seed in range(block * CASES, (block + 1) * CASES):
        problem = any_problem(random.Random(seed))
        found, best = search(problem), brute_force(problem)
        if found is None:
            assert best == math.inf, seed
            continue
        assert found.is_exact, seed
        assert found.cost_s == pytest.approx(best), seed
        pricing = Pricing(problem.work, problem.links, problem.load, problem.cpu.site)
        assert cost(problem, pricing, list(found.stages)) == pytest.approx(found.cost_s), seed


def uneven(chance: random.Random, problem: Problem) -> Problem:
    """The same with layers that differ in kind, on devices that differ in what is quick there: what
    a layer takes is no longer a multiple of its bytes."""
    n_layers = len(problem.work.read) - 1
    work = replace(
        problem.work,
        kept=tuple(chance.choice([0.0, 0.01]) for _ in range(n_layers)),
        numbers=tuple(chance.uniform(1, 20) for _ in range(n_layers)),
        queries=tuple(chance.choice([0.0, 1.0, 5.0]) for _ in range(n_layers)),
        done=tuple(done * chance.choice([0.2, 1.0]) for done in problem.work.done),
    )

    def change(seat: Seat) -> Seat:
        item_s = 10 / seat.site.speed.prefill_bytes_per_s
        speed = replace(
            seat.site.speed,
            layer_s=chance.choice([0.0, 10 * item_s]),
            number_s=chance.choice([0.0, 0.1, 1.0]) * item_s,
            attention_s=chance.choice([0.0, 0.01]) * item_s,
        )
        return replace(seat, site=replace(seat.site, speed=speed))

    return replace(
        problem,
        work=work,
        cpu=change(problem.cpu),
        lenders=tuple(tuple(map(change, seats)) for seats in problem.lenders),
        gpus=tuple(map(change, problem.gpus)),
    )


def test_layers_of_several_kinds_are_searched_as_exactly() -> None:
    for seed in (*range(400), 3310):  # there the work cannot be spread as evenly as its bytes
        chance = random.Random(seed)
        problem = uneven(chance, any_problem(chance))
        found, best = search(problem), brute_force(problem)
        if found is None:
            assert best == math.inf, seed
            continue
        assert found.is_exact, seed
        assert found.cost_s == pytest.approx(best), seed


# -- many machines --------------------------------------------------------------------------------

GB = 10**9


def many(seed: int, n_lenders: int, n_layers: int, load: Load = ANSWER) -> Problem:
    """Machines at random places within 30 ms, a third of them with an accelerator."""
    chance = random.Random(seed)
    sizes = (*(int(chance.uniform(0.4, 0.6) * GB) for _ in range(n_layers)), 2 * GB)
    names = [f"n{number}" for number in range(n_lenders)]
    spots = {name: complex(chance.random(), chance.random()) * 0.03 for name in ("local", *names)}
    fit = chance.choice([1.5, 3.0, 8.0])

    def seat(name: str) -> Seat:
        rate = chance.uniform(10, 60) * GB * chance.choice([1, 1, 10])
        speed = Speed(rate, rate * chance.uniform(5, 40), chance.choice([1e-4, 1e-3]))
        room = fit * sum(sizes) / n_lenders * chance.uniform(0.3, 2)
        return Seat(Site(name, "D0", speed, name == "local"), room)

    read = tuple(map(float, sizes))
    return Problem(
        work=Work(read, (*read[:-1], 0.0), 32e3, 600e3),
        links=Links(
            {
                (one, other): Link(5e-4 + abs(spots[one] - spots[other]), 1e8)
                for one, other in itertools.permutations(spots, 2)
            }
        ),
        load=load,
        sizes=sizes,
        cpu=seat("local"),
        lenders=tuple((seat(name),) for name in names),
    )


def test_what_is_tried_first_is_not_far_from_the_fastest() -> None:
    gaps = []
    for seed in range(60):
        problem = many(seed, 5, 24)
        exact, first = search(problem, 10**9), search(problem, 0)
        if exact is None:
            continue
        assert exact.is_exact
        assert first is not None, seed
        gaps.append(first.cost_s / exact.cost_s - 1)
    assert len(gaps) > 50
    assert max(gaps) < GAP
    assert statistics.median(gaps) < MEDIAN_GAP


@pytest.mark.parametrize("load", [ANSWER, CROWD], ids=["answer", "crowd"])
def test_fifty_machines_are_searched_within_the_budget(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest order is 51 rows of 127 cells, and one may be begun when the budget ends."""
    lineups: list[Lineup] = []
    made = Lineup.__init__

    def make(self: Lineup, problem: Problem, mode: Mode) -> None:
        made(self, problem, mode)
        lineups.append(self)

    monkeypatch.setattr(Lineup, "__init__", make)
    for seed in range(3):
        problem = many(seed, 50, 126, load)
        lineups.clear()
        found = search(problem)
        assert found is not None
        assert not found.is_exact
        most = BUDGET_CELLS + 4 * 51 * 127 * (1 if load is ANSWER else MAX_CAPS)
        assert sum(lineup.n_cells for lineup in lineups) < most
        pricing = Pricing(problem.work, problem.links, problem.load, problem.cpu.site)
        assert cost(problem, pricing, list(found.stages)) == pytest.approx(found.cost_s)


def test_no_more_devices_than_the_engine_takes() -> None:
    problem = replace(many(3, 8, 20), max_devices=2)
    roomy = tuple(
        tuple(replace(seat, room_bytes=100.0 * GB) for seat in seats) for seats in problem.lenders
    )
    found = search(replace(problem, lenders=roomy))
    assert found is not None
    assert len({stage.site.node for stage in found.stages} - {"local"}) <= 2
    assert search(replace(problem, max_devices=0, cpu=replace(problem.cpu, room_bytes=0.0))) is None


def test_of_machines_that_are_alike_one_order_is_enough() -> None:
    one = many(1, 1, 60)
    seat = replace(one.lenders[0][0], room_bytes=0.12 * sum(one.sizes))
    alike = tuple(
        (replace(seat, site=replace(seat.site, node=f"n{number}")),) for number in range(12)
    )
    everywhere = Links(
        {
            pair: Link(2e-3, 1e8)
            for pair in itertools.permutations(["local", *(f"n{n}" for n in range(12))], 2)
        }
    )
    found = search(replace(one, lenders=alike, links=everywhere))
    assert found is not None
    assert found.is_exact
