"""A plan knows what is on its workers' disks, in the node that serves and beside it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from meshnode.demo.nodes import NodeProcess
from meshnode.models.store.slice import open_slice
from tests.e2e.conftest import Mesh
from tests.e2e.test_secret_address import LAYOUT, Stage, served, stage
from tests.e2e.test_two_nodes import url_of

pytestmark = pytest.mark.engine

__all__ = ["stage"]
ALL_OF_ITS = "ben holds all of its layers already"


def reasons(node: NodeProcess) -> list[str]:
    return [event["text"] for event in node.events if event["event"] == "plan"]


async def test_what_a_worker_pulled_before_is_counted_and_a_second_start_pulls_nothing(
    stage: Stage, mesh: Mesh
) -> None:
    anna = ("--home", str(stage.world.folder / "anna"))

    def planned() -> Any:
        found = mesh("plan", "--model", "big", *LAYOUT, "--ctx", "256", "--json", *anna)
        found.check(0)
        return json.loads(found.stdout)

    with served(stage.model, stage.world.folder / "nginx") as url:
        mesh("pull", url, "--layers", "2:4", "--home", str(stage.world.folder / "ben")).check(0)
        assert open_slice(stage.world.folder / "ben" / "models" / "big").held
        async with stage.serving(url) as node:
            await url_of(node)
            told = "\n".join(reasons(node))
            assert "ben holds 3 of its 4 layers already" in told
            assert " are to be pulled" in told
            while_it_runs = planned()
    assert ALL_OF_ITS in while_it_runs["why"]
    assert while_it_runs["why"][-1] == "nothing is to be pulled"
    async with stage.serving(url) as node:
        await url_of(node)
        told = "\n".join(reasons(node))
        assert ALL_OF_ITS in told
        assert "nothing is to be pulled" in told
