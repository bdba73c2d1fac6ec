from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from meshnode.engine.load_report import LoadProgress, LoadReport, ServerLoad

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
