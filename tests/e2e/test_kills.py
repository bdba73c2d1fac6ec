"""Kill -9 at each named point, on either side: once here, `./just kills` repeats them."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from tests.kills import SHORT_TABLE, Kill, make_kill_model, run_case, tokens_alone

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_kill_model(tmp_path_factory.mktemp("kills"))


@pytest.fixture(scope="module")
def expected(model: Path) -> list[int]:
    """What the model answers alone."""

    return trio.run(tokens_alone, model.parent, model)


@pytest.mark.parametrize("kill", SHORT_TABLE, ids=str)
async def test_killed_at(kill: Kill, tmp_path: Path, model: Path, expected: list[int]) -> None:
    await run_case(kill, tmp_path, model, expected)
