"""Which decode an event belongs to, and what is typical."""

from __future__ import annotations

from itertools import count

import pytest

from meshnode.trace import spans as spans_module
from meshnode.trace.records import Record
from meshnode.trace.spans import OTHER, Decode, Depth, Spans, Tally

MS = 10**6


def send(t_ms: float, command: str = "INPUT", size_bytes: int = 10) -> Record:
    return Record(int(t_ms * MS), 0, "send", command, 0, size_bytes, 0)


def mark(t_ms: float, dur_ms: float, batch: int = 1) -> Record:
    return Record(int(t_ms * MS), 0, "mark", "decode", 0, batch, int(dur_ms * MS))


def spans_of(*records: Record) -> Spans:
    spans = Spans()
    for record in records:
        spans.take(record)
    spans.finish()
    return spans


def test_each_event_belongs_to_the_decode_that_began_last() -> None:
    spans = spans_of(
        *(send(1, "ALLOC"), send(10), send(12), mark(9, 5)),
        *(send(15, "FREE"), send(21), mark(20, 6), send(30), send(31), send(32), mark(30, 7)),
    )
    assert spans.load.sends == {"ALLOC": 1}
    assert spans.decodes == 3
    typical = spans.typical()
    assert typical
    assert (typical.decodes, typical.messages, typical.bytes_up) == (3, 3, 30)
    assert typical.sends == {"INPUT": 2, "FREE": 0}, "medians of 2, 1, 3 and of 1, 0, 0"
    assert spans.median_decode() == Decode(2, 1, 20 * MS, 6 * MS)


def test_the_usual_size_of_a_batch_is_what_is_typical() -> None:
    spans = spans_of(mark(0, 90, 512), mark(100, 2), mark(110, 4), mark(120, 3), mark(130, 50, 8))
    typical = spans.typical()
    assert typical
    assert (typical.batch, typical.decodes, typical.dur_ns) == (1, 3, 3 * MS)
    assert spans.median_decode() == Decode(4, 1, 120 * MS, 3 * MS)
    assert spans.decode(1) == Decode(1, 512, 0, 90 * MS)
    assert spans.decode(9) is None


def test_without_a_decode_all_is_load() -> None:
    spans = spans_of(send(1), send(2))
    assert spans.load.messages == 2
    assert (spans.typical(), spans.median_decode(), spans.decode(1)) == (None, None, None)


def test_another_mark_is_an_event_like_others() -> None:
    spans = spans_of(Record(5, 0, "mark", "sampled", 0, 1, 0), mark(1, 1))
    assert (spans.decodes, spans.load.messages) == (1, 0)


def test_a_tally_counts_what_the_client_did() -> None:
    tally = Tally()
    for event, dur_ns in (("send", 0), ("reply", 0), ("write", 5), ("wait", 7), ("open", 0)):
        tally.add(Record(0, 0, event, "GET", 0, 100, dur_ns))
    assert (tally.messages, tally.bytes_up, tally.bytes_down, tally.writes) == (1, 100, 100, 1)
    assert (tally.wait_ns, tally.round_trips, tally.waits) == (7, 1, {"GET": 1})


def test_a_mark_whose_time_runs_backwards_takes_nothing_from_the_load() -> None:
    spans = spans_of(send(5), mark(10, 1), send(11), mark(3, 1), send(12))
    assert spans.decodes == 2
    assert spans.load.messages == 1


def test_memory_is_bounded_however_many_events_and_names_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spans_module, "MAX_PENDING", 10)
    monkeypatch.setattr(spans_module, "MAX_COMMANDS", 3)
    monkeypatch.setattr(spans_module, "MAX_BATCHES", 2)
    monkeypatch.setattr(spans_module, "MAX_DECODES", 5)
    spans = Spans()
    names = count()
    for number in range(40):
        spans.take(send(number, f"X{next(names)}"))
        assert len(spans._pending) <= 10
    for number in range(10):
        spans.take(send(100 + number, f"X{next(names)}"))
        spans.take(mark(100 + number, 1, batch=number // 2))
    spans.finish()
    assert spans.load.messages == 40, "none is lost"
    assert set(spans.load.sends) == {"X0", "X1", "X2", OTHER}
    assert spans.decodes == 10
    assert spans.decode(4) is not None
    assert spans.decode(5) is None, "a third size of batch is not kept"
    assert spans.decode(6) is None, "nor is a decode beyond the last that is counted"


def test_of_names_without_end_the_first_ones_have_a_median(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans_module, "MAX_COMMANDS", 2)
    records = [record for at in range(9) for record in (mark(at, 0.1), send(at + 0.5, f"X{at}"))]
    typical = spans_of(*records).typical()
    assert typical
    assert set(typical.sends) == {"X0", "X1"}


def test_what_is_asked_of_several_at_once_is_one_round_trip() -> None:
    depth = Depth()
    for conn in (0, 1):
        depth.send(conn, 1)
        depth.send(conn, 2)
    for conn in (0, 1):
        depth.reply(conn, 1)
        depth.reply(conn, 2)
    assert depth.reached == 1
    depth.send(0, 3)
    depth.send(0, 4)
    depth.reply(0, 3)
    depth.send(0, 5)
    depth.reply(0, 4)
    assert depth.reached == 2, "the fourth was sent without an answer to the third"
    depth.reply(0, 5)
    assert depth.reached == 3


def test_an_answer_to_what_was_asked_before_is_one_round_trip() -> None:
    depth = Depth()
    depth.reply(7, 3)
    assert depth.reached == 1
