"""What n-gram speculation costs where nothing repeats, and gains where something does.

The model is noise: sampled, it never repeats itself; greedy, it does now and then. What a text
gains depends on the text, of which docs/benchmarks.md says more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import median

from meshnode.pipeline.speculation import NGRAM
from tests.bench.engine_chapter import Chapter, Run
from tests.bench.engine_measures import SHORT_PROMPT, WARM_UP_TOKENS, complete
from tests.bench.engine_model import SMALL, written_model
from tests.bench.engine_sides import Deployment, Setup, Side, deployment
from tests.bench.link_shaper import Way

RTTS_MS = (0, 20)
WORKERS = 2
GREEDY, SAMPLED = 0.0, 1.5


@dataclass(frozen=True)
class Pace:
    tokens_per_s: float
    tokens_a_step: float


def tell_ngram(run: Run) -> str:
    if run.mesh is None:
        return ""
    lines = [
        f"N-gram speculation (`--speculate ngram`), {WORKERS} workers, {SMALL.describe()}, "
        f"{run.tokens} tokens a measurement, median of {run.rounds}:",
        "",
        "| text | RTT | off | on | | tokens a step |",
        "|---|---|---|---|---|---|",
    ]
    for rtt_ms in RTTS_MS:
        lines += _rows(run, run.mesh, rtt_ms)
    return "\n".join(lines)


def _rows(run: Run, side: Side, rtt_ms: int) -> list[str]:
    way = Way(rtt_ms / 2e3)
    off = Setup(written_model(SMALL, run.models), workers=WORKERS, way=way, ctx_tokens=4096)
    rows = []
    texts = (("nothing repeats", SAMPLED), ("repeats itself now and then", GREEDY))
    paces: dict[tuple[float, bool], list[Pace]] = {}
    for number in range(run.rounds):
        for is_on in (False, True) if number % 2 else (True, False):
            with deployment(side, replace(off, extra=NGRAM) if is_on else off) as deployed:
                for _, temperature in texts:
                    pace = _pace(deployed, run.tokens, temperature)
                    paces.setdefault((temperature, is_on), []).append(pace)
    for name, temperature in texts:
        without, with_it = (
            median(one.tokens_per_s for one in paces[temperature, is_on]) for is_on in (False, True)
        )
        step = median(one.tokens_a_step for one in paces[temperature, True])
        rows.append(
            f"| {name} | {rtt_ms} ms | {without:.1f} tok/s | {with_it:.1f} tok/s "
            f"| {with_it / without:.2f} × | {step:.2f} |"
        )
        run.say(rows[-1])
    return rows


def _pace(deployed: Deployment, tokens: int, temperature: float) -> Pace:
    complete(deployed, WARM_UP_TOKENS, SHORT_PROMPT, temperature=temperature)
    timings = complete(deployed, tokens, SHORT_PROMPT, temperature=temperature)["timings"]
    steps = tokens - timings.get("draft_n_accepted", 0)
    return Pace(timings["predicted_per_second"], tokens / max(1, steps))


NGRAM_COST = Chapter("ngram", "n-gram speculation's cost and gain", tell_ngram)
