"""Makes a plan: numbers in, a `Plan` out. Sans-IO."""

from __future__ import annotations

from dataclasses import replace

from meshnode.config import Objective, Split, human_bytes
from meshnode.errors import ResourceError, UsageError
from meshnode.pipeline.fastest import load_for
from meshnode.pipeline.layers import OutputWish, take_output_wish
from meshnode.pipeline.output import LastWorker, OutputChoice, choose_output
from meshnode.pipeline.placing import Placing
from meshnode.pipeline.plan import Plan, PlanRequest
from meshnode.pipeline.predict import NOTHING_MOVES, Moving, plan_s, pricing_of
from meshnode.pipeline.reasons import explain, explain_output, explain_pulls
from meshnode.pipeline.work import Load

MUCH_FASTER = 0.85
"""Of the time that the running plan takes."""
NEARLY_AS_FAST = 1.05
"""Of the time that the fastest plan takes: what may be given for having less to pull."""
MOVING_PARTS = (1.0, 0.2, NEARLY_AS_FAST - 1)
"""Of that time, what having all of the model to pull counts for, one after another."""
MANY_NODES = 16
"""Of more, the last of these alone is tried: a search among fifty takes a twentieth of a second."""
OUTPUT_LESS_MOVED = "the output stays here: so there is less to pull"


def make_plan(request: PlanRequest) -> Plan:
    """Raises `UsageError` for an override llama.cpp cannot place, `ResourceError` for a model that
    does not fit. `ValueError` for nodes that are none: two of a name, not one local with a CPU."""
    objective = _objective(request)
    if objective in (None, Objective.MEMORY):
        plan = _plan_by_memory(request)
    else:
        plan = _fastest_plan(request, load_for(objective))
    return replace(plan, why=(*plan.why, *explain_pulls(request, plan)))


def is_worth_a_restart(request: PlanRequest, running: Plan, found: Plan) -> bool:
    """Whether what was found is so much faster than what runs that a restart pays: measurements
    differ from one to the next. Where nothing is searched for, any other plan is a better one."""
    objective = _objective(request)
    names = {node.name for node in request.nodes}
    known = all(share.node in names for share in running.shares)
    if objective in (None, Objective.MEMORY) or not known:
        return True
    load = load_for(objective)
    return plan_s(request, found, load) < MUCH_FASTER * plan_s(request, running, load)


def _objective(request: PlanRequest) -> Objective | None:
    """What is to be searched for; None where a layout was ordered, or speeds are not known."""
    by_hand = request.layers is not None or request.tensor_split is not None
    if request.objective is not None and (by_hand or request.split is Split.ALWAYS):
        name = "--split always" if not by_hand else "a layout by hand"
        raise UsageError(f"--for {request.objective.value} and {name} exclude each other: drop one")
    if by_hand or request.split is not Split.AUTO:
        return None
    if request.objective is None and request.is_measured:
        return Objective.LATENCY
    return request.objective


def _fastest_plan(request: PlanRequest, load: Load) -> Plan:
    """The plan that does the load soonest, wherever the output computes then; or one that is nearly
    as good, and moves less."""
    away = Placing(request)
    away.check_host()
    home = Placing(request, output_at_home=True) if request.output_may_stay else None
    best = _search(request, load, away, home)
    if best is None:
        return _plan_by_memory(replace(request, objective=None))
    plan, is_exact = best
    others = [plan for plan in (_spread_plan(request), _alone_plan(request)) if plan]
    frugal = _moving_less(request, load, away, home, plan)
    if frugal is None:
        return explain(request, load, plan, others, is_exact=is_exact)
    return explain(request, load, frugal, others, is_exact=is_exact, fastest=plan)


def _search(
    request: PlanRequest,
    load: Load,
    away_planner: Placing,
    home_planner: Placing | None,
    moving: Moving = NOTHING_MOVES,
) -> tuple[Plan, bool] | None:
    """The fastest, and whether nothing is faster; None where there is no room."""
    pricing = pricing_of(request, load, moving)
    away = away_planner.fastest(pricing)
    home = home_planner.fastest(pricing) if home_planner else None
    if home and home_planner and (away is None or home.cost_s < away.cost_s):
        plan = home_planner.build(home.portions)
        why = OUTPUT_LESS_MOVED if moving else explain_output(request.model, load, home, away)
        return replace(plan, output=OutputChoice(plan.shares[0].device, why)), home.is_exact
    return (away_planner.build(away.portions), away.is_exact) if away else None


def _moving_less(
    request: PlanRequest, load: Load, away: Placing, home: Placing | None, fastest: Plan
) -> Plan | None:
    """One that is as fast but for a few per cent, with less to pull; None where there is none.

    What a node lacks of an item is counted as if it took time to compute, less and less, until what
    is found then is fast enough: the last is, whatever it moves.
    """
    stock = request.stock
    if stock is None or not (most_bytes := sum(stock.missing_bytes(fastest.shares).values())):
        return None
    missing = {node.name: stock.missing_sums(node.name) for node in request.nodes}
    if len(set(missing.values())) == 1:
        return None  # wherever an item lies it is to be pulled
    fastest_s = plan_s(request, fastest, load)
    for part in MOVING_PARTS if len(request.nodes) <= MANY_NODES else MOVING_PARTS[-1:]:
        byte_s = part * fastest_s / max(1.0, *(row[-1] for row in missing.values()))
        moving = {node: tuple(byte_s * size for size in row) for node, row in missing.items()}
        found = _search(request, load, away, home, moving)
        if found is None or plan_s(request, found[0], load) > NEARLY_AS_FAST * fastest_s:
            continue
        if sum(stock.missing_bytes(found[0].shares).values()) < most_bytes:
            return found[0]
    return None


def _spread_plan(request: PlanRequest) -> Plan | None:
    """Over all machines in proportion to their memory: what the fastest is compared with."""
    try:
        return _plan_by_memory(replace(request, objective=Objective.MEMORY))
    except ResourceError:
        return None


def _alone_plan(request: PlanRequest) -> Plan | None:
    try:
        return _plan_by_memory(replace(request, objective=None, split=Split.NEVER))
    except ResourceError:
        return None


def _plan_by_memory(request: PlanRequest) -> Plan:
    wish, request = _output_wish(request)
    try:
        away = Placing(request).plan()
    except ResourceError:
        if wish is OutputWish.THERE:
            raise
        return _with_output_at_home(request) or Placing(request).plan()
    if wish is OutputWish.THERE or _last_worker(request, away) is None:
        return away
    home = _with_output_at_home(request)
    if home is None and wish is OutputWish.HERE:
        raise ResourceError(
            f"this machine has no room for the output of {request.model.name}, "
            f"{human_bytes(request.model.output_bytes)}: leave it to the last worker"
        )
    if home is None:
        return away
    if wish is OutputWish.HERE:
        return replace(home, output=replace(home.output, why="the output stays here, as told"))
    last = _last_worker(request, home)
    assert last is not None
    cpu = next(device for device in request.local.devices if not device.is_gpu).measured
    reads = cpu.decode_bytes_per_s if cpu else None
    choice = choose_output(request.model, last, home.output.device, reads)
    return replace(home if choice.device else away, output=choice)


def _output_wish(request: PlanRequest) -> tuple[OutputWish, PlanRequest]:
    """What the operator says of the output, and the request without it where it is to stay."""
    if not request.output_may_stay:
        return OutputWish.THERE, request
    local = next((node for node in request.nodes if node.is_local), None)
    has_gpu = local is not None and any(device.is_gpu for device in local.devices)
    if request.layers is None or local is None:
        return OutputWish.EITHER, request
    wish, layers = take_output_wish(request.layers, local.name, has_gpu=has_gpu)
    return wish, replace(request, layers=layers)


def _with_output_at_home(request: PlanRequest) -> Plan | None:
    """A plan whose last layers are a lender's and whose output is the local CPU's, if there is."""
    try:
        plan = Placing(request, output_at_home=True).plan()
    except ResourceError:
        return None
    last = _last_worker(request, plan)
    if last is None:
        return None
    device = plan.shares[0].device
    why = f"the output stays here: there is no room for it on {last.name}"
    return replace(plan, output=OutputChoice(device, why))


def _last_worker(request: PlanRequest, plan: Plan) -> LastWorker | None:
    """The lender that holds the last layers, if it is one."""
    share = plan.shares[-1]
    node = next(node for node in request.nodes if node.name == share.node)
    if node.is_local:
        return None
    device = next(device for device in node.devices if device.name == share.device)
    way = request.links.pairs.get((node.name, request.local.name))
    bytes_per_s = way.bytes_per_s if way and way.is_measured else node.bytes_per_s
    reads = device.measured.decode_bytes_per_s if device.measured else None
    return LastWorker(node.name, device.is_gpu, bytes_per_s, reads)
