"""`./just bench plan`: what plans predict beside what their deployments do.

Layouts of one model, by hand, under several delays: llama-server, bare rpc-servers in a ring or a
star and delay lines between, as the engine's benchmark has them. This machine's speed is measured
before each of them as `mesh plan` measures it, but with one thread. How fast the model is read is
measured too: it is in memory, and the rate that plans assume is a disk's.

Each process stands for a machine, so each that computes needs a core of its own. Tokens take turns.
Of a prompt, a ring computes as many pieces at once as it has stages: in the rows with more than two
of those the prompt is one piece, or the workers form a star, and two cores are enough.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import click

from meshnode.cli.engine import build_showing_progress
from meshnode.engine.build import BuildOptions
from meshnode.engine.devices import cpu_device
from meshnode.engine.speed import measure
from meshnode.models.facts import ModelFacts, read_facts
from meshnode.pipeline.costs import plan_model
from meshnode.pipeline.layers import parse_layers
from meshnode.pipeline.plan import Plan, PlanDevice, PlanNode, PlanRequest
from meshnode.pipeline.planner import make_plan
from meshnode.pipeline.predict import PIECE_TOKENS, plan_s, predict
from meshnode.pipeline.speeds import Link, Links, Speed, Storage
from meshnode.pipeline.work import Load
from tests.bench.benchmarks_page import put
from tests.bench.engine_measures import (
    SHORT_PROMPT,
    STREAMS,
    complete,
    streams_per_s,
    tokens_per_s,
)
from tests.bench.engine_model import SMALL, written_model
from tests.bench.engine_reading import read_plainly
from tests.bench.engine_sides import MESH, Deployment, Setup, Side, deployment, prepare_cache
from tests.bench.engine_tables import machine
from tests.bench.link_shaper import Way

TOKENS = 32
SHORT, LONG = 128, 512
PROMPTS = 3
GIB = 2**30
NO_LIMIT = 1e12


@dataclass(frozen=True)
class Case:
    """`rate`: bytes a second. `prompt_tokens`: 0 for eight answers at once instead."""

    layout: str
    rtt_ms: float
    rate: float | None = None
    star: bool = False
    prompt_tokens: int = LONG

    @property
    def title(self) -> str:
        limit = f", {self.rate / 1e6:.0f} MB/s" if self.rate else ""
        return f"{self.layout}, RTT {self.rtt_ms:g} ms{limit}{', star' if self.star else ''}"

    @property
    def depth_tokens(self) -> int:
        """Before a token of an answer, in the middle of it."""
        return len(SHORT_PROMPT) + TOKENS // 2


CASES = (
    Case("a=0:15", 0),
    Case("local=0:7,a=8:15", 0),
    Case("a=0:15", 20),
    Case("local=0:11,a=12:15", 20),
    Case("a=0:7,b=8:15", 0),
    Case("a=0:7,b=8:15", 5),
    Case("a=0:11,b=12:15", 20),
    Case("a=0:3,b=4:15", 20, 15e6),
    Case("local=0:3,a=4:9,b=10:15", 20, star=True),
    Case("a=0:5,b=6:10,c=11:15", 10, star=True),
    Case("a=0:5,b=6:10,c=11:15", 10, prompt_tokens=SHORT),
    Case("a=0:5,b=6:10,c=11:15", 40, prompt_tokens=SHORT),
    Case("local=0:7,a=8:10,b=11:13,c=14:15", 20, 15e6, prompt_tokens=SHORT),
)
"""The output is at home."""
CROWDS = (
    Case("a=0:15", 0, prompt_tokens=0),
    Case("a=0:7,b=8:15", 5, prompt_tokens=0),
    Case("a=0:5,b=6:10,c=11:15", 20, prompt_tokens=0),
)


@dataclass(frozen=True)
class Outcome:
    """Predicted and measured: seconds from llama-server's start until it answers, tokens a second
    of an answer (or eight) and of a prompt if any."""

    ready: tuple[float, float]
    decode: tuple[float, float]
    prefill: tuple[float, float] | None = None


@dataclass(frozen=True)
class Figures:
    """Of this machine, with one thread; `read_bytes_per_s` of the model's file."""

    speed: Speed
    read_bytes_per_s: float


def figures_now(side: Side, facts: ModelFacts) -> Figures:
    speed = measure(side.engine, cpu_device(), threads=1)
    prepare_cache(facts.path, is_cold=False)
    return Figures(speed, facts.path.stat().st_size / read_plainly(facts.path))


def planned(case: Case, facts: ModelFacts, now: Figures) -> tuple[Setup, PlanRequest, Plan]:
    """How the layout is deployed, and the plan that it is."""
    ranges = parse_layers(case.layout + ",local=output")
    names = dict.fromkeys(("local", *(given.node for given in ranges)))
    nodes = tuple(
        PlanNode(name, name == "local", (PlanDevice("CPU", 8 * GIB, False, now.speed),))
        for name in names
    )
    link = Link(case.rtt_ms / 1000, case.rate or NO_LIMIT)
    pairs = {(one, other): link for one in names for other in names if one != other}
    request = PlanRequest(
        plan_model(facts),
        nodes,
        ctx_tokens=1024,
        layers=ranges,
        output_may_stay=True,
        links=Links(pairs, ring=not case.star),
        storage=dict.fromkeys(names, Storage(disk_bytes_per_s=now.read_bytes_per_s)),
    )
    plan = make_plan(request)
    assert plan.output.device == "CPU"
    workers = len(plan.rpc_nodes)
    pieces = ("--ubatch-size", str(PIECE_TOKENS)) if workers > 1 else ()
    setup = Setup(
        facts.path,
        facts.n_layers,
        workers,
        Way(case.rtt_ms / 2e3, case.rate),
        slots=1 if case.prompt_tokens else STREAMS,
        extra=("--cache-ram", "0", *pieces),
        counts=plan.tensor_split,
        star=case.star,
    )
    return setup, request, plan


def observe(case: Case, side: Side, facts: ModelFacts, now: Figures) -> Outcome:
    setup, request, plan = planned(case, facts, now)

    def predicted(load: Load) -> float:
        return load.tokens / plan_s(request, plan, load)

    with deployment(side, setup) as deployed:
        ready = (predict(request, plan).ready_s, deployed.ready_s)
        if not case.prompt_tokens:
            crowd = streams_per_s(deployed, TOKENS).figure
            load = Load(0, 1, STREAMS, depth_tokens=case.depth_tokens)
            return Outcome(ready, (predicted(load), crowd))
        decode = tokens_per_s(deployed, TOKENS).figure
        prefill = prompt_per_s(deployed, case.prompt_tokens)
    load = Load(0, 1, depth_tokens=case.depth_tokens)
    prompt = Load(case.prompt_tokens, 0)
    return Outcome(ready, (predicted(load), decode), (predicted(prompt), prefill))


def prompt_per_s(deployed: Deployment, tokens: int) -> float:
    """Tokens a second of some prompts, the median, once the shape of the graph is known."""
    prompts = [(1, *range(300 + 7 * number, 299 + 7 * number + tokens)) for number in range(9)]
    complete(deployed, 1, prompts.pop())
    each = [
        complete(deployed, 1, prompt)["timings"]["prompt_per_second"]
        for prompt in prompts[:PROMPTS]
    ]
    return float(median(each))


Rows = dict[Case, list[Outcome]]


def report(found: Rows, rounds: int) -> str:
    lines = [
        f"{datetime.date.today()}; {machine()}; {SMALL.describe()}, {TOKENS} tokens, the output at "
        f"home; prompts of {LONG} tokens, or of {SHORT} where it says so; the model's file in "
        f"memory. Medians of {rounds} rounds.",
        "",
        "| layers | tok/s predicted | measured | | prompt predicted | measured | |",
        "|---|---|---|---|---|---|---|",
    ]
    single = {case: outcomes for case, outcomes in found.items() if case.prompt_tokens}
    for case, outcomes in single.items():
        note = f" ({SHORT})" if case.prompt_tokens == SHORT else ""
        prompts = [one.prefill for one in outcomes if one.prefill]
        lines.append(
            f"| {case.title} | {_cells([one.decode for one in outcomes])} | "
            f"{_cells(prompts, note)} |"
        )
    lines += ["", "| ready | s predicted | measured | |", "|---|---|---|---|"]
    for case, outcomes in single.items():
        lines.append(f"| {case.title} | {_cells([one.ready for one in outcomes])} |")
    lines += ["", "| eight answers at once | tok/s predicted | measured | |", "|---|---|---|---|"]
    crowds = {case: outcomes for case, outcomes in found.items() if not case.prompt_tokens}
    for case, outcomes in crowds.items():
        lines.append(f"| {case.title} | {_cells([one.decode for one in outcomes])} |")
    for what, each in (
        ("tokens", [[one.decode for one in outcomes] for outcomes in single.values()]),
        ("prompts", [[o.prefill for o in outcomes if o.prefill] for outcomes in single.values()]),
        ("ready", [[one.ready for one in outcomes] for outcomes in single.values()]),
        ("eight at once", [[one.decode for one in outcomes] for outcomes in crowds.values()]),
    ):
        sizes = [abs(_error(pairs)) for pairs in each]
        lines += ["", f"Off for {what}: {median(sizes):.0%} in the median (to reach: 15 %), "]
        lines[-1] += f"{max(sizes):.0%} at worst (to reach: 35 %)."
    return "\n".join(lines)


def _cells(pairs: Sequence[tuple[float, float]], note: str = "") -> str:
    predicted, measured = (median(one[which] for one in pairs) for which in (0, 1))
    digits = 0 if measured >= 200 else 1 if measured >= 5 else 2
    return f"{predicted:.{digits}f}{note} | {measured:.{digits}f} | {_error(pairs):+.0%}"


def _error(pairs: Sequence[tuple[float, float]]) -> float:
    """The median over the rounds of what the prediction is off by."""
    return median(predicted / measured - 1 for predicted, measured in pairs)


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=3)
@click.option("--write", is_flag=True, help="Put the result into docs/benchmarks.md.")
@click.option("--models", type=click.Path(path_type=Path), help="Folder of the model.")
def plan(rounds: int, write: bool, models: Path | None) -> None:
    """Predictions of plans beside what their deployments do."""
    side = Side(MESH, build_showing_progress(BuildOptions()))
    facts = read_facts(written_model(SMALL, models))
    found: Rows = {case: [] for case in (*CASES, *CROWDS)}
    for _ in range(rounds):
        for case in found:
            outcome = observe(case, side, facts, figures_now(side, facts))
            found[case].append(outcome)
            pairs = [outcome.decode, *([outcome.prefill] if outcome.prefill else [])]
            told = (f"{predicted:.1f} against {measured:.1f}" for predicted, measured in pairs)
            ready = "ready after {:.2f} against {:.2f} s".format(*outcome.ready)
            click.echo(f"{case.title}: {', '.join(told)} tok/s, {ready}")
    text = report(found, rounds)
    click.echo("\n" + text)
    if write:
        put("plan", text)
