"""The engine puts layers where the plan says, and takes the memory the plan counts.

llama-server logs, with -v, the device of each layer and the size of each buffer; these runs read
them. RPC servers listen on loopback ports here, which stock builds take as well as patched ones.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from meshnode.config import Split
from meshnode.models.facts import read_facts
from meshnode.pipeline.costs import plan_model
from meshnode.pipeline.layers import parse_layers
from meshnode.pipeline.plan import Plan, PlanDevice, PlanNode, PlanRequest
from meshnode.pipeline.planner import make_plan
from tests.engine.processes import free_port, rpc_server
from tests.engine.synthetic import make_model

pytestmark = pytest.mark.engine

GIB = 2**30
LAYERS = 6

_ASSIGNED = re.compile(r"layer +(\d+) assigned to device (\S+),")
_BUFFER = re.compile(r"(\S+) +(model|KV|compute) buffer size = +([\d.]+) MiB")
_PORT = re.compile(r"\[127\.0\.0\.1:(\d+)\]")


@dataclass(frozen=True)
class Placed:
    """What one run logged: the device of each item; MiB by (endpoint's port or "CPU", kind)."""

    devices: list[str]
    buffers_mib: dict[tuple[str, str], float]


Run = Callable[[Path, PlanRequest], tuple[Plan, Placed]]


@pytest.fixture(scope="module")
def ports(engine_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, int]]:
    """Three lenders: the port of each one's rpc-server."""
    folder = tmp_path_factory.mktemp("lenders")
    with ExitStack() as stack:
        addresses = {
            name: stack.enter_context(rpc_server(engine_bin, folder, name=name, tcp=True)).address
            for name in ("a", "b", "c")
        }
        yield {name: int(address.rpartition(":")[2]) for name, address in addresses.items()}


@pytest.fixture
def run(engine_bin: Path, ports: dict[str, int], tmp_path: Path) -> Run:
    def run(path: Path, request: PlanRequest) -> tuple[Plan, Placed]:
        plan = make_plan(request)
        argv = [str(engine_bin / "llama-server"), "-m", str(path), "-v", "--no-warmup"]
        argv += ["--host", "127.0.0.1", "--port", str(free_port()), "--offline", "-fit", "off"]
        argv += ["-c", str(request.ctx_tokens), "-np", str(request.slots), "-t", "2"]
        if plan.rpc_nodes:
            argv += ["--rpc", ",".join(f"127.0.0.1:{ports[name]}" for name in plan.rpc_nodes)]
            argv += ["--tensor-split", ",".join(map(str, plan.tensor_split))]
        # After --rpc: llama.cpp looks the names up as it reads them.
        argv += ["-ngl", str(plan.gpu_layers), "--device", ",".join(plan.device_order) or "none"]
        return plan, placed(argv)

    return run


def placed(argv: list[str]) -> Placed:
    """Runs llama-server until it has reserved its buffers. It exits at once where it cannot."""
    log = []
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as it:
        assert it.stdout is not None
        for line in it.stdout:
            log.append(line)
            if "all slots are idle" in line or "server is listening" in line:
                break
        it.kill()
    text = "".join(log)
    devices = dict(_ASSIGNED.findall(text))
    buffers: dict[tuple[str, str], float] = {}
    for device, kind, mib in _BUFFER.findall(text):
        port = _PORT.search(device)
        place = (port[1] if port else "CPU", kind)
        buffers[place] = buffers.get(place, 0.0) + float(mib)
    assert buffers, text[-3000:]
    return Placed([devices[str(item)] for item in range(len(devices))], buffers)


def node(name: str, usable_bytes: int) -> PlanNode:
    return PlanNode(name, False, (PlanDevice("CPU", usable_bytes, False),))


def request(path: Path, *lenders: PlanNode, **changes: Any) -> PlanRequest:
    here = PlanNode("local", True, (PlanDevice("CPU", 8 * GIB, False),))
    base = PlanRequest(plan_model(read_facts(path)), (here, *lenders), ctx_tokens=512)
    return replace(base, **changes)


def expected(plan: Plan) -> list[str]:
    """The device of each item, as the plan has it."""
    devices = ("CPU", *plan.device_order)
    on_cpu = plan.shares[0].n_layers + plan.shares[0].has_output
    counts = (on_cpu, *plan.tensor_split)
    return [device for device, count in zip(devices, counts, strict=True) for _ in range(count)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "m.gguf", layers=LAYERS)


def everyone(scale: int = 1) -> tuple[PlanNode, ...]:
    return node("a", GIB * scale), node("b", 3 * GIB), node("c", 2 * GIB)


@pytest.mark.parametrize(
    "layers",
    [
        "local=0:output",
        "local=0:2,a=3:output",
        "local=0:0,a=1:1,b=2:4,c=5:output",
        "a=0:2,b=3:output",
        "a=0:5,b=output",
        "c=0:0,a=1:4,b=5:output",
        "local=0:4,c=5:5,b=output",
    ],
)
def test_layers_by_hand_lie_where_they_were_put(
    model: Path, run: Run, ports: dict[str, int], layers: str
) -> None:
    plan, found = run(model, request(model, *everyone(), layers=parse_layers(layers)))
    assert found.devices == expected(plan)
    for share in plan.shares:  # RPC0 and so on are the nodes the plan says they are
        place = "CPU" if share.node == "local" else str(ports[share.node])
        kv_mib = found.buffers_mib.get((place, "KV"), 0.0)
        assert kv_mib == pytest.approx(share.kv_bytes / 2**20, abs=0.01)


@pytest.mark.parametrize("split", ["1,1,1,1", "0,5,1,3", "3,0,0,1", "2,7,7,7"])
def test_a_tensor_split_is_exact(model: Path, run: Run, split: str) -> None:
    proportions = tuple(float(part) for part in split.split(","))
    plan, found = run(model, request(model, *everyone(), tensor_split=proportions))
    assert found.devices == expected(plan)


def test_a_plan_by_memory_is_what_the_engine_does(model: Path, run: Run) -> None:
    plan, found = run(model, request(model, *everyone(), split=Split.ALWAYS))
    assert plan.rpc_nodes == ("a", "b", "c")
    assert found.devices == expected(plan)


SHAPES: dict[str, dict[str, Any]] = {
    "narrow": {"width": 256, "ffn": 512},
    "wide-feed-forward": {"width": 512, "ffn": 4096, "vocab": 8192},
    "attention-bound": {"width": 1024, "ffn": 512, "heads": 16},
    "tied": {"tied": True, "vocab": 4096},
    "mixture": {"experts": 4, "ffn": 1024},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("ctx", "slots"), [(512, 1), (8192, 1), (4096, 4)])
@pytest.mark.parametrize("layers", ["local=0:output", "local=0:0,a=1:1,b=2:output"])
def test_the_engine_takes_the_memory_that_was_planned(
    tmp_path: Path, run: Run, ports: dict[str, int], shape: str, ctx: int, slots: int, layers: str
) -> None:
    path = make_model(tmp_path / "m.gguf", layers=3, **SHAPES[shape])
    what = request(path, *everyone(), ctx_tokens=ctx, slots=slots, layers=parse_layers(layers))
    plan, found = run(path, what)
    for share in plan.shares:
        place = "CPU" if share.node == "local" else str(ports[share.node])
        mib = {
            kind: found.buffers_mib.get((place, kind), 0.0) for kind in ("model", "KV", "compute")
        }
        assert mib["model"] == pytest.approx(share.weight_bytes / 2**20, abs=0.1)
        assert mib["KV"] == pytest.approx(share.kv_bytes / 2**20, abs=0.1)
        assert mib["compute"] <= share.compute_bytes / 2**20
