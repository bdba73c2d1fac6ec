"""The rows of the engine's benchmark: what is deployed, what is measured, what is to be reached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tests.bench.engine_measures import (
    PREFILL_TOKENS,
    STREAMS,
    Sample,
    prefill_per_s,
    streams_per_s,
    time_to_ready,
    tokens_per_s,
)
from tests.bench.engine_model import DRAFT, SMALL, written_model
from tests.bench.engine_sides import Deployment, Setup
from tests.bench.link_shaper import Way

RATE = 15e6
ACCEPTED = 3
WIRE_TOKENS = 96
"""Fixed: the graphs that a prompt takes weigh on each token the less, the more follow."""
MICRO_BATCH = 64
"""Of ours: a prompt in one piece leaves a worker nothing to do while another computes. Stock is
asked as it comes, with 512, and once more with this."""
KEEPS_NO_PROMPT = ("--cache-ram", "0")
"""Else llama-server fetches what it knows of a prompt, tensor by tensor, from the workers when
another prompt takes its slot: 17 MB for 512 tokens, in 32 round trips."""


@dataclass(frozen=True)
class Goal:
    """`reaches` is given stock's medians and ours."""

    text: str
    reaches: Callable[[Sample, Sample], bool]


NO_GOAL = Goal("–", lambda _stock, _ours: True)


@dataclass(frozen=True)
class Row:
    name: str
    title: str
    unit: str
    setup: Setup
    measure: Callable[[Deployment, int], Sample]
    goal: Goal
    load_is_shown: bool = False
    """By command, instead of a token."""
    detail: Callable[[Sample], str] = lambda _sample: ""
    """What stands behind the figure."""


def rows(models: Path | None) -> tuple[Row, ...]:
    small = written_model(SMALL, models)
    draft = written_model(DRAFT, models)
    return (
        *_ready_rows(small),
        *_token_rows(small),
        _speculation_row(small, draft),
        _streams_row(small),
        *_prefill_rows(small),
    )


def _link(rtt_ms: float, rate: float | None = None) -> Way:
    return Way(rtt_ms / 2e3, rate)


def _rounds(sample: Sample) -> str:
    return f"{sample.load.rounds:.0f} round trips"


def _wire(sample: Sample) -> str:
    total = sample.each.total
    return f"{total.up_bytes / 1e3:.1f} KB up, {total.down_bytes / 1e3:.1f} KB down"


def _against(stock: float, ours: float, text: str) -> Goal:
    """What one machine showed for stock, and what ours was to reach there: here the same ratio."""
    ratio = ours / stock
    if ours < stock:
        return Goal(
            f"≤ {ratio:.3g} × ({text})",
            lambda theirs, mine: mine.figure <= ratio * theirs.figure,
        )
    return Goal(
        f"≥ {ratio:.3g} × ({text})", lambda theirs, mine: mine.figure >= ratio * theirs.figure
    )


def _times(factor: float) -> Goal:
    return Goal(f"≥ {factor:g} ×", lambda stock, ours: ours.figure >= factor * stock.figure)


def _ready_rows(model: Path) -> tuple[Row, ...]:
    def row(name: str, title: str, goal: Goal, setup: Setup) -> Row:
        return Row(name, f"time to ready, {title}", "s", setup, time_to_ready, goal, True, _rounds)

    rounds = Goal("≤ 8 round trips", lambda _stock, ours: ours.load.rounds <= 8)
    way, slow = _link(100), _link(100, RATE)
    fast = _against(5.7, 1.4, "there 5.7 s → 1.4 s")
    same = _against(21.7, 1.4, "there 21.7 s → 1.4 s: the rate makes no difference")
    return (
        row("ready", "1 worker, RTT 100 ms", fast, Setup(model, way=way)),
        row("ready-slow", "the same at 15 MB/s", same, Setup(model, way=slow)),
        row("ready-4", "4 workers, RTT 100 ms", rounds, Setup(model, workers=4, way=way)),
    )


def _token_rows(model: Path) -> tuple[Row, ...]:
    def row(name: str, title: str, goal: Goal, setup: Setup) -> Row:
        return Row(name, f"tok/s, {title}", "tok/s", setup, tokens_per_s, goal)

    def is_small(stock: Sample, ours: Sample) -> bool:
        total = ours.each.total
        is_less = total.up_bytes <= 8e3 and total.down_bytes <= 5e3
        return is_less and ours.each.rounds <= stock.each.rounds

    wire = Goal("≤ 8 KB up, ≤ 5 KB down a token, no more round trips", is_small)
    return (
        row("tokens", "1 worker, no delay", _times(1.05), Setup(model, way=None)),
        Row(
            "wire",
            f"tok/s and bytes, 1 worker, no delay but through the line, {WIRE_TOKENS} tokens",
            "tok/s",
            Setup(model),
            lambda deployed, _tokens: tokens_per_s(deployed, WIRE_TOKENS),
            wire,
            detail=_wire,
        ),
        row(
            *("tokens-2", "2 workers, RTT 20 ms", _against(18, 23, "there 18 → 23, limit 24")),
            Setup(model, workers=2, way=_link(20)),
        ),
        row(
            *("tokens-3", "3 workers, RTT 20 ms", _times(1.4)),
            Setup(model, workers=3, way=_link(20)),
        ),
    )


def _speculation_row(model: Path, draft: Path) -> Row:
    """Of three drafted tokens two are taken, on the average; which, is drawn."""
    options = (
        *("--spec-type", "draft-simple", "--spec-draft-model", str(draft)),
        *("--spec-draft-device", "none", "--spec-draft-threads", "1"),
        *("--spec-draft-n-max", str(ACCEPTED), "--spec-synth-len", str(ACCEPTED)),
    )
    return Row(
        "speculation",
        f"tok/s, 2 workers, RTT 20 ms, synthetic accepted length {ACCEPTED}",
        "tok/s",
        Setup(model, workers=2, way=_link(20), extra=options),
        lambda deployed, tokens: tokens_per_s(deployed, 2 * tokens),
        _against(24, 45, "there 24 → 45"),
        detail=lambda sample: f"{sample.notes['accepted length']:.2f} tokens a step",
    )


def _streams_row(model: Path) -> Row:
    return Row(
        "streams",
        f"total tok/s, {STREAMS} streams, 2 workers, RTT 20 ms",
        "tok/s",
        Setup(
            model,
            workers=2,
            way=_link(20),
            slots=STREAMS,
            ctx_tokens=256 * STREAMS,
            extra=KEEPS_NO_PROMPT,
        ),
        streams_per_s,
        Goal("≥ 4 × one stream's", lambda _stock, ours: ours.notes["times one stream"] >= 4),
        detail=lambda sample: f"{sample.notes['times one stream']:.1f} × one stream's",
    )


def _prefill_rows(model: Path) -> tuple[Row, ...]:
    way = _link(20, RATE)
    f16 = (("GGML_RPC_MESH_WIRE_DTYPE", "f16"),)
    pieces = ("-ub", str(MICRO_BATCH))

    def row(name: str, title: str, goal: Goal, setup: Setup) -> Row:
        return Row(name, title, "tok/s", setup, prefill_per_s, goal)

    whole = Setup(model, workers=2, way=way, extra=KEEPS_NO_PROMPT)
    cut = replace(whole, mesh_extra=pieces)
    title = f"tok/s of a prefill of {PREFILL_TOKENS}, 2 workers, RTT 20 ms, 15 MB/s"
    return (
        row("prefill", f"{title}, ours in micro-batches of {MICRO_BATCH}", _times(1.5), cut),
        row(
            *("prefill-f16", "the same, and ours with f16 on the wire", _times(2.5)),
            replace(cut, mesh_environment=f16),
        ),
        row(
            *("prefill-same", f"the same, exact, both in micro-batches of {MICRO_BATCH}", NO_GOAL),
            replace(whole, extra=(*KEEPS_NO_PROMPT, *pieces)),
        ),
    )
