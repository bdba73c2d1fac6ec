"""Whatever comes, fails or lies in whatever order: what is wanted comes once, or nobody has it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from meshnode.models.pull.ranges import (
    Ranges,
    Request,
    Supplier,
)
from meshnode.models.spans import Span, joined, size_of, within


def fetch(ranges: Ranges, request: Request, now: float = 0.0) -> Span:
    ranges.receive(request, request.span.size_bytes, now)
    ranges.finish(request)
    return request.span


SPANS = st.lists(
    st.builds(
        lambda file, start, size: Span(file, start, start + size),
        st.integers(0, 1),
        st.integers(0, 5_000_000),
        st.integers(1, 3_000_000),
    ),
    max_size=6,
)
SUPPLIERS = st.lists(
    st.builds(
        Supplier,
        st.integers(1, 3),
        st.none() | SPANS.map(joined),
        st.integers(0, 2),
        is_far=st.booleans(),
    ),
    min_size=1,
    max_size=4,
)


@given(SPANS, SUPPLIERS, st.data())
def test_whatever_fails_each_wanted_byte_is_fetched_once_or_the_pull_is_stuck(
    wanted: list[Span], suppliers: list[Supplier], data: st.DataObject
) -> None:
    ranges = Ranges(wanted, suppliers, now=0.0, chunk_bytes=data.draw(st.integers(100_000, 10**7)))
    held: list[Span] = []
    running: list[Request] = []
    now, steps = 0.0, 0
    while not ranges.is_over and not ranges.is_stuck:
        now, steps = now + 200.0, steps + 1
        for lane, supplier in enumerate(ranges.lanes):
            if all(request.lane != lane for request in running):
                request = ranges.take(lane, now)
                if isinstance(request, Request):
                    holds = suppliers[supplier].holds
                    assert holds is None or within((request.span,), holds) == (request.span,)
                    running.append(request)
        assert running, "somebody always has something to do"
        request = running.pop(data.draw(st.integers(0, len(running) - 1)))
        if steps < 40 and data.draw(st.booleans()):
            came = data.draw(st.integers(0, request.span.size_bytes))
            ranges.receive(request, came, now)
            kept = ranges.arrived(request)
            ranges.fail(request, now, is_taken_over=data.draw(st.booleans()))
            assert (kept.size_bytes if kept else 0) == came
            held += [kept] if kept else []
        else:
            held.append(fetch(ranges, request, now))
    for request in running:
        held.append(fetch(ranges, request, now))
    fetched = joined(held)
    assert size_of(fetched) == size_of(held), "no byte twice"
    assert ranges.headway(now).done_bytes == size_of(held)
    if ranges.is_over:
        assert within(wanted, fetched) == joined(wanted)


@given(
    st.lists(st.sets(st.integers(0, 9)), max_size=3),
    st.integers(0, 3),
    st.integers(30, 350),
    st.data(),
)
def test_among_liars_one_honest_supplier_is_enough(
    lies: list[set[int]], honest: int, chunk_bytes: int, data: st.DataObject
) -> None:
    """`lies`: of each liar, the tensors of which it gives other bytes."""
    lies.insert(min(honest, len(lies)), set())
    honest = lies.index(set())
    ranges = Ranges([Span(0, 0, 1000)], [Supplier(2)] * len(lies), 0.0, chunk_bytes)
    is_right: list[bool | None] = [None] * 1000
    running: list[Request] = []
    for steps in range(5000):
        if ranges.is_over:
            break
        for lane in range(len(ranges.lanes)):
            is_free = all(request.lane != lane for request in running)
            if is_free and isinstance(todo := ranges.take(lane, 200.0 * steps), Request):
                running.append(todo)
        assert running, "somebody always has something to do"
        request = running.pop(data.draw(st.integers(0, len(running) - 1)))
        span, supplier = request.span, ranges.lanes[request.lane]
        for at in range(span.start, span.stop):
            is_right[at] = at // 100 not in lies[supplier]
        wrong = []
        for start in range(span.start // 100 * 100, span.stop, 100):
            tensor = is_right[start : start + 100]
            if None not in tensor and not all(tensor):
                is_right[start : start + 100] = [None] * 100
                wrong.append(Span(0, start, start + 100))
        ranges.receive(request, span.size_bytes, 200.0 * steps)
        ranges.finish(request, joined(wrong))
    assert ranges.is_over
    assert all(is_right)
