"""Why a plan is as it is, in sentences: what it was compared with, who was left out. Sans-IO."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from meshnode.config import human_bytes
from meshnode.pipeline.costs import PlanModel
from meshnode.pipeline.fastest import Fastest
from meshnode.pipeline.plan import Plan, PlanNode, PlanRequest
from meshnode.pipeline.predict import plan_s
from meshnode.pipeline.work import FLOAT_BYTES, Load

MAX_NAMED = 4
AGED_S = 600.0
NOTHING_FASTER = "by these figures nothing is faster"
FASTEST_TRIED = "the fastest of those that were tried; there are too many to try all"


def explain(
    request: PlanRequest,
    load: Load,
    plan: Plan,
    others: Sequence[Plan],
    *,
    is_exact: bool,
    fastest: Plan | None = None,
) -> Plan:
    """The plan with its reasons. `others`: what it was compared with; `fastest`: where that is
    another one, which has more to pull."""
    best = NOTHING_FASTER if is_exact else FASTEST_TRIED
    if fastest:
        best = _instead(request, load, plan, fastest)
    why = [*_compared(request, load, plan, others), _certainty(request, best)]
    computing = set(computing_nodes(plan))
    slowest = _slowest_used(request, plan)
    left_out = tuple(
        (node.name, _left_out(request, plan, node, slowest, is_fastest=fastest is None))
        for node in request.nodes
        if not node.is_local and node.name not in computing
    )
    return replace(plan, why=tuple(why), left_out=left_out)


def computing_nodes(plan: Plan) -> list[str]:
    """Those with a layer, in the order of the layers."""
    return list(dict.fromkeys(share.node for share in plan.shares if share.n_layers))


def explain_output(model: PlanModel, load: Load, home: Fastest, away: Fastest | None) -> str:
    sizes = (
        f"a token is {human_bytes(model.n_embd * FLOAT_BYTES)} on the wire instead of "
        f"{human_bytes(model.n_vocab * FLOAT_BYTES)} of logits"
    )
    if away is None:
        return "the output stays here: elsewhere there is no room for it"
    speeds = f"{_rate(load, home.cost_s)} against {_rate(load, away.cost_s)} tok/s"
    return f"the output stays here: {sizes} ({speeds})"


def explain_pulls(request: PlanRequest, plan: Plan) -> list[str]:
    """What the plan's nodes hold of their shares already, and what is to come."""
    stock = request.stock
    if stock is None:
        return []
    missing = stock.missing_bytes(plan.shares)
    kept = [
        (node, "all of its layers" if held == count else f"{held} of its {count} layers")
        for node, (held, count) in stock.layers_held(plan.shares).items()
        if held
    ]
    if len(kept) > MAX_NAMED:
        told = [f"{len(kept)} machines hold layers of theirs already"]
    else:
        told = [f"{node} holds {what} already" for node, what in kept]
    total_bytes = sum(missing.values())
    if not total_bytes:
        return [*told, "nothing is to be pulled"]
    most = max(missing, key=lambda node: missing[node])
    by_most = f", {human_bytes(missing[most])} of it by {most}" if len(missing) > 1 else ""
    return [*told, f"{human_bytes(total_bytes)} are to be pulled{by_most}"]


def _compared(request: PlanRequest, load: Load, plan: Plan, others: Sequence[Plan]) -> list[str]:
    """Against every other way that puts the layers on other nodes."""
    mine, told = _place(plan), []
    seconds = plan_s(request, plan, load)
    for other in others:
        other_s = plan_s(request, other, load)
        if _place(other) == mine or other_s < seconds:
            continue
        how = "" if len(computing_nodes(other)) == 1 else ", in proportion to memory"
        told.append(
            f"{mine} is faster: {_rate(load, seconds)} against {_rate(load, other_s)} tok/s "
            f"{_place(other)}{how}"
        )
    if len(computing_nodes(plan)) > 1 and all(len(computing_nodes(one)) > 1 for one in others):
        told.append(_too_large(request, plan))
    return told or [f"{mine}: {_rate(load, seconds)} tok/s"]


def _too_large(request: PlanRequest, plan: Plan) -> str:
    needed_bytes = sum(share.total_bytes for share in plan.shares)
    largest = max(request.nodes, key=_usable_bytes)
    return (
        f"no machine has room for all of it: {human_bytes(needed_bytes)} are needed, "
        f"{largest.name} has the most, {human_bytes(_usable_bytes(largest))}"
    )


def _instead(request: PlanRequest, load: Load, plan: Plan, fastest: Plan) -> str:
    """What the fastest has on the one that was chosen, and what it would cost."""
    assert request.stock is not None
    mine, most = (sum(request.stock.missing_bytes(one.shares).values()) for one in (plan, fastest))
    faster = plan_s(request, plan, load) / plan_s(request, fastest, load) - 1
    more = f"{human_bytes(most - mine)} more would be pulled"
    if faster < 0.005:
        return f"as fast as the fastest, for which {more}"
    return f"another plan is {faster:.0%} faster, but {more} for it"


def _certainty(request: PlanRequest, best: str) -> str:
    if request.is_measured:
        return best + _aged(request)
    speeds = [node.name for node in request.nodes if not node.is_measured]
    unknown, half_known = list[str](), list[str]()
    local, links = request.local.name, request.links
    for node in request.nodes:
        if not node.is_local and not links.is_measured(local, node.name):
            has_delay = (local, node.name) in links.pairs
            (half_known if has_delay else unknown).append(node.name)
    assumed = [
        f"{what} {_names(those)}"
        for what, those in (
            ("the speed of", speeds),
            ("the link to", unknown),
            ("the rate of the link to", half_known),
        )
        if those
    ]
    return f"{best}; assumed, not measured: {' and '.join(assumed)}{_aged(request)}"


def _aged(request: PlanRequest) -> str:
    """Which links were measured so long ago that they may be others by now."""
    old = {
        other: link.age_s
        for pair, link in request.links.pairs.items()
        for other in pair
        if link.age_s >= AGED_S and request.local.name in pair and other != request.local.name
    }
    if not old:
        return ""
    minutes = f"{max(old.values()) / 60:.0f} min"
    return f"; measured {minutes} ago: the link to {_names(sorted(old))}"


def _slowest_used(request: PlanRequest, plan: Plan) -> float:
    used = {(share.node, share.device) for share in plan.shares if share.n_layers}
    return min(
        device.speed.decode_bytes_per_s
        for node in request.nodes
        for device in node.devices
        if (node.name, device.name) in used
    )


def _left_out(
    request: PlanRequest, plan: Plan, node: PlanNode, slowest: float, *, is_fastest: bool
) -> str:
    """The first reason that holds. `slowest`: of the devices used, bytes a second."""
    least_bytes = min(request.model.layer_bytes)
    if max((device.usable_bytes for device in node.in_use), default=0) < least_bytes:
        return f"no room for a layer ({human_bytes(least_bytes)})"
    mine = max(device.speed.decode_bytes_per_s for device in node.in_use)
    if mine <= slowest:
        return "no faster than what is used, which has room for everything"
    if not is_fastest:
        return "what is used holds more of the model, and is as fast"
    hop_s = _extra_hop_s(request, plan, node.name)
    return f"its hops would cost more than it saves: {hop_s * 1000:.1f} ms a token"


def _extra_hop_s(request: PlanRequest, plan: Plan, name: str) -> float:
    """The least that one machine more adds to a token's way."""
    home = request.local.name
    stops = [home, *(one for one in computing_nodes(plan) if one != home), home]

    def hop_s(start: str, end: str) -> float:
        return 0.0 if start == end else request.links.between(start, end, home).rtt_s / 2

    if not request.links.ring:
        return hop_s(home, name) + hop_s(name, home)
    return min(
        hop_s(before, name) + hop_s(name, after) - hop_s(before, after)
        for before, after in itertools.pairwise(stops)
    )


def _place(plan: Plan) -> str:
    names = computing_nodes(plan)
    return f"alone on {names[0]}" if len(names) == 1 else f"over {_names(names)}"


def _names(names: Sequence[str]) -> str:
    if len(names) > MAX_NAMED:
        return f"{len(names)} machines"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _usable_bytes(node: PlanNode) -> int:
    return sum(device.usable_bytes for device in node.in_use)


def _rate(load: Load, seconds: float) -> str:
    rate = load.tokens / seconds
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}"
