"""A whole plan for fifty machines and 126 layers: how much is computed for it, counted.

Its processor time is on docs/planning.md; what it consists of is the same on every machine.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from meshnode.config import Objective
from meshnode.models.kv import Cells, LayerMemory
from meshnode.pipeline import lineup, predict
from meshnode.pipeline.costs import PlanModel
from meshnode.pipeline.plan import PlanDevice, PlanNode, PlanRequest, Share
from meshnode.pipeline.planner import make_plan
from meshnode.pipeline.search import BUDGET_CELLS, MAX_CAPS
from meshnode.pipeline.speeds import Link, Links, Speed
from meshnode.pipeline.stock import Stock
from tests.meshnode.pipeline.plans import GIB

MACHINES, LAYERS = 50, 126
ORDER_CELLS = (MACHINES + 1) * (LAYERS + 1)
"""Of the longest order, once."""


def request(seed: int, objective: Objective) -> PlanRequest:
    """Machines at random places within 30 ms, a third of them ten times as fast."""
    chance = random.Random(seed)
    layers = tuple(int(chance.uniform(0.4, 0.6) * GIB) for _ in range(LAYERS))
    model = PlanModel(
        name="big",
        layer_bytes=layers,
        embedding_bytes=2 * GIB,
        output_bytes=2 * GIB,
        other_bytes=0,
        memory=(LayerMemory((Cells(1024, 1024),)),) * LAYERS,
        n_embd=8192,
        n_attn=8192,
        n_ff=28672,
        n_vocab=128_000,
    )
    names = [f"n{number}" for number in range(MACHINES)]
    spots = {name: complex(chance.random(), chance.random()) * 0.03 for name in ("local", *names)}
    fit = chance.choice([1.5, 3.0, 8.0])

    def node(name: str) -> PlanNode:
        rate = chance.uniform(10, 60) * 1e9 * chance.choice([1, 1, 10])
        speed = Speed(rate, rate * chance.uniform(5, 40), chance.choice([1e-4, 1e-3]))
        room = int(fit * sum(layers) / MACHINES * chance.uniform(0.3, 2)) + 4 * GIB
        if name == "local":
            return PlanNode(name, True, (PlanDevice("CPU", room + 8 * GIB, False, speed),))
        return PlanNode(name, False, (PlanDevice("D0", room, True, speed),))

    return PlanRequest(
        model,
        tuple(map(node, spots)),
        ctx_tokens=4096,
        objective=objective,
        output_may_stay=True,
        links=Links(
            {
                (one, other): Link(5e-4 + abs(spots[one] - spots[other]), 1e8)
                for one, other in itertools.permutations(spots, 2)
            }
        ),
    )


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each of these was computed: `cells` of rows, `starts` of ranges under a cap, and
    `ways` from one machine to another that were looked up."""
    found = Counter[str]()

    def count(what: str, place: Any, name: str, size: Callable[..., int]) -> None:
        computed = getattr(place, name)

        def compute(*given: Any) -> Any:
            found[what] += size(*given)
            return computed(*given)

        monkeypatch.setattr(place, name, compute)

    count("cells", lineup, "extend", lambda row, *_: len(row.cost) - 1)
    count("starts", lineup, "lowest_starts", lambda sizes, *_: len(sizes) - 1)
    count("ways", predict.Pricing, "_way", lambda *_: 1)
    return found


@pytest.mark.parametrize("objective", [Objective.LATENCY, Objective.THROUGHPUT])
def test_a_plan_for_fifty_machines_takes_a_bounded_effort(
    objective: Objective, counted: Counter[str]
) -> None:
    for seed in range(10):
        counted.clear()
        make_plan(request(seed, objective))
        assert counted["ways"] < 1.5 * (MACHINES + 1) ** 2, "each is priced once"
        if objective is Objective.LATENCY:
            assert counted["starts"] <= 2 * ORDER_CELLS, "once with the output here, once away"
            assert counted["cells"] < BUDGET_CELLS + 2 * ORDER_CELLS
        else:
            assert counted["starts"] < BUDGET_CELLS
            assert counted["cells"] < BUDGET_CELLS + 2 * MAX_CAPS * ORDER_CELLS


class HalfThere(Stock):
    """Every machine holds some layers, each others."""

    def __init__(self, asked: PlanRequest, seed: int) -> None:
        chance, sizes = random.Random(seed), [*asked.model.layer_bytes, asked.model.output_bytes]
        self._lacking: dict[str, list[int]] = {}
        for at, node in enumerate(asked.nodes):
            first = at * LAYERS // len(asked.nodes)
            held = range(first, first + chance.randint(0, 12))
            self._lacking[node.name] = [0 if i in held else size for i, size in enumerate(sizes)]

    def missing_bytes(self, shares: Sequence[Share]) -> dict[str, int]:
        lacking: Counter[str] = Counter()
        for share in shares:
            row = self._lacking[share.node]
            lacking[share.node] += sum(row[share.first_layer : share.last_layer])
        return dict(lacking)

    def missing_sums(self, node: str) -> tuple[float, ...]:
        return tuple(itertools.accumulate(map(float, self._lacking[node]), initial=0.0))

    def layers_held(self, shares: Sequence[Share]) -> dict[str, tuple[int, int]]:
        return {share.node: (0, share.n_layers) for share in shares}


@pytest.mark.parametrize("objective", [Objective.LATENCY, Objective.THROUGHPUT])
def test_what_is_on_disks_costs_one_more_search_among_many(
    objective: Objective, counted: Counter[str]
) -> None:
    for seed in range(5):
        asked = request(seed, objective)
        counted.clear()
        make_plan(asked)
        plain_cells = counted["cells"]
        counted.clear()
        make_plan(replace(asked, stock=HalfThere(asked, seed)))
        assert counted["cells"] <= plain_cells + BUDGET_CELLS + 2 * MAX_CAPS * ORDER_CELLS
        assert counted["ways"] < 2 * 1.5 * (MACHINES + 1) ** 2
