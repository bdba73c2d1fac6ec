"""How llama.cpp's own test of operations is run against a worker, and what is left out of it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.engine.ops.cases import Case, Client, Failure, smallest
from tests.engine.ops.page import PAGE
from tests.engine.ops.reasons import REASONS


def test_the_page_of_the_last_whole_run_says_why_each_operation_is_kept() -> None:
    text = PAGE.read_text()
    for op, reason in REASONS.items():
        assert f"| {op} | " in text
        assert reason in text


def row(op: str, params: str, error: str = "") -> str:
    return f'"RPC0[unix:/a]","{op}","{params}","test","1","{error}","RPC"\n'


def test_a_program_that_ends_in_the_middle_is_begun_anew_after_the_case_it_ended_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a, b, c = (Case("ADD", f"ne=[{n}]") for n in range(3))
    calls: list[str] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        chosen = command[command.index("-o") + 1]
        calls.append(chosen)
        first = chosen == f"{a},{b},{c}"
        said = (
            row("ADD", "ne=[0]") + "Remote RPC server crashed\n" if first else row("ADD", "ne=[2]")
        )
        return subprocess.CompletedProcess(command, -6 if first else 0, stdout=said)

    monkeypatch.setattr(subprocess, "run", run)
    results = list(Client(Path("ops"), "unix:/a", {}).run([a, b, c]))
    assert (results[0], results[2]) == (a, c)
    assert isinstance(results[1], Failure)
    assert results[1].case == b
    assert "ended with -6" in results[1].said
    assert "crashed" in results[1].said
    assert calls == [f"{a},{b},{c}", f"{c}"]


def test_a_case_that_fails_is_found_where_its_words_come_before_its_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case("MUL", "ne=[1]")
    said = "[MUL] NMSE = 1.0 > 0.1 " + row("MUL", "ne=[1]", "test failed")

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, stdout=said)

    monkeypatch.setattr(subprocess, "run", run)
    assert list(Client(Path("ops"), "unix:/a", {}).run([case])) == [Failure(case, "test failed")]


def test_of_each_operation_and_set_of_types_the_case_with_the_least_work_is_chosen() -> None:
    small, large = Case("ADD", "type=f32,ne=[4,2]"), Case("ADD", "type=f32,ne=[400,2]")
    other = Case("ADD", "type=f16,ne=[400,2]")
    assert smallest([large, small, other]) == [small, other]
