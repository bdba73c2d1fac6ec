"""What the engine needs and the plan did not know of is fetched, and the load goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import trio

from meshnode.config import Address, Split
from meshnode.engine.cache import load_engine
from meshnode.engine.errors import WeightsAbsent
from meshnode.errors import NetworkError
from meshnode.events import Event, Kind
from meshnode.models import needs
from meshnode.models.fetching import Fetcher
from meshnode.models.manifest import Manifest
from meshnode.models.needs import needed_tensors
from meshnode.models.store.slice import open_slice
from meshnode.models.store.store import Store
from meshnode.pipeline.costs import plan_model
from meshnode.pipeline.deployment import Deployed, Deployment, Placement
from meshnode.pipeline.part import Part
from meshnode.pipeline.plan import PlanDevice, PlanNode, PlanRequest
from meshnode.pipeline.planner import make_plan
from meshnode.pipeline.survey import Lender
from tests.engine.processes import N_TOKENS, PROMPT, START_LIMIT_S, Running, alone, rpc_server
from tests.lab.sources import FileSource

pytestmark = pytest.mark.engine

GIB = 2**30
HERE = PlanNode("local", True, (PlanDevice("CPU", GIB, False),))
CTX = 256


@dataclass
class Start:
    """A deployment of a model that lies elsewhere, from its header on, and what came of it."""

    engine_bin: Path
    folder: Path
    source: FileSource
    events: list[Event] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    async def placement(self, workers: Sequence[Running] = ()) -> Placement:
        fetcher = Fetcher(Store(self.folder / "models"), self.source.open)
        part = await fetcher.obtain("https://example.org/one.gguf")
        lenders = tuple(_bare(worker) for worker in workers)
        there = PlanDevice("CPU", GIB, False)
        nodes = (HERE, *(PlanNode(lender.name, False, (there,)) for lender in lenders))
        split = Split.ALWAYS if workers else Split.AUTO
        plan = make_plan(PlanRequest(plan_model(part.facts), nodes, CTX, 1, split=split))
        needed = needed_tensors(part.facts, plan.shares)
        own = tuple(dict.fromkeys(name for names in needed.values() for name in names))
        return Placement(
            *(HERE, part.facts.path, "one", plan, lenders, None, CTX, 1, 1),
            engine_options=("--no-repack",),
            part=Part(part, {**needed, "local": own}, "local", fetcher),
        )

    async def run(self, placement: Placement) -> None:
        """To the first answer; raises what the deployment does."""
        deployment = Deployment(
            placement,
            engine=load_engine(self.engine_bin),
            runtime_folder=self.folder,
            log_folder=self.folder,
            emit=self.events.append,
            on_step=lambda *_: None,
        )
        ready = trio.Event()
        found: list[Deployed] = []

        def on_ready(deployed: Deployed) -> None:
            found.append(deployed)
            ready.set()

        with trio.fail_after(START_LIMIT_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(deployment.run, on_ready)
                await ready.wait()
                self.tokens = await _greedy_tokens(found[0])
                nursery.cancel_scope.cancel()

    @property
    def warnings(self) -> list[str]:
        return [event.text for event in self.events if event.kind is Kind.WARNING]


def _bare(worker: Running) -> Lender:
    host, _, port = worker.address.rpartition(":")
    return Lender(worker.address, None, None, Address(host, int(port)))


async def _greedy_tokens(deployed: Deployed) -> list[int]:
    body = {"prompt": PROMPT, "n_predict": N_TOKENS, "temperature": 0}
    async with deployed.server.client() as client:
        reply = await client.post(
            "/completion", json={**body, "return_tokens": True, "ignore_eos": True}
        )
    tokens: list[int] = reply.raise_for_status().json()["tokens"]
    return tokens


@pytest.fixture
def start(engine_bin: Path, folder: Path, model: Path) -> Start:
    return Start(engine_bin, folder, FileSource(model))


@contextmanager
def forgetting(monkeypatch: pytest.MonkeyPatch, *parts: str) -> Iterator[None]:
    """While plans are made: nobody needs tensors with these in their names, says `needs`."""
    is_needed, is_local = needs._is_needed, needs._is_local

    def known(name: str) -> bool:
        return not any(part in name for part in parts)

    with monkeypatch.context() as patch:
        patch.setattr(needs, "_is_needed", lambda name, *x: known(name) and is_needed(name, *x))
        patch.setattr(needs, "_is_local", lambda name, *x: known(name) and is_local(name, *x))
        yield


@pytest.mark.parametrize("spread", [False, True], ids=["alone", "over a worker"])
async def test_what_the_plan_forgot_is_fetched_and_the_answer_is_right(
    start: Start, monkeypatch: pytest.MonkeyPatch, spread: bool
) -> None:
    expected = alone(start.engine_bin, start.folder, start.source.path)
    with rpc_server(start.engine_bin, start.folder, tcp=True) as worker:
        with forgetting(monkeypatch, "ffn_up", "ffn_down"):
            placement = await start.placement([worker] if spread else [])
        await start.run(placement)
    assert start.tokens == expected
    assert len(start.warnings) == 2, "all layers' at once, then the other"
    assert all(text.startswith("the plan did not count on it") for text in start.warnings)
    assert any("ffn_up" in text for text in start.warnings)
    assert open_slice(start.folder / "models" / "one").complete


async def test_what_cannot_be_fetched_ends_the_load_in_a_sentence(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    with forgetting(monkeypatch, "ffn_up"):
        placement = await start.placement()
    assert placement.part is not None
    names = placement.part.needed["local"]
    await placement.part.fetcher.fetch(placement.part.slice, names, {}, lambda *_: None)
    start.source.is_there = False
    with pytest.raises(ExceptionGroup) as ended:
        await start.run(placement)
    assert ended.group_contains(NetworkError, match="nobody answers")
    start.source.is_there = True
    await start.run(placement)
    assert start.tokens


async def test_what_is_absent_again_after_it_was_fetched_ends_the_load(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    placement = await start.placement()
    assert placement.part is not None
    held = await placement.part.fetch(lambda *_: None)
    assert placement.part.lacking("blk.0.ffn_up.weight", held) == (), "it is here"
    assert placement.part.lacking("blk.0.surprise.weight", held) == ()
    less = replace(held, tensors=tuple(t for t in held.tensors if "ffn_up" not in t.name))

    async def give(*_: object, **__: object) -> Manifest:
        return less

    monkeypatch.setattr(Fetcher, "fetch", give)
    with pytest.raises(ExceptionGroup) as ended:
        await start.run(placement)
    assert ended.group_contains(WeightsAbsent, match="ffn_up.* does not hold it: fetch it, or plan")
    assert len(start.warnings) == 1
