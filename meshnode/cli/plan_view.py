"""A plan as text and for programs: a table, a picture of layers over nodes, what it comes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from meshnode.cli.members import table
from meshnode.config import human_bytes
from meshnode.pipeline.plan import Plan, PlanRequest, Share
from meshnode.pipeline.predict import Prediction
from meshnode.pipeline.reasons import computing_nodes

PICTURE_COLUMNS = 64
MAX_NAMED = 4
FULL, EMPTY = "█", "·"
TITLES = ("node", "device", "layers", "", "weights", "cache", "buffers", "of memory")


def plan_json(request: PlanRequest, plan: Plan, found: Prediction) -> dict[str, Any]:
    """For programs; bytes, seconds and tokens a second."""
    usable = _usable(request)
    return {
        "model": request.model.name,
        "n_layers": request.model.n_layers,
        "alone": plan.alone,
        "nodes": computing_nodes(plan),
        "shares": [
            {
                "node": share.node,
                "device": share.device,
                "first_layer": share.first_layer if share.n_layers else None,
                "last_layer": share.last_layer - 1 if share.n_layers else None,
                "output": share.has_output,
                "weight_bytes": share.weight_bytes,
                "kv_bytes": share.kv_bytes,
                "compute_bytes": share.compute_bytes,
                "usable_bytes": usable[share.node, share.device],
            }
            for share in plan.shares
        ],
        "predicted": {
            "ready_s": round(found.ready_s, 3),
            "decode_tok_s": round(found.decode_tok_s, 3),
            "prefill_tok_s": round(found.prefill_tok_s, 3),
            "throughput_tok_s": round(found.crowd_tok_s, 3),
            "memory_bytes": dict(found.memory_bytes),
            "measured": found.is_measured,
        },
        "why": [*plan.why, *([plan.output.why] if plan.output.why else [])],
        "left_out": [{"node": node, "why": why} for node, why in plan.left_out],
    }


def plan_lines(request: PlanRequest, plan: Plan, found: Prediction) -> list[str]:
    """As people read it."""
    lines = [f"{request.model.name}: {request.model.n_layers} layers", ""]
    usable = _usable(request)
    lines += table(TITLES, [_cells(share, usable) for share in plan.shares]).splitlines()
    lines += ["", *_picture(plan), "", *_predicted(found), ""]
    lines += [*plan.why, *([plan.output.why] if plan.output.why else [])]
    by_reason: dict[str, list[str]] = {}
    for node, why in plan.left_out:
        by_reason.setdefault(why, []).append(node)
    lines += [f"left out: {_names(nodes)}: {why}" for why, nodes in by_reason.items()]
    return lines


def _names(nodes: Sequence[str]) -> str:
    rest = len(nodes) - MAX_NAMED
    return ", ".join(nodes) if rest <= 1 else f"{', '.join(nodes[:MAX_NAMED])} and {rest} more"


def _usable(request: PlanRequest) -> Mapping[tuple[str, str], int]:
    return {
        (node.name, device.name): device.usable_bytes
        for node in request.nodes
        for device in node.devices
    }


def _cells(share: Share, usable: Mapping[tuple[str, str], int]) -> tuple[str, ...]:
    layers = f"{share.first_layer} to {share.last_layer - 1}" if share.n_layers else "none"
    usable_bytes = usable[share.node, share.device]
    part = share.total_bytes / usable_bytes if usable_bytes else 0.0
    return (
        share.node,
        share.device,
        layers,
        "and output" if share.has_output else "",
        human_bytes(share.weight_bytes),
        human_bytes(share.kv_bytes),
        human_bytes(share.compute_bytes),
        f"{part:.0%} of {human_bytes(usable_bytes)}",
    )


def _picture(plan: Plan) -> list[str]:
    """A row for each share, a column for each layer, or for several."""
    n_layers = plan.shares[-1].last_layer
    columns = min(n_layers, PICTURE_COLUMNS)
    width = max(len(share.node) for share in plan.shares)
    rows = []
    for share in plan.shares:
        if share.n_layers or share.has_output:
            start, stop = (
                round(layer * columns / n_layers) for layer in (share.first_layer, share.last_layer)
            )
            stop = max(stop, start + 1) if share.n_layers else stop
            bar = EMPTY * start + FULL * (stop - start) + EMPTY * (columns - stop)
            output = " " + (FULL if share.has_output else EMPTY)
            rows.append(f"{share.node:<{width}}  {bar}{output}")
    scale = f"0{n_layers - 1:>{max(1, columns - 1)}}" if n_layers > 1 else "0"
    return [*rows, f"{'':<{width}}  {scale} output"]


def _predicted(found: Prediction) -> list[str]:
    """What it comes to; figures that rest on assumptions say so."""
    about = "predicted" if found.is_measured else "predicted, with speeds that nobody measured"
    return [
        f"{about}: ready in {found.ready_s:.1f} s, {_rate(found.decode_tok_s)} tok/s of an answer, "
        f"{_rate(found.prefill_tok_s)} tok/s of a prompt, {_rate(found.crowd_tok_s)} tok/s of "
        "eight requests at once"
    ]


def _rate(tok_s: float) -> str:
    return f"{tok_s:.0f}" if tok_s >= 10 else f"{tok_s:.1f}"
