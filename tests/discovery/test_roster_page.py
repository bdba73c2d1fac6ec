"""What docs/roster.md says of traffic: from a recorded run, and true of this code at 50 nodes."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.bench.gossip import (
    BUDGET_BYTES_PER_S,
    DOCS,
    PLOT,
    RECORD,
    SIZES,
    charts,
    figures,
    measure,
)
from tests.bench.plot import svg


@pytest.fixture
def recorded() -> dict[str, Any]:
    saved: dict[str, Any] = json.loads(RECORD.read_text())
    return saved


def test_the_plot_shows_what_was_recorded(recorded: dict[str, Any]) -> None:
    assert PLOT.read_text() == svg(charts(recorded["rows"]))
    assert tuple(row["nodes"] for row in recorded["rows"]) == SIZES
    assert recorded["figures"] == figures(), "./just gossip --write"


def test_the_page_has_the_recorded_figures(recorded: dict[str, Any]) -> None:
    page = (DOCS / "roster.md").read_text()
    rows = re.findall(r"^\| ([\d,]+) \|(.*)\|$", page, re.MULTILINE)
    shown = {int(size.replace(",", "")): cells.replace(",", "").split("|") for size, cells in rows}
    for row in recorded["rows"]:
        _, *values = row.values()
        assert [float(cell) for cell in shown[row["nodes"]]] == [float(value) for value in values]


def test_at_50_nodes_none_has_more_traffic_than_the_budget(recorded: dict[str, Any]) -> None:
    (saved,) = [row for row in recorded["rows"] if row["nodes"] == 50]
    now = measure(50, seed=1)
    for row in (saved, now):
        assert row["bytes_per_s_most"] <= BUDGET_BYTES_PER_S
        assert row["news_to_all_s"] < 60
    assert now["bytes_per_s_median"] == pytest.approx(saved["bytes_per_s_median"], rel=0.2)
