"""Every claim of docs/security.md names the test that holds it, and that test is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.figures import PAGE, on_page, table
from tests.sansio import ROOT

_CITED = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
_CLAIM = re.compile(r"^\|(?P<actor>[^|]*)\|(?P<claim>[^|]*)\|(?P<held_by>[^|]*)\|$", re.MULTILINE)


def cited() -> list[tuple[str, str]]:
    return sorted(set(_CITED.findall(PAGE.read_text())))


def claims() -> list[tuple[str, str]]:
    """The rows of the page's "can and cannot" tables: the claim, and what holds it."""
    section = PAGE.read_text().partition("## Who can do what")[2].partition("\n## ")[0]
    rows = [row for row in _CLAIM.finditer(section) if not set(row["actor"]) <= set("- ")]
    return [(row["claim"].strip(), row["held_by"]) for row in rows if "held by" not in row[0]]


def defined_in(path: Path) -> set[str]:
    defined = ast.walk(ast.parse(path.read_text()))
    return {
        node.name
        for node in defined
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name[:5] == "test_"
    }


@pytest.mark.parametrize(("file", "name"), cited(), ids=lambda value: str(value))
def test_every_test_named_on_the_page_is_there(file: str, name: str) -> None:
    path = ROOT / file
    assert path.is_file(), f"docs/security.md names {file}"
    assert not name or name in defined_in(path), f"docs/security.md names {file}::{name}"


def test_every_claim_names_its_test() -> None:
    assert len(claims()) > 30
    missing = [claim for claim, held_by in claims() if not _CITED.search(held_by)]
    assert not missing, missing


def test_the_figures_are_those_of_the_recorded_runs() -> None:
    assert on_page() == table()
