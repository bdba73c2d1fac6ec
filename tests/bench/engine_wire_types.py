"""What smaller activations do to the answers: each type of `--wire-dtype` against exact ones.

One text, the exact deployment's own, is put to each deployment token by token; at each token the
log-probabilities of the likeliest are compared. So a difference does not grow because an earlier
one led to another text. Exact against itself is measured first, and has to be nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from meshnode.config import WireType
from meshnode.models.shelf import DEMO_MODEL
from tests.bench.engine_chapter import Chapter, Run
from tests.bench.engine_model import SMALL, written_model
from tests.bench.engine_sides import Deployment, Setup, Side, deployment, knows

VARIABLE = "GGML_RPC_MESH_WIRE_DTYPE"
COMPARED = 1000
"""Of the likeliest tokens."""
POSITIONS = 48

Likely = dict[int, float]
"""Log-probabilities by token."""


@dataclass(frozen=True)
class Difference:
    """Over all positions: of log-probabilities, and how often the likeliest token is the same."""

    largest: float
    mean: float
    agreement: float


def tell_wire_types(run: Run) -> str:
    if run.mesh is None or not knows(run.mesh.engine, VARIABLE):
        return ""
    lines = [
        f"What `--wire-dtype` changes: log-probabilities of the {COMPARED} likeliest tokens at "
        f"each of {POSITIONS} positions, 2 workers, against exact activations.",
        "",
        "| model | type | largest difference | mean | likeliest token the same |",
        "|---|---|---|---|---|",
    ]
    models = ((SMALL.describe(), written_model(SMALL, run.models)), ("the demo model", DEMO_MODEL))
    for name, model in models:
        lines += [f"| {name} {_row(*each)}" for each in _differences(run, run.mesh, model)]
    return "\n".join(lines)


def _row(wire_type: WireType, found: Difference) -> str:
    return f"| {wire_type.value} | {found.largest:.4f} | {found.mean:.5f} | {found.agreement:.1%} |"


def _differences(run: Run, side: Side, model: Path) -> list[tuple[WireType, Difference]]:
    setup = Setup(model, workers=2, way=None)
    with deployment(side, setup) as exact:
        text = _own_text(exact)
        reference = _put(exact, text)
    found = []
    for wire_type in WireType:
        environment = () if wire_type is WireType.EXACT else ((VARIABLE, wire_type.value),)
        with deployment(side, replace(setup, mesh_environment=environment)) as deployed:
            difference = compare(reference, _put(deployed, text))
        run.say(f"wire-types: {wire_type.value}: {difference}")
        found.append((wire_type, difference))
    return found


def _own_text(deployed: Deployment) -> tuple[int, ...]:
    return tuple(_token_ids(deployed, "tell me of the sea", POSITIONS))


def _token_ids(deployed: Deployment, prompt: str, tokens: int) -> list[int]:
    response = deployed.client.post(
        "/completion",
        json={
            "prompt": prompt,
            "n_predict": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
            "return_tokens": True,
        },
    )
    response.raise_for_status()
    ids: list[int] = response.json()["tokens"]
    return ids


def _put(deployed: Deployment, text: tuple[int, ...]) -> list[Likely]:
    """What each token of the text is followed by, the text having been read up to there."""
    return [_likely(deployed, text[:end]) for end in range(1, len(text) + 1)]


def _likely(deployed: Deployment, text: tuple[int, ...]) -> Likely:
    response = deployed.client.post(
        "/completion",
        json={
            "prompt": list(text),
            "n_predict": 1,
            "temperature": 0,
            "n_probs": COMPARED,
            "cache_prompt": True,
        },
    )
    response.raise_for_status()
    found = response.json()["completion_probabilities"][0]["top_logprobs"]
    return {one["id"]: one["logprob"] for one in found}


def compare(reference: list[Likely], other: list[Likely]) -> Difference:
    """Tokens that are among the likeliest of both, at each position."""
    differences = [
        abs(theirs[token] - ours)
        for theirs, mine in zip(reference, other, strict=True)
        for token, ours in mine.items()
        if token in theirs
    ]
    same = [
        max(theirs, key=theirs.__getitem__) == max(mine, key=mine.__getitem__)
        for theirs, mine in zip(reference, other, strict=True)
    ]
    return Difference(max(differences), fmean(differences), fmean(same))


WIRE_TYPES = Chapter(
    "wire-types", "what smaller activations change in the answers", tell_wire_types
)
