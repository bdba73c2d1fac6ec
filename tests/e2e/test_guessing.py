"""Guesses are had for the asking: fewer trips over the wire, and the same text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from meshnode.models.facts import read_facts
from meshnode.models.manifest import digest_model
from meshnode.models.shelf import DEMO_MODEL
from meshnode.models.store.slice import Slice, open_slice
from meshnode.models.store.store import Store
from meshnode.models.store.writer import SliceWriter
from meshnode.state import subfolder_beside_node
from tests.e2e.conftest import Mesh, World
from tests.e2e.test_two_nodes import status_of, url_of
from tests.meshnode.models.store.slices import Whole, pull

pytestmark = pytest.mark.engine

TOKENS = 160
"""In so many, the demo model says some things twice."""


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: int
    accepted_guesses: int


async def greedy_answer(url: str) -> Answer:
    body = {
        "prompt": "tell me of the sea",
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }
    async with httpx.AsyncClient(timeout=120) as client:
        response = await client.post(f"{url}/v1/completions", json=body)
    told = response.raise_for_status().json()
    timings = told["timings"]
    text = told["choices"][0]["text"]
    return Answer(text, timings["predicted_n"], timings.get("draft_n_accepted", 0))


async def test_a_text_that_repeats_itself_is_guessed_and_stays_the_same(world: World) -> None:
    async with world.serve("--split", "never", name="alone") as node:
        alone = await greedy_answer(await url_of(node))
    async with world.worker() as worker:
        joins = ("--join-file", str(await world.join_file(worker)))
        async with world.serve("--split=always", "--speculate=auto", *joins) as node:
            url = await url_of(node)
            guessed = await greedy_answer(url)
            guesser = (await status_of(url))["speculation"]["guesser"]
    assert (guesser, alone.accepted_guesses) == ("ngram", 0)
    assert guessed.accepted_guesses > 0
    assert guessed.text == alone.text
    assert guessed.tokens == alone.tokens == TOKENS


def pulled(model: Path, home: Path) -> Slice:
    """All of the model, as a pull leaves it in that home."""
    facts = read_facts(model)
    whole = Whole(facts, digest_model(facts))
    part = whole.create(Store(subfolder_beside_node(home, "models")))
    with SliceWriter(part.folder) as writer:
        pull(writer, whole, whole.all_names)
    return open_slice(part.folder)


async def test_a_pulled_draft_model_stays_while_it_guesses(world: World, mesh: Mesh) -> None:
    home = world.folder / "orchestrator"
    draft = pulled(DEMO_MODEL, home)
    collect = ("models", "gc", "--keep", "0", "--home", str(home))
    options = ("--split", "never", "--speculate", str(draft.facts.path))
    async with world.serve(*options) as node:
        answer = await greedy_answer(await url_of(node))
        assert answer.accepted_guesses > 0
        kept = mesh(*collect)
        kept.check(0)
        assert f"{draft.folder.name} is in use and stays" in kept.stdout
        assert (await greedy_answer(await url_of(node))).text == answer.text
    assert "is removed" in mesh(*collect).stdout
