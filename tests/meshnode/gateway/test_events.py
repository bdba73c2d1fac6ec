"""Events pass whole, unchanged and at once; torn ones wait; timings are found without parsing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.gateway.events import MAX_HELD_BYTES, EventGate, Timings, find_timings

DONE = b"data: [DONE]"


def test_a_whole_event_passes_in_the_call_that_brought_it() -> None:
    gate = EventGate()
    assert gate.feed(b"data: 1\n\n") == b"data: 1\n\n"
    assert gate.flush() == b""


def test_a_torn_event_waits_for_its_end() -> None:
    gate = EventGate()
    assert gate.feed(b"data: 1\n\nda") == b"data: 1\n\n"
    assert gate.feed(b"ta: 2\n") == b""
    assert gate.feed(b"\n:\n") == b"data: 2\n\n"
    assert gate.flush() == b":\n"
    assert gate.flush() == b""


def test_an_event_of_any_size_goes_through_without_filling_the_memory() -> None:
    gate = EventGate()
    assert gate.feed(b"x" * MAX_HELD_BYTES) == b""
    assert len(gate.feed(b"y")) == MAX_HELD_BYTES + 1
    assert gate.feed(b"z\n\n") == b"z\n\n"


@given(st.lists(st.sampled_from([b"data: {}\n\n", b"\n", b"a", b"\n\n", b": ping\n\n", b""])))
def test_no_byte_is_lost_added_or_moved_however_it_is_cut(chunks: list[bytes]) -> None:
    gate = EventGate()
    passed = b"".join(gate.feed(chunk) for chunk in chunks)
    assert passed + gate.flush() == b"".join(chunks)
    assert not passed or passed.endswith(b"\n\n")


@pytest.mark.parametrize(
    ("last", "good"),
    [
        (b"data: [DONE]\n\n", True),
        (b'data: {"error":{"message":"of the server\'s own"}}\n\n', True),
        (b"event: error\ndata: {}\n\n", True),
        (b'data: {"choices":[]}\n\n', False),
        (b'data: "data: [DONE]"\n\n', False),
    ],
)
def test_a_stream_ended_well_only_with_its_mark_or_an_error(last: bytes, good: bool) -> None:
    gate = EventGate()
    gate.feed(b"data: first\n\n" + last)
    assert gate.ended_with(DONE) is good


def test_a_stream_of_nothing_did_not_end_well() -> None:
    assert not EventGate().ended_with(DONE)


def test_timings_of_the_last_event_that_tells_them_count() -> None:
    gate = EventGate()
    gate.feed(b'data: {"timings":{"predicted_n":1,"predicted_ms":10.0}}\n\n')
    gate.feed(b'data: {"timings": {"predicted_n":5,"predicted_ms":250}}\n\n')
    gate.feed(b"data: [DONE]\n\n")
    assert gate.timings() == Timings(tokens=5, seconds=0.25)


def test_generated_text_cannot_pose_as_timings() -> None:
    spoken = rb'{"content":"\"timings\":{\"predicted_n\":9,\"predicted_ms\":1}"}'
    assert find_timings(spoken) is None


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b'"timings":',
        b'"timings":{',
        b'"timings":[]',
        b'"timings":3',
        b'"timings":{"predicted_n":1}',
        b'"timings":{"predicted_n":"x","predicted_ms":1}',
        b'"timings":{"predicted_n":null,"predicted_ms":1}',
        b'"timings":{"predicted_n":Infinity,"predicted_ms":1}',
        b'"timings":' + b"[" * 5000,
        b'"timings":\xff\xfe',
    ],
)
def test_anything_else_is_no_timings(text: bytes) -> None:
    assert find_timings(text) is None
