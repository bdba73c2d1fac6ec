"""Portions of a model's items for the places of one request, by memory or by speed. Sans-IO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from meshnode.config import Objective, Split, human_bytes
from meshnode.engine import abilities
from meshnode.errors import ResourceError, UsageError
from meshnode.pipeline.costs import Costs, costs_of
from meshnode.pipeline.fastest import Fastest, Places, Racecourse
from meshnode.pipeline.fill import Place, Portion, fill, left_over_bytes
from meshnode.pipeline.layers import ItemRange, apportion, as_line, to_items
from meshnode.pipeline.plan import Plan, PlanNode, PlanRequest, Share
from meshnode.pipeline.predict import Pricing

MAX_DEVICES = abilities.MAX_DEVICES - 1
"""`--tensor-split` takes fewer numbers than llama_max_devices()."""


class Placing:
    """One request being planned. `output_at_home`: the output item costs nothing where it is
    counted, and all of it on the local CPU."""

    def __init__(self, request: PlanRequest, *, output_at_home: bool = False) -> None:
        self._request = request
        self._output_at_home = output_at_home
        self._n_layers = request.model.n_layers
        self._n_items = self._n_layers + 1
        local = [node for node in request.nodes if node.is_local]
        cpus = [device for node in local for device in node.devices if not device.is_gpu]
        if len(local) != 1 or len(cpus) != 1:
            raise ValueError("one node is local and has one CPU")
        if len({node.name for node in request.nodes}) != len(request.nodes):
            raise ValueError("two nodes have one name")
        self._local = local[0]
        self._lenders = tuple(node for node in request.nodes if not node.is_local)
        self._costs = self._costs_with(output_shared=False)
        self._costs_shared = self._costs_with(output_shared=True)
        self._cpu = Place(
            self._local.name, cpus[0].name, cpus[0].usable_bytes, self._costs.host_bytes
        )
        self._gpus = tuple(
            Place(self._local.name, device.name, device.usable_bytes)
            for device in self._local.devices
            if device.is_gpu
        )

    def _costs_with(self, *, output_shared: bool) -> Costs:
        request = self._request
        return costs_of(
            request.model,
            ctx_tokens=request.ctx_tokens,
            slots=request.slots,
            kv_type=request.kv_type,
            cache=request.cache,
            output_shared=output_shared,
            output_at_home=self._output_at_home,
        )

    def check_host(self) -> None:
        """Raises `ResourceError` where the local CPU cannot even hold what it must."""
        host_missing_bytes = self._costs.host_bytes - self._cpu.usable_bytes
        if host_missing_bytes > 0:
            raise ResourceError(
                f"{self._local.name} has no room for the token embedding of "
                f"{self._request.model.name}, "
                f"which stays on it: {human_bytes(host_missing_bytes)} are missing; free some, or "
                "serve from a larger machine"
            )

    def fastest(self, pricing: Pricing) -> Fastest | None:
        """The fastest portions; None where the model has no room."""
        if self._costs.host_bytes > self._cpu.usable_bytes:
            return None
        lenders = [row for row in map(_lender_places, self._lenders) if row]
        places = Places(self._cpu, lenders, self._gpus)
        course = Racecourse(self._request, pricing, self._costs, places)
        found = course.search(output_at_home=self._output_at_home)
        if self._gpus or self._output_at_home:
            return found
        alone = self._on_local(0, self._n_items)  # a tied output is there once, and takes less
        if alone is None or (found and found.cost_s <= course.cost_s(alone)):
            return found
        return Fastest(alone, course.cost_s(alone), found is None or found.is_exact)

    def plan(self) -> Plan:
        request = self._request
        self.check_host()
        if request.layers is not None or request.tensor_split is not None:
            return self.build(self._overridden())
        balances = request.objective is Objective.MEMORY and bool(self._lenders)
        if request.split is not Split.ALWAYS and not balances:
            portions = self._on_local(0, self._n_items)
            if portions is not None:
                return self.build(portions)
            if request.split is Split.NEVER or not self._lenders:
                raise self.too_small((self._local,))
        return self.build(self._spread())

    # -- by memory ----------------------------------------------------------------------------

    def _on_local(self, start: int, stop: int) -> list[Portion] | None:
        """Items on the local node: its accelerators, and the CPU for what these cannot take."""
        if self._gpus:
            return self._with_spill(self._gpus, start, stop)
        whole = (start, stop) == (0, self._n_items)
        costs = self._costs_shared if whole else self._costs
        return fill(costs, [self._cpu], start, stop)

    def _with_spill(self, places: Sequence[Place], start: int, stop: int) -> list[Portion] | None:
        """As few items on the local CPU as the other places allow; it takes the first ones only."""
        for first in range(start, stop + 1 if start == 0 else start + 1):
            rest = fill(self._costs, places, first, stop)
            if rest is not None:
                on_cpu = fill(self._costs, [self._cpu], start, first)
                return None if on_cpu is None else on_cpu + rest
        return None

    def _spread(self) -> list[Portion]:
        """Over the local node and the lenders; the smallest of these stay out where there are more
        than the engine takes, or where `always` could not give each a layer."""
        always = self._request.split is Split.ALWAYS
        if always and not self._lenders:
            raise ResourceError(
                "--split always needs a second node: start `mesh worker` on another machine"
            )
        lenders = list(self._lenders)
        while lenders:
            too_many = always and len(lenders) >= self._n_layers
            if not too_many and self._n_devices(lenders) <= MAX_DEVICES:
                # A small orchestrator may hold no layer; a lender that holds none is pointless.
                for owed in ((self._local, *lenders), lenders) if always else ((),):
                    portions = self._over(self._places(lenders, owed))
                    if portions is not None:
                        return portions
                if not always:
                    break
            lenders.remove(min(lenders, key=_usable_bytes))
        raise self.too_small((self._local, *self._lenders))

    def _n_devices(self, lenders: Sequence[PlanNode]) -> int:
        """What `--device` would name: the local CPU needs no name."""
        return sum(map(len, map(_lender_places, lenders))) + len(self._gpus)

    def _over(self, places: Sequence[Place]) -> list[Portion] | None:
        if self._gpus:
            return self._with_spill(places, 0, self._n_items)
        return fill(self._costs, places, 0, self._n_items)

    def _places(
        self, lenders: Sequence[PlanNode], owed: Sequence[PlanNode] = ()
    ) -> tuple[Place, ...]:
        """Places in the order of the layers; the nodes `owed` one get a layer at least."""
        places = [] if self._gpus else [self._cpu]
        for lender in lenders:
            places += _lender_places(lender)
        places += self._gpus
        seen: set[str] = set()
        names = {node.name for node in owed}
        for index, place in enumerate(places):
            if place.node in names - seen:
                places[index] = replace(place, at_least_layers=1)
            seen.add(place.node)
        return tuple(places)

    # -- by hand ------------------------------------------------------------------------------

    def _overridden(self) -> list[Portion]:
        request = self._request
        names = (self._local.name, *(lender.name for lender in self._lenders))
        if request.split is Split.NEVER:
            raise UsageError("--split never and a layout by hand exclude each other: drop one")
        if request.layers is None:
            assert request.tensor_split is not None
            ranges = apportion(request.tensor_split, self._n_layers, names)
        elif request.tensor_split is None:
            ranges = to_items(request.layers, self._n_layers, names)
        else:
            raise UsageError("--layers and --tensor-split exclude each other: drop one")
        portions = [portion for given in ranges for portion in self._by_hand(given)]
        if sum(not self._on_host(portion) for portion in portions) > MAX_DEVICES:
            raise UsageError(f"llama.cpp takes {MAX_DEVICES} devices at most: name fewer nodes")
        return portions

    def _by_hand(self, given: ItemRange) -> list[Portion]:
        request = self._request
        if given.node == self._local.name:
            if given.start > 0 and not self._gpus:
                raise UsageError(
                    f"{given.node} cannot hold the layers from {given.start} on: llama.cpp puts "
                    "those of the local CPU first; give it the first layers or none"
                )
            places: Sequence[Place] = self._gpus or (self._cpu,)
            portions = self._on_local(given.start, given.stop)
        else:
            lender = next(node for node in self._lenders if node.name == given.node)
            places = _lender_places(lender)
            portions = fill(self._costs, places, given.start, given.stop)
        if portions is None:
            missing_bytes = left_over_bytes(self._costs, places, given.start, given.stop)
            line = f" (--layers {as_line(request.layers)})" if request.layers else ""
            raise ResourceError(
                f"{given.node} has no room for the layers given to it{line}: "
                f"{human_bytes(missing_bytes)} are missing; give it fewer"
            )
        return portions

    # -- results ------------------------------------------------------------------------------

    def build(self, portions: Sequence[Portion]) -> Plan:
        if not self._on_host(portions[0]):
            portions = [Portion(self._cpu, 0, 0), *portions]
        remote = {portion.place.node for portion in portions} - {self._local.name}
        rpc_nodes = [lender for lender in self._lenders if lender.name in remote]
        rpc_names: dict[tuple[str, str], str] = {}
        for lender in rpc_nodes:
            for device in lender.devices:
                rpc_names[lender.name, device.name] = f"RPC{len(rpc_names)}"
        shares = tuple(self._share(portion) for portion in portions)
        offloaded = [portion for portion in portions if not self._on_host(portion)]
        return Plan(
            shares=shares,
            alone=not remote,
            gpu_layers=sum(portion.stop - portion.start for portion in offloaded),
            tensor_split=tuple(portion.stop - portion.start for portion in offloaded),
            device_order=tuple(
                rpc_names.get((portion.place.node, portion.place.device), portion.place.device)
                for portion in offloaded
            ),
            rpc_nodes=tuple(lender.name for lender in rpc_nodes),
        )

    def _on_host(self, portion: Portion) -> bool:
        """Whether a portion is the local CPU's; places that owe a layer are copies, so by name."""
        place = portion.place
        return (place.node, place.device) == (self._cpu.node, self._cpu.device)

    def _share(self, portion: Portion) -> Share:
        is_cpu = self._on_host(portion)
        is_shared = is_cpu and portion.stop == self._n_items
        costs = self._costs_shared if is_shared else self._costs
        items = costs.items[portion.start : portion.stop]
        return Share(
            node=portion.place.node,
            device=portion.place.device,
            first_layer=portion.start,
            last_layer=min(portion.stop, self._n_layers),
            has_output=is_cpu if self._output_at_home else portion.stop == self._n_items,
            weight_bytes=sum(item.weight_bytes for item in items)
            + (costs.host_weight_bytes if is_cpu else 0),
            kv_bytes=sum(item.kv_bytes for item in items) + (costs.host_kv_bytes if is_cpu else 0),
            compute_bytes=sum(item.compute_bytes for item in items)
            + (costs.device_compute_bytes if items else 0)
            + (costs.host_compute_bytes if is_cpu else 0),
        )

    def too_small(self, nodes: Sequence[PlanNode]) -> ResourceError:
        """The error for a model that these nodes cannot hold."""
        request = self._request
        places = [self._cpu]
        for node in nodes:
            places += self._gpus if node.is_local else _lender_places(node)
        missing_bytes = left_over_bytes(self._costs, places, 0, self._n_items)
        if not missing_bytes:  # it fits, only not as --split always wants it
            return ResourceError(
                f"no lender has room for a layer of {request.model.name}: lend more with "
                "`mesh worker --memory`, or drop --split always"
            )
        names = ", ".join(node.name for node in nodes)
        return ResourceError(
            f"{request.model.name} with a context of {request.ctx_tokens} tokens does not fit on "
            f"{names}: {human_bytes(missing_bytes)} are missing; add a worker, or use a smaller "
            "--ctx or a smaller model"
        )


def _lender_places(lender: PlanNode) -> list[Place]:
    return [Place(lender.name, device.name, device.usable_bytes) for device in lender.in_use]


def _usable_bytes(node: PlanNode) -> int:
    return sum(place.usable_bytes for place in _lender_places(node))
