"""A model of eight layers, and nodes to lay it over."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from meshnode.models.kv import Cells, LayerMemory
from meshnode.pipeline.costs import PlanModel
from meshnode.pipeline.layers import parse_layers
from meshnode.pipeline.plan import Plan, PlanDevice, PlanNode, PlanRequest
from meshnode.pipeline.planner import make_plan

MIB = 2**20
GIB = 2**30

KEPT = LayerMemory((Cells(256, 256),))
"""1024 bytes a token."""

MODEL = PlanModel(
    name="glm",
    layer_bytes=(100 * MIB,) * 8,
    embedding_bytes=20 * MIB,
    output_bytes=20 * MIB,
    other_bytes=0,
    memory=(KEPT,) * 8,
    n_embd=64,
    n_attn=64,
    n_ff=128,
    n_vocab=1000,
)
"""Eight layers of 100 MiB, 20 MiB at both ends."""

TINY = replace(MODEL, layer_bytes=(1000,) * 8, embedding_bytes=1000, output_bytes=1000, n_vocab=300)


def local(cpu_bytes: int = 16 * GIB, *gpus_bytes: int) -> PlanNode:
    gpus = [PlanDevice(f"CUDA{n}", size, True) for n, size in enumerate(gpus_bytes)]
    return PlanNode("local", True, (*gpus, PlanDevice("CPU", cpu_bytes, False)))


def lender(name: str, *sizes_bytes: int, gpu: bool = True) -> PlanNode:
    devices = [PlanDevice(f"D{n}", size, gpu) for n, size in enumerate(sizes_bytes)]
    return PlanNode(name, False, tuple(devices))


def plan(*nodes: PlanNode, model: PlanModel = MODEL, ctx: int = 1024, **changes: Any) -> Plan:
    fields: dict[str, Any] = {"model": model, "nodes": nodes, "ctx_tokens": ctx}
    return make_plan(PlanRequest(**(fields | changes)))


def by_hand(text: str, *nodes: PlanNode) -> Plan:
    return plan(*nodes, layers=parse_layers(text))


def ranges(plan: Plan) -> list[tuple[str, int, int, bool]]:
    return [(s.node, s.first_layer, s.last_layer, s.has_output) for s in plan.shares]
