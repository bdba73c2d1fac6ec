from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.engine.load_report import LoadProgress, LoadReport, ServerLoad, ServerProgress

LOAD = (
    b'{"event":"load","server":"unix:/a","local_tensors":9,"local_bytes":90,"sent_tensors":1,'
    b'"sent_bytes":10,"failures":0,"first_failure":null}\n'
)
FAILED = (
    b'{"event":"load","server":"unix:/b","local_tensors":0,"local_bytes":0,"sent_tensors":0,'
    b'"sent_bytes":0,"failures":2,'
    b'"first_failure":{"tensor":"blk.0.w","file":"m.gguf","reason":"changed on disk"}}\n'
)


def test_progress_is_told_once_a_whole_line_is_there() -> None:
    report = LoadReport()
    assert report.receive(b'{"event":"progress","done_by') is None
    assert report.receive(b'tes":1,"total_bytes":2}\n') == LoadProgress(1, 2)


def test_each_servers_share_is_kept_and_a_failure_is_a_sentence() -> None:
    report = LoadReport()
    assert report.receive(LOAD + FAILED) is None
    assert report.loads == (
        ServerLoad("unix:/a", 9, 90, 1, 10, 0, None),
        ServerLoad("unix:/b", 0, 0, 0, 0, 2, "blk.0.w of m.gguf: changed on disk"),
    )


def of_server(server: str, done_bytes: int, total_bytes: int) -> bytes:
    event = {"event": "server_progress", "server": server}
    return (
        json.dumps(event | {"done_bytes": done_bytes, "total_bytes": total_bytes}).encode() + b"\n"
    )


def test_each_server_is_as_far_as_its_last_line_says() -> None:
    report = LoadReport()
    report.receive(of_server("unix:/a", 0, 8) + of_server("unix:/b", 0, 4))
    report.receive(b'{"event":"progress","done_bytes":3,"total_bytes":20}\n')
    assert report.receive(of_server("unix:/a", 6, 8)) == LoadProgress(
        3, 20, (ServerProgress("unix:/a", 6, 8), ServerProgress("unix:/b", 0, 4))
    )


def test_without_a_line_of_the_whole_the_servers_are_the_whole() -> None:
    servers = (ServerProgress("unix:/a", 6, 8), ServerProgress("unix:/b", 0, 4))
    lines = of_server("unix:/a", 6, 8) + of_server("unix:/b", 0, 4)
    assert LoadReport().receive(lines) == LoadProgress(6, 12, servers)


@pytest.mark.parametrize("number", ["-1", "1e308", "18446744073709551616", "Infinity", '"x"', "[]"])
def test_a_number_that_counts_no_bytes_is_passed_over(number: str) -> None:
    line = f'{{"event":"progress","done_bytes":1,"total_bytes":{number}}}\n'
    assert LoadReport().receive(line.encode()) is None


def test_lines_of_another_kind_are_passed_over() -> None:
    report = LoadReport()
    report.receive(b'\n[]\n{}\n"x"\n{"event":"song"}\n{"event":"load"}\n\xff\n')
    assert report.loads == ()


@given(st.lists(st.binary(max_size=40)))
def test_nothing_in_the_file_can_raise(chunks: list[bytes]) -> None:
    report = LoadReport()
    for chunk in chunks:
        report.receive(chunk)


@given(st.integers(min_value=1, max_value=len(LOAD + FAILED)))
def test_it_does_not_matter_where_the_reads_fall(size: int) -> None:
    report, data = LoadReport(), LOAD + FAILED
    for start in range(0, len(data), size):
        report.receive(data[start : start + size])
    assert len(report.loads) == 2
