"""Two orchestrators and one worker: memory is promised once, and comes back."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import World
from tests.e2e.test_two_nodes import greedy_tokens, url_of

pytestmark = pytest.mark.engine


async def test_a_second_orchestrator_is_served_when_the_first_has_left(
    world: World, small_model: Path
) -> None:
    """The worker lends little more than one deployment needs."""
    lends = ("--memory", "100M", "--models", str(small_model.parent))
    async with world.worker(*lends) as worker:
        joins = ("--join-file", str(await world.join_file(worker)))
        arguments = ("--model", str(small_model), "--layers", "worker=0:output", *joins)
        async with world.serve(*arguments, name="first") as first:
            expected = await greedy_tokens(await url_of(first))
            async with world.serve(*arguments, name="second") as second:
                await second.wait_event("warning", containing="waiting for workers")
                await first.stop()
                assert await greedy_tokens(await url_of(second)) == expected
