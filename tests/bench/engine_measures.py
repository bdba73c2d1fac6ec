"""What the engine's benchmark measures in one deployment."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from tests.bench.engine_sides import Deployment
from tests.bench.rpc_meter import Counts

WARM_UP_TOKENS = 8
SHORT_PROMPT = (1, *range(300, 310))
PREFILL_TOKENS = 512
STREAMS = 8


@dataclass(frozen=True)
class Sample:
    """One side in one round. `load` from start to ready, `each` a token; empty without a line."""

    figure: float
    load: Counts = field(default_factory=Counts)
    each: Counts = field(default_factory=Counts)
    notes: Mapping[str, float] = field(default_factory=dict)


def median_sample(samples: tuple[Sample, ...]) -> Sample:
    """The medians of the figures; what was counted hardly differs between rounds: the last's."""
    notes = {name: median(sample.notes[name] for sample in samples) for name in samples[-1].notes}
    figure = median(sample.figure for sample in samples)
    return Sample(figure, samples[-1].load, samples[-1].each, notes)


def time_to_ready(deployed: Deployment, _tokens: int) -> Sample:
    return Sample(deployed.ready_s, load=_counts(deployed))


def tokens_per_s(deployed: Deployment, tokens: int) -> Sample:
    load = _counts(deployed)
    complete(deployed, WARM_UP_TOKENS)
    before = _counts(deployed)
    timings = complete(deployed, tokens)["timings"]
    each = _counts(deployed).since(before).per(tokens)
    notes = {"tokens": timings["predicted_n"]}
    if timings.get("draft_n"):
        accepted = timings["draft_n_accepted"]
        notes["drafted"] = timings["draft_n"]
        notes["accepted length"] = timings["predicted_n"] / (timings["predicted_n"] - accepted)
    return Sample(timings["predicted_per_second"], load, each, notes)


def streams_per_s(deployed: Deployment, tokens: int) -> Sample:
    """All streams together, while all of them speak; `notes` has one stream alone."""
    complete(deployed, WARM_UP_TOKENS)
    one = complete(deployed, tokens)["timings"]["predicted_per_second"]
    with ThreadPoolExecutor(STREAMS) as pool:
        prompts = [(1, *range(300 + 20 * number, 310 + 20 * number)) for number in range(STREAMS)]
        list(pool.map(lambda prompt: complete(deployed, WARM_UP_TOKENS, prompt), prompts))
        before = _counts(deployed)
        answers = list(pool.map(lambda prompt: complete(deployed, tokens, prompt), prompts))
    each = _counts(deployed).since(before).per(tokens * STREAMS)
    total = sum(answer["timings"]["predicted_per_second"] for answer in answers)
    return Sample(total, each=each, notes={"one stream": one, "times one stream": total / one})


def prefill_per_s(deployed: Deployment, _tokens: int) -> Sample:
    complete(deployed, WARM_UP_TOKENS)
    complete(deployed, 1, _long_prompt(5))  # the shape of the graph is known from then on
    before = _counts(deployed)
    timings = complete(deployed, 1, _long_prompt(7))["timings"]
    each = _counts(deployed).since(before)
    return Sample(timings["prompt_per_second"], each=each, notes={"ms": timings["prompt_ms"]})


def complete(
    deployed: Deployment,
    tokens: int,
    prompt: tuple[int, ...] = SHORT_PROMPT,
    temperature: float = 0.0,
) -> dict[str, Any]:
    response = deployed.client.post(
        "/completion",
        json={
            "prompt": list(prompt),
            "n_predict": tokens,
            "temperature": temperature,
            "seed": 1,  # decides which guesses count as right where that is drawn
            "ignore_eos": True,
            "cache_prompt": False,
        },
    )
    response.raise_for_status()
    answer: dict[str, Any] = response.json()
    return answer


def _long_prompt(step: int) -> tuple[int, ...]:
    return (1, *(300 + step * number for number in range(PREFILL_TOKENS - 1)))


def _counts(deployed: Deployment) -> Counts:
    return deployed.line.counts() if deployed.line else Counts()
