"""`mesh trace`, from the command line: what it prints, writes and refuses."""

from __future__ import annotations

import io
import json
import os
import sys
import tracemalloc
from pathlib import Path
from xml.etree import ElementTree

import pytest

from meshnode.cli.commands import run as run_mesh
from meshnode.trace.reading import choose
from tests.meshnode.trace.writing import typical_run

USAGE, RESOURCES = 2, 7


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    paths = []
    for name, data in zip(("client", "first", "second"), typical_run().encode(), strict=True):
        path = tmp_path / f"{name}.tsv"
        path.write_bytes(data)
        paths.append(str(path))
    return paths


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = USAGE) -> str:
    """The one sentence of a command that is refused."""
    assert run_mesh(["trace", *arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err.strip()


def test_a_token_is_shown_with_its_table(
    files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_mesh(["trace", *files]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("decode 4 of 6 (1 token): 11.10 ms\nthe client works 3.100 ms")
    for words in ("server 201", "median of 5", "GRAPH_AGAIN", "on the way"):
        assert words in shown
    assert "note:" not in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_the_load_is_shown_with_its_round_trips(
    files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_mesh(["trace", "--load", *files]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("load, from the start to the first decode: 8.100 ms")
    assert [line.split()[1:6] for line in shown.splitlines()[-2:]] == [
        ["0", "client", "wait", "FACTS", "4.000"],
        ["1", "client", "wait", "FACTS", "4.000"],
    ]


def test_servers_alone_have_neither_split_nor_table(
    files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_mesh(["trace", *files[1:]]) == 0
    shown = capsys.readouterr().out
    assert "server 200 0" in shown
    assert "messages sent" not in shown


def test_a_program_reads_one_object(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_mesh(["trace", "--json", "--token", "1", *files]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["shown"]["decode"]["batch"] == 16
    assert facts["typical"]["round_trips"] == 2
    assert facts["hops"]["0"]["requests"] == 2
    assert [file["role"] for file in facts["files"]] == ["client", "server", "server"]


def test_a_drawing_goes_into_a_file(files: list[str], tmp_path: Path) -> None:
    svg = tmp_path / "out.svg"
    assert run_mesh(["trace", "--svg", str(svg), *files]) == 0
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")


def test_a_terminal_without_blocks_gets_other_signs(
    files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", plain)
    assert run_mesh(["trace", *files]) == 0
    shown = plain.buffer.getvalue().decode()
    assert "client                      ######" in shown


def test_a_trace_that_is_being_written_is_read_to_its_last_whole_line(
    files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(files[0])
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines()[-1][:9])
    assert run_mesh(["trace", *files]) == 0
    shown = capsys.readouterr().out
    assert f"note: {path}: its last line has no end" in shown


def test_a_file_that_grows_between_its_two_readings_is_read_as_it_was(
    files: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(files[0])
    whole = path.read_bytes()

    def choose_while_it_grows(*given: object, **named: object) -> object:
        path.write_bytes(whole + whole + b"rubbish\n" * 1000)
        return choose(*given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr("meshnode.cli.trace.choose", choose_while_it_grows)
    assert run_mesh(["trace", *files]) == 0
    assert capsys.readouterr().out.startswith("decode 4 of 6 (1 token): 11.10 ms")


# -- what is no trace -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"hello\nworld\n", "is no trace"),
        (os.urandom(100_000), "is no trace"),
        (b"\x00" * 5_000_000, "is no trace"),
        (b"mesh-rpc-trace\t9\tclient\t1\t1\n", "is a trace of version 9"),
    ],
)
def test_what_is_no_trace_is_refused_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: bytes, words: str
) -> None:
    path = tmp_path / "x.tsv"
    path.write_bytes(data)
    said = refusal(capsys, str(path))
    assert said.startswith(f"mesh: {path} {words}")
    assert len(said.splitlines()) == 1


def test_what_is_no_file_is_refused_before_it_is_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert "is no regular file: a trace is read twice" in refusal(capsys, str(fifo))
    assert "is a folder" in refusal(capsys, str(tmp_path))
    assert "No such file" in refusal(capsys, str(tmp_path / "none\x1b[2J"))
    assert "\x1b" not in refusal(capsys, str(tmp_path / "none\x1b[2J"))
    assert "no regular file" in refusal(capsys, "/dev/zero")


def test_what_cannot_be_had_is_said(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "no decode 7 in this trace: it has 6" in refusal(capsys, "--token", "7", *files)
    assert "give one of them" in refusal(capsys, "--token", "1", "--load", *files)
    assert "2 of these are traces of clients" in refusal(capsys, files[0], files[0])
    assert "too many" in refusal(capsys, *files[:1] * 257)
    assert "one of the traces" in refusal(capsys, "--svg", files[1], *files)
    said = refusal(capsys, "--svg", "/nowhere/x.svg", *files, code=RESOURCES)
    assert "cannot be written (No such file or directory)" in said
    assert Path(files[1]).read_bytes().startswith(b"mesh-rpc-trace"), "the trace is still there"


HEADER = b"mesh-rpc-trace\t1\tclient\t7\t1790000000000000000\n"
MOST = b"9" * 18


@pytest.mark.parametrize(
    "lines",
    [
        b"\t".join([MOST, MOST, b"send", b"X", MOST, MOST, MOST]) + b"\n",
        b"0\t0\tmark\tdecode\t0\t" + MOST + b"\t" + MOST + b"\n",
        b"5\t0\tmark\tdecode\t0\t1\t0\n3\t0\tmark\tdecode\t0\t1\t0\n1\t0\twait\tX\t0\t0\t9\n",
        b"0\t0\tmark\tdecode\t0\t0\t0\n",
        b"\n" * 1000,
        b"\xff" * 100_000 + b"\n5\t0\tsend\t\x1b[2J\t0\t1\t0\n",
        b"".join(b"%d\t%d\te%d\tc%d\t0\t1\t1\n" % (n, n, n, n) for n in range(3000)),
    ],
)
@pytest.mark.parametrize("wish", [(), ("--load",), ("--json",)])
def test_a_hostile_trace_is_shown_for_what_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: bytes, wish: tuple[str, ...]
) -> None:
    path = tmp_path / "x.tsv"
    path.write_bytes(HEADER + lines)
    svg = tmp_path / "x.svg"
    assert run_mesh(["trace", "--svg", str(svg), *wish, str(path)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    ElementTree.parse(svg)
    if "--json" in wish:
        json.loads(shown)
    else:
        notes = [line for line in shown.splitlines() if not line.startswith("note:")]
        assert max(map(len, notes)) <= 130, "what is beyond 30 years is wide"


def test_a_trace_of_any_size_is_read_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshnode.cli.trace.CHUNK_BYTES", 1 << 14)
    monkeypatch.setattr("meshnode.trace.spans.MAX_PENDING", 500)
    monkeypatch.setattr("meshnode.trace.scene.MAX_RECORDS", 500)
    path = tmp_path / "x.tsv"
    peaks = []
    for lines in (2_000, 20_000):
        events = (b"%d\t0\tsend\tX\t%d\t1\t0\n" % (at, at) for at in range(lines))
        path.write_bytes(HEADER + b"".join(events))
        tracemalloc.start()
        try:
            assert run_mesh(["trace", "--svg", str(tmp_path / "x.svg"), str(path)]) == 0
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]
