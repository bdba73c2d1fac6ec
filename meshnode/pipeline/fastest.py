"""From places and costs to the fastest portions: what `search.py` finds, in the planner's terms.

Sans-IO.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meshnode.config import Objective
from meshnode.pipeline.chain import Seat
from meshnode.pipeline.costs import Costs
from meshnode.pipeline.fill import Place, Portion
from meshnode.pipeline.lineup import Problem
from meshnode.pipeline.plan import PlanRequest
from meshnode.pipeline.predict import Pricing, Site, Stage, load_s
from meshnode.pipeline.search import BUDGET_CELLS, search
from meshnode.pipeline.work import ANSWER, CROWD, Load

MAX_DEVICES = 63
"""That a search puts in a row: the engine takes no more rpc-servers."""


@dataclass(frozen=True)
class Places:
    """Where items may lie, in the engine's order; `lenders` by node, in any order."""

    cpu: Place
    lenders: Sequence[Sequence[Place]]
    gpus: Sequence[Place]


@dataclass(frozen=True)
class Fastest:
    """`is_exact`: nothing is faster, by what is known of speeds."""

    portions: list[Portion]
    cost_s: float
    is_exact: bool


def load_for(objective: Objective) -> Load:
    """What an objective is judged by."""
    return CROWD if objective is Objective.THROUGHPUT else ANSWER


class Racecourse:
    """I judge portions of one request by how long its load takes, and look for the fastest."""

    def __init__(
        self, request: PlanRequest, pricing: Pricing, costs: Costs, places: Places
    ) -> None:
        self._request = request
        self._pricing = pricing
        self._costs = costs
        self._places = places
        self._speeds = {
            (node.name, device.name): device.speed
            for node in request.nodes
            for device in node.devices
        }
        self._home = self._site(places.cpu)

    def search(self, *, output_at_home: bool) -> Fastest | None:
        """None where there is no room, however it is spread."""
        places = self._places
        problem = Problem(
            work=self._pricing.work,
            links=self._request.links,
            load=self._pricing.load,
            sizes=tuple(item.total_bytes for item in self._costs.items),
            cpu=self._seat(places.cpu),
            lenders=tuple(tuple(map(self._seat, lender)) for lender in places.lenders),
            gpus=tuple(map(self._seat, places.gpus)),
            output_at_home=output_at_home,
            max_devices=MAX_DEVICES,
            shared=self._pricing,
        )
        found = search(problem, BUDGET_CELLS // 2)
        if found is None:
            return None
        all_places = [places.cpu, *places.gpus, *(one for row in places.lenders for one in row)]
        by_site = {self._site(place): place for place in all_places}
        portions = [Portion(by_site[one.site], one.start, one.stop) for one in found.stages]
        if portions[-1].start == self._request.model.n_layers and output_at_home:
            return None  # the last lender would compute nothing
        return Fastest(portions, found.cost_s, found.is_exact)

    def cost_s(self, portions: Sequence[Portion]) -> float:
        """Of portions that end where the output is."""
        stages = [Stage(self._site(one.place), one.start, one.stop) for one in portions]
        return load_s(self._pricing, self._home, stages, output_at_home=False)

    def _seat(self, place: Place) -> Seat:
        fixed_bytes = place.reserved_bytes + self._costs.device_compute_bytes
        return Seat(self._site(place), float(place.usable_bytes - fixed_bytes))

    def _site(self, place: Place) -> Site:
        is_local = place.node == self._places.cpu.node
        return Site(place.node, place.device, self._speeds[place.node, place.device], is_local)
