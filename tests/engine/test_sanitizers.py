"""What `just engine-sanitize` takes for a report, and when a run was clean."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.engine.sanitizers import page
from tests.engine.sanitizers.build import SanitizedEngine, Sanitizer
from tests.engine.sanitizers.run import Sanitation, different_reports, environment, read_counts

RACE = """\
==================
WARNING: ThreadSanitizer: data race (pid={pid})
  Write of size 8 at 0x7b0400000{pid} by thread T1:
    #0 mesh_wire::flush() mesh-wire.cpp:120 (llama-server+0x1)
SUMMARY: ThreadSanitizer: data race mesh-wire.cpp:120 in mesh_wire::flush()
==================
"""
OVERFLOW = """\
=================================================================
==77==ERROR: AddressSanitizer: heap-buffer-overflow on address 0x1
SUMMARY: AddressSanitizer: heap-buffer-overflow mesh-coding.cpp:44 in decode
"""
CLEAN = Sanitation(
    sanitizer=Sanitizer.THREAD,
    engine=SanitizedEngine(Path("/nowhere"), "0123456789abcdef", own_client=True),
    tests={"passed": 300, "skipped": 2},
    two_servers=True,
    operations=475,
    operations_failed=0,
    reports=(),
    minutes=9.6,
)


def test_a_race_that_many_processes_report_is_one_report(tmp_path: Path) -> None:
    (tmp_path / "thread.11").write_text(RACE.format(pid=11) * 3)
    (tmp_path / "thread.12").write_text(RACE.format(pid=12))
    (tmp_path / "address.77").write_text(OVERFLOW)
    (tmp_path / "a.sock").write_text("")
    first, second = different_reports(tmp_path)
    assert "heap-buffer-overflow" in first
    assert "data race" in second


def test_undefined_behaviour_without_a_summary_is_a_report_too(tmp_path: Path) -> None:
    said = "mesh-coding.cpp:9:3: runtime error: null pointer passed as argument 2\n"
    (tmp_path / "undefined.5").write_text(said)
    assert different_reports(tmp_path) == (said.strip(),)


def test_reports_of_each_sanitizer_go_to_files_that_are_looked_at(tmp_path: Path) -> None:
    for sanitizer in Sanitizer:
        for options in environment(sanitizer, tmp_path).values():
            prefix = options.partition("log_path=")[2].partition(":")[0]
            Path(f"{prefix}.1").write_text("SUMMARY: something\n")
            assert different_reports(tmp_path) == ("SUMMARY: something",)
            Path(f"{prefix}.1").unlink()


@pytest.mark.parametrize(
    "change",
    [
        {"tests": {"passed": 300, "failed": 1}},
        {"tests": {"passed": 300, "error": 1}},
        {"tests": {}},
        {"two_servers": False},
        {"operations": 0},
        {"operations_failed": 1},
        {"reports": ("a race",)},
    ],
)
def test_only_a_run_in_which_all_ran_and_nothing_was_reported_is_clean(
    change: dict[str, object],
) -> None:
    assert CLEAN.clean
    assert not replace(CLEAN, **change).clean  # type: ignore[arg-type]


def test_the_last_line_of_pytest_is_counted() -> None:
    said = "..F\n3 passed in an earlier life\n2 failed, 310 passed, 4 skipped, 1 error in 61.0s\n"
    assert read_counts(said) == {"failed": 2, "passed": 310, "skipped": 4, "error": 1}
    assert read_counts("no tests ran\n") == {}


def test_the_page_keeps_its_words_and_changes_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = tmp_path / "docs" / "sanitizers.md"
    copied.parent.mkdir()
    other = (
        "| AddressSanitizer, UndefinedBehaviorSanitizer | 2026-01-01 | `fedcba9` | an older run |"
    )
    copied.write_text(
        f"Words.\n\n<!-- written by ./just engine-sanitize --write -->\nold\n{other}\n"
        "| ThreadSanitizer | its line before |\n"
    )
    monkeypatch.setattr(page, "PAGE", copied)
    monkeypatch.setattr(page, "head_commit", lambda: "abc1234")
    page.write_page([CLEAN], {"test_x.py": "slow"})
    text = copied.read_text()
    assert text.startswith("Words.\n\n<!-- written")
    assert "\nold" not in text
    assert "before" not in text
    assert other in text, "of the sanitizer that was not run now"
    assert "| `abc1234` | `0123456789abcdef` | sanitized | 300 | 0 | 2 | passed |" in text
    assert "`test_x.py` (slow)" in text
