"""What a node is said to need is what the engine loads on it: none less, and on a worker none more.

Each worker offers exactly those, so that any other would be sent to it, and counted. The
orchestrator is said to hold exactly its own, so that any other would end the load.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from meshnode.models.facts import ModelFacts, read_facts
from meshnode.models.needs import needed_tensors
from meshnode.models.presence import engine_presence
from meshnode.pipeline.costs import plan_model
from meshnode.pipeline.layers import parse_layers
from meshnode.pipeline.plan import Plan, PlanDevice, PlanNode, PlanRequest
from meshnode.pipeline.planner import make_plan
from tests.engine.architectures import GENERATING, bert
from tests.engine.manifests import write_manifest, write_roots
from tests.engine.processes import llama_server, loads, mesh_env, rpc_server
from tests.engine.random_models import write_model

pytestmark = pytest.mark.engine

GIB = 2**30
LAYOUTS = ("local=0:1,a=2:3,b=4:output", "a=0:3,b=4:5,local=output", "a=0:0,b=1:output")


def planned(facts: ModelFacts, layers: str) -> Plan:
    nodes = [
        PlanNode(name, name == "local", (PlanDevice("CPU", 4 * GIB, False),))
        for name in ("local", "a", "b")
    ]
    return make_plan(
        PlanRequest(
            plan_model(facts),
            tuple(nodes),
            ctx_tokens=512,
            layers=parse_layers(layers),
            output_may_stay=True,
        )
    )


@pytest.mark.parametrize("name", [*GENERATING, "bert"])
def test_nodes_need_what_the_engine_loads_on_them(
    engine_bin: Path, folder: Path, name: str
) -> None:
    path = write_model(folder / "model.gguf", {**GENERATING, "bert": bert}[name]())
    facts = read_facts(path)
    for number, layers in enumerate(LAYOUTS):
        place = folder / str(number)
        place.mkdir()
        check(engine_bin, place, facts, planned(facts, layers))


def check(engine_bin: Path, folder: Path, facts: ModelFacts, plan: Plan) -> None:
    needs = needed_tensors(facts, plan.shares)
    sizes = {tensor.name: tensor.nbytes for tensor in facts.tensors}
    env = mesh_env(folder) | {"GGML_RPC_MESH_ROOTS": str(write_roots(folder / "r", facts.files))}
    presence = folder / "presence"
    presence.write_text(engine_presence({facts.path: needs["local"]}))
    env["GGML_RPC_MESH_PRESENCE"] = str(presence)
    if plan.output.device:
        env["GGML_RPC_MESH_OUTPUT"] = plan.output.device
    with ExitStack() as stack:
        workers = []
        for node in plan.rpc_nodes:
            without = set(sizes) - set(needs[node])
            manifest = write_manifest(folder / f"{node}.manifest", facts.files, without=without)
            server = rpc_server(engine_bin, folder, "--gguf-manifest", manifest, name=node)
            workers.append(stack.enter_context(server))
        split = ",".join(map(str, plan.tensor_split))
        options = ["-c", "512", "-ngl", str(plan.gpu_layers), "--tensor-split", split]
        if "bert" in facts.arch:
            options.append("--embedding")
        stack.enter_context(
            llama_server(engine_bin, folder, facts.path, *options, rpc=workers, env=env)
        )
        reports = {load.server: load for load in loads(folder / "report.jsonl")}
    for node, worker in zip(plan.rpc_nodes, workers, strict=True):
        load = reports[worker.address]
        assert (load.sent_tensors, load.failures) == (0, 0), (node, load)
        assert load.local_bytes == sum(sizes[name] for name in needs[node]), (node, load)
