"""The message loop under sanitizers: real sessions, old findings, and mutations of both."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import require
from tests.engine.compiling import NotBuilt
from tests.engine.fuzz.build import Sanitized, build
from tests.engine.fuzz.run import CORPUS, fuzz

pytestmark = pytest.mark.engine

RUNS = 100_000


@pytest.fixture(scope="module")
def sanitized() -> Sanitized:
    try:
        return build()
    except NotBuilt as error:
        require("fuzzer", False, str(error))
        raise AssertionError from error


def test_recorded_sessions_and_old_findings_are_in_the_corpus() -> None:
    names = [path.name for path in CORPUS.iterdir()]
    assert any(name.startswith("recorded-") for name in names)
    assert sum(path.stat().st_size for path in CORPUS.iterdir()) < 1_000_000


def test_a_hundred_thousand_hostile_sessions_find_nothing(
    sanitized: Sanitized, tmp_path: Path
) -> None:
    result, log = fuzz(sanitized, RUNS, seed=20260101, artifacts=tmp_path)
    assert result.finding is None, log
    assert result.inputs >= RUNS
