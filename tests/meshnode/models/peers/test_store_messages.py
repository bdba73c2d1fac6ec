"""What members say of the parts of models they hold: whole, or refused."""

from __future__ import annotations

import tracemalloc
from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.errors import BadMessage
from meshnode.models.peers.pace import Pace
from meshnode.models.peers.protocol import (
    MAX_READ_BYTES,
    MAX_SPANS,
    Holding,
    HoldsRequest,
    ReadRequest,
    parse_holding_untrusted,
    parse_read_answer_untrusted,
    parse_request_untrusted,
)
from meshnode.models.spans import Span

IDENTITY = "0f" * 32
READ = ReadRequest(IDENTITY, 1, 10, 20)
HOLDING = Holding(
    (("a.gguf", 100), ("b.gguf", 50)), "etag:1\netag:2", (Span(0, 0, 30), Span(1, 5, 50))
)


def over_the_wire(message: dict[str, Any]) -> dict[str, Any]:
    arrived: dict[str, Any] = cbor2.loads(cbor2.dumps(message))
    return arrived


def test_every_message_survives_the_wire() -> None:
    for request in (HoldsRequest(IDENTITY), READ):
        assert parse_request_untrusted(over_the_wire(request.to_message())) == request
    for holding in (HOLDING, Holding()):
        assert parse_holding_untrusted(over_the_wire(holding.to_message())) == holding
    assert parse_read_answer_untrusted({"bytes": 10}, 10) is None
    assert parse_read_answer_untrusted({"refused": "gone\x1b"}, 10) == "gone?"


@pytest.mark.parametrize(
    "change",
    [
        {"op": "write"},
        {"op": None},
        {"identity": bytes(31)},
        {"identity": IDENTITY},
        {"file": -1},
        {"file": 1000},
        {"start": None},
        {"start": True},
        {"start": 20},
        {"stop": 2**64},
        {"stop": 11 + MAX_READ_BYTES},
    ],
)
def test_a_question_of_a_wrong_shape_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BadMessage):
        parse_request_untrusted(READ.to_message() | change)


def packed(*row: int) -> bytes:
    index, start, stop = row
    return index.to_bytes(4, "little") + start.to_bytes(8, "little") + stop.to_bytes(8, "little")


@pytest.mark.parametrize(
    "change",
    [
        {"files": None},
        {"files": [["a.gguf", 1]] * 1000},
        {"files": ["a.gguf"]},
        {"files": [["a.gguf"]]},
        {"files": [["", 100], ["b.gguf", 50]]},
        {"files": [["a" * 256, 100], ["b.gguf", 50]]},
        {"files": [[7, 100], ["b.gguf", 50]]},
        {"files": [["a.gguf", -1], ["b.gguf", 50]]},
        {"validator": None},
        {"validator": "x" * (256 * 1024 + 1)},
        {"spans": [0]},
        {"spans": bytes(19)},
        {"spans": packed(0, 0, 1) * (2**16 + 1)},
        {"spans": packed(2, 0, 1)},
        {"spans": packed(0, 0, 101)},
        {"spans": packed(0, 5, 5)},
    ],
)
def test_a_holding_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BadMessage):
        parse_holding_untrusted(HOLDING.to_message() | change)


def test_many_pieces_take_no_more_memory_than_on_the_wire() -> None:
    pieces = b"".join(packed(0, 2 * at, 2 * at + 1) for at in range(MAX_SPANS))
    message = {"files": [["a.gguf", 2 * MAX_SPANS]], "validator": "", "spans": pieces}
    tracemalloc.start()
    try:
        holding = parse_holding_untrusted(message)
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most_bytes < 1.1 * len(pieces)
    assert holding.spans[-1] == Span(0, 2 * MAX_SPANS - 2, 2 * MAX_SPANS - 1)
    assert list(holding.spans[1:3]) == [Span(0, 2, 3), Span(0, 4, 5)]


@pytest.mark.parametrize("answer", [{}, {"bytes": 9}, {"bytes": "10"}, {"refused": 7}])
def test_other_bytes_than_were_asked_for_are_refused(answer: dict[str, Any]) -> None:
    with pytest.raises(BadMessage):
        parse_read_answer_untrusted(answer, 10)


def test_true_is_not_one_byte() -> None:
    with pytest.raises(BadMessage):
        parse_read_answer_untrusted({"bytes": True}, 1)


@given(
    st.dictionaries(
        st.sampled_from(["op", "identity", "file", "start", "stop", "files", "spans", "validator"]),
        st.one_of(st.integers(), st.binary(max_size=40), st.text(max_size=5), st.none()),
    )
)
def test_no_message_upsets_the_parsers(message: dict[str, Any]) -> None:
    for parse in (parse_request_untrusted, parse_holding_untrusted):
        try:
            parse(message)
        except BadMessage:
            continue


def test_bytes_leave_at_their_pace_and_nothing_is_saved_up() -> None:
    pace = Pace(100.0)
    assert [pace.take(50, now=0.0) for _ in range(3)] == [0.0, 0.5, 1.0]
    assert pace.take(50, now=10.0) == 10.0
    assert pace.take(50, now=10.0) == 10.5


def test_without_a_limit_they_leave_at_once() -> None:
    pace = Pace(None)
    assert [pace.take(10**9, now=1.0) for _ in range(3)] == [1.0, 1.0, 1.0]
