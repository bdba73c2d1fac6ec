"""The bytes of a trace, whatever they are."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from meshnode.trace.records import (
    MAX_LINE_BYTES,
    MAX_WORD_CHARS,
    Header,
    NotATrace,
    Record,
    Role,
    TraceReader,
)
from tests.meshnode.trace.writing import START_NS, typical_run

HEADER = b"mesh-rpc-trace\t1\tclient\t7\t1790000000000000000\n"
LINE = b"5\t0\tsend\tINPUT\t3\t100\t0\n"
SENT = Record(5, 0, "send", "INPUT", 3, 100, 0)


def read(data: bytes) -> tuple[TraceReader, list[Header | Record]]:
    reader = TraceReader()
    return reader, list(reader.receive(data))


def test_a_header_and_an_event() -> None:
    reader, items = read(HEADER + LINE)
    assert items == [Header(Role.CLIENT, 7, START_NS), SENT]
    assert (reader.broken_lines, reader.is_cut_off, reader.runs) == (0, False, 1)
    assert SENT.end_ns == 5


def test_what_has_no_number_has_a_hyphen() -> None:
    _, items = read(HEADER + b"5\t-\twrite\t-\t-\t9\t7\n")
    assert items[1] == Record(5, 0, "write", "-", 0, 9, 7)


def test_the_first_event_may_be_older_than_the_traces_clock() -> None:
    _, items = read(HEADER + b"-80\t0\topen\tunix:/a\t0\t0\t0\n")
    assert items[1] == Record(-80, 0, "open", "unix:/a", 0, 0, 0)


def test_what_we_do_not_know_is_kept_and_so_are_lines_that_grew() -> None:
    _, items = read(HEADER + b"5\t0\tdance\tTANGO\t3\t100\t0\tmore\tand more\n")
    assert items[1] == Record(5, 0, "dance", "TANGO", 3, 100, 0)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"x",
        b"5\t0\tsend\tINPUT\t3\t100",
        b"--5\t0\tsend\tINPUT\t3\t100\t0",
        b"5\t-1\tsend\tINPUT\t3\t100\t0",
        b"5\t0\t\tINPUT\t3\t100\t0",
        b"1e3\t0\tsend\tINPUT\t3\t100\t0",
        b"9999999999999999999\t0\tsend\tINPUT\t3\t100\t0",
        b"5\t0\tsend\tINPUT\t3\t1_0\t0",
        b"5\t0\tsend\t" + b"x" * MAX_LINE_BYTES + b"\t3\t10\t0",
        b"\x00\xff\xfe",
    ],
)
def test_a_broken_line_is_counted_and_the_next_one_read(line: bytes) -> None:
    reader, items = read(HEADER + line + b"\n" + LINE)
    assert items[1:] == [SENT]
    assert reader.broken_lines == 1


def test_a_line_without_end_is_given_up_in_bounded_memory() -> None:
    reader = TraceReader()
    list(reader.receive(HEADER))
    for _ in range(100):
        assert list(reader.receive(b"x" * MAX_LINE_BYTES)) == []
        assert len(reader._pending) <= MAX_LINE_BYTES
    assert reader.is_cut_off
    assert list(reader.receive(b"x\n" + LINE)) == [SENT]
    assert (reader.broken_lines, reader.is_cut_off) == (1, False)


def test_no_escape_sequence_reaches_the_terminal() -> None:
    _, items = read(HEADER + b"5\t0\topen\tunix:/\x1b[2J\xff" + b"y" * 500 + b"\t3\t100\t0\n")
    record = items[1]
    assert isinstance(record, Record)
    assert record.command.startswith("unix:/�[2J�yyy")
    assert len(record.command) == MAX_WORD_CHARS


def test_a_half_line_is_the_last_one() -> None:
    reader, items = read(HEADER + LINE + b"6\t0\tse")
    assert items[1:] == [SENT]
    assert reader.is_cut_off
    assert reader.broken_lines == 0


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"GGUF\x03\x00\x00\x00\n", "is no trace"),
        (b"\x00" * 5000, "is no trace"),
        (b"mesh-rpc-trace\n", "is no trace"),
        (b"mesh-rpc-trace\t1\tclient\t7\n", "is no trace"),
        (b"mesh-rpc-trace\t2\tclient\t7\t8\n", "version 2"),
        (b"mesh-rpc-trace\t1\tgod\t7\t8\n", "first line makes no sense"),
        (b"mesh-rpc-trace\t1\tclient\tx\t8\n", "first line makes no sense"),
        (b"hello", "is no trace"),
        (b"", "is empty"),
        (HEADER[:-1], "is empty"),
    ],
)
def test_what_is_no_trace_is_refused_in_a_sentence(data: bytes, words: str) -> None:
    def read_all() -> None:
        reader, _ = read(data)
        reader.finish()

    with pytest.raises(NotATrace, match=words):
        read_all()


def test_a_second_run_begins_with_a_header_of_its_own() -> None:
    reader, items = read(HEADER + LINE + HEADER.replace(b"7", b"8") + LINE)
    assert [type(item) for item in items] == [Header, Record, Header, Record]
    assert reader.runs == 2


@given(st.lists(st.binary(max_size=60)))
@example([b"mesh-rpc-trace\n"])
def test_nothing_in_a_file_can_raise_anything_else(chunks: list[bytes]) -> None:
    reader = TraceReader()
    list(reader.receive(HEADER))
    try:
        for chunk in chunks:
            list(reader.receive(chunk))
    except NotATrace:
        pass  # another run's header that makes no sense


@given(st.integers(min_value=1, max_value=300))
def test_it_does_not_matter_where_the_reads_fall(size: int) -> None:
    data = typical_run().encode()[0]
    reader, items = TraceReader(), list[Header | Record]()
    for start in range(0, len(data), size):
        items += reader.receive(data[start : start + size])
    reader.finish()
    assert items == read(data)[1]
