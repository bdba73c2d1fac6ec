"""A short campaign against every parser, the same in every run, and each finding there ever was."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.fuzz.campaign import Result, ending_in_trio, ending_of, run_campaign, untraced
from tests.fuzz.parser import Parser, check
from tests.fuzz.table import PARSERS, folder_name

INPUTS = 10_000
REGRESSIONS = Path(__file__).parent / "regressions"

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def regressions() -> list[tuple[str, Path]]:
    return [
        (name, path)
        for name in PARSERS
        for path in sorted(REGRESSIONS.glob(f"{folder_name(name)}/*"))
    ]


def told(result: Result) -> list[str]:
    return [
        f"{finding.what} at {finding.where}: {finding.data[:200]!r}" for finding in result.findings
    ]


@pytest.mark.parametrize("name", PARSERS)
def test_no_input_gets_more_out_of_a_parser_than_it_declares(name: str) -> None:
    result = run_campaign(PARSERS[name], INPUTS)
    assert told(result) == []
    assert result.inputs == INPUTS


@pytest.mark.parametrize("name", PARSERS)
def test_what_our_own_encoders_make_is_accepted(name: str) -> None:
    """A harness that refuses everything would find nothing."""
    result = run_campaign(PARSERS[name], 2000)
    assert result.accepted > 0


@pytest.mark.parametrize(
    ("name", "path"), regressions(), ids=[f"{name}-{path.name}" for name, path in regressions()]
)
def test_what_was_found_once_stays_mended(name: str, path: Path) -> None:
    parser, data = PARSERS[name], path.read_bytes()
    ending = _ending(parser, data)
    with untraced():
        began_s = time.thread_time()
        _ending(parser, data)
        spent_s = time.thread_time() - began_s
    fine = not isinstance(ending, BaseException) or isinstance(ending, parser.declared)
    assert fine, repr(ending)
    assert spent_s <= parser.seconds_for(len(data))


def _ending(parser: Parser, data: bytes) -> object:
    if parser.run_in_trio is not None:
        return trio.run(ending_in_trio, parser, data, clock=trio.testing.MockClock())
    assert parser.run is not None
    return ending_of(parser.run, data)


def _faulty(data: bytes) -> bytes:
    """Three ways to be wrong, a few bytes away from the seed, and one to be right."""
    if data.startswith(b"a"):
        raise KeyError("undeclared")
    check(not data.startswith(b"b"), "no input starts with b")
    if data == b"c":
        sum(range(20_000_000))
    if data.startswith(b"d"):
        raise ValueError("declared")
    return data


def test_each_kind_of_fault_is_found() -> None:
    seeds = [letter.encode() for letter in "abcd"]
    result = run_campaign(Parser("faulty", (ValueError,), lambda: seeds, _faulty), 300)
    whats = " ".join(told(result))
    assert "KeyError" in whats
    assert "Broken" in whats
    assert " s for " in whats
    assert "declared: 'declared'" not in whats


def test_too_much_memory_is_found() -> None:
    parser = Parser("hungry", (), lambda: [bytes(40)], lambda data: bytes(64 << 20))
    assert "bytes of memory" in " ".join(told(run_campaign(parser, 10)))


def test_a_campaign_is_the_same_every_time() -> None:
    seen: list[list[bytes]] = []
    for _ in range(2):
        inputs: list[bytes] = []
        run_campaign(Parser("echo", (), lambda: [b"seed", b"other"], inputs.append), 500)
        seen.append(inputs)
    assert len(seen[0]) > 400
    assert set(seen[0]) == set(seen[1])
