"""The journal tells of what was done, whatever a kill or a disk did to it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.models.spans import Span
from meshnode.models.store.journal import (
    JOURNAL_NAME,
    Journal,
    parse_records_untrusted,
    to_record,
)

KEY = b"slice"
SPANS = [Span(0, 100, 200), Span(1, 0, 7), Span(0, 2**40, 2**41)]
RECORD_BYTES = len(to_record(KEY, SPANS[0]))


def test_what_was_appended_is_read_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path, KEY)
    assert journal.read() == []
    for span in SPANS:
        journal.append(span)
    assert Journal(tmp_path, KEY).read() == SPANS
    journal.rewrite(SPANS[1:])
    journal.append(SPANS[0])
    journal.close()
    assert Journal(tmp_path, KEY).read() == [*SPANS[1:], SPANS[0]]


def test_the_journal_of_other_files_tells_nothing(tmp_path: Path) -> None:
    Journal(tmp_path, KEY).append(SPANS[0])
    assert Journal(tmp_path, b"other").read() == []


@pytest.mark.parametrize("left", range(1, RECORD_BYTES))
def test_a_record_cut_short_costs_itself_alone(tmp_path: Path, left: int) -> None:
    path = tmp_path / JOURNAL_NAME
    whole = b"".join(to_record(KEY, span) for span in SPANS)
    path.write_bytes(whole[: 2 * RECORD_BYTES + left])
    journal = Journal(tmp_path, KEY)
    assert journal.read() == SPANS[:2]
    journal.append(SPANS[2])
    assert journal.read() == SPANS


def test_a_damaged_record_costs_itself_alone() -> None:
    data = bytearray(b"".join(to_record(KEY, span) for span in SPANS))
    data[RECORD_BYTES + 3] ^= 1
    assert list(parse_records_untrusted(KEY, bytes(data))) == [SPANS[0], SPANS[2]]


@given(st.binary(max_size=300))
def test_noise_tells_nothing(data: bytes) -> None:
    assert list(parse_records_untrusted(KEY, data)) == []
