"""`./just bench pull`: the same ranges of a file on a local nginx, fetched by curl and by mesh.

By turns, into new files on the same disk each time, nothing flushed and nothing digested: what is
compared is the way of the bytes. curl writes each range to a file of its own (it cannot write into
the middle of one), mesh all into one sparse file. The start of curl counts (some 20 ms), that of
Python does not; mesh's first look at the file does.
"""

from __future__ import annotations

import datetime
import os
import shutil
import ssl
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import trio

from meshnode.models.pull.opening import open_reference
from meshnode.models.pull.pull import Pull, Supply
from meshnode.models.pull.reach import Reach, welcome
from meshnode.models.pull.reference import parse_reference
from meshnode.models.spans import Span, size_of
from tests.bench.benchmarks_page import put
from tests.bench.engine_tables import count_rounds
from tests.bench.processes import verdict
from tests.lab.certificate import certificate_for_loopback
from tests.lab.nginx import nginx_program, running_nginx

TO_REACH = 0.80
FILE_BYTES = 1 << 30
GAP_BYTES = 1 << 20


@dataclass(frozen=True)
class Case:
    title: str
    connections: int
    is_secure: bool = False


CASES = (
    Case("one connection", 1),
    Case("four connections", 4),
    Case("one connection, TLS", 1, is_secure=True),
    Case("four connections, TLS", 4, is_secure=True),
)


@dataclass(frozen=True)
class Round:
    """Bytes a second."""

    curl: float
    mesh: float


class SparseFile:
    """A sink that only writes."""

    def __init__(self, path: Path, size_bytes: int, *, is_new: bool = True) -> None:
        self._fd = os.open(path, os.O_RDWR | (os.O_CREAT | os.O_EXCL if is_new else 0))
        os.ftruncate(self._fd, size_bytes)

    def write(self, file_index: int, offset: int, data: memoryview) -> None:
        while data:
            written = os.pwrite(self._fd, data, offset)
            data, offset = data[written:], offset + written

    def done(self, file_index: int, start: int, stop: int) -> Sequence[Span]:
        return ()

    def missing(self, tensors: Iterable[str]) -> tuple[Span, ...]:
        raise NotImplementedError

    def close(self) -> None:
        os.close(self._fd)


def wanted_spans(size_bytes: int) -> list[Span]:
    """Four quarters with holes between them, as the layers of four shares."""
    quarter = size_bytes // 4
    return [Span(0, at, at + quarter - GAP_BYTES) for at in range(0, size_bytes, quarter)]


@dataclass(frozen=True)
class Place:
    """What to fetch, and with what. `trusted` is the server's certificate, or None without TLS."""

    url: str
    folder: Path
    curl: str
    trusted: Path | None


def curl_s(place: Place, spans: Sequence[Span], connections: int, into: Path) -> float:
    common = ["--silent", "--fail", *(("--cacert", str(place.trusted)) if place.trusted else ())]
    words = [place.curl, "--no-progress-meter", *common]
    if connections > 1:
        words += ["--parallel", "--parallel-immediate", "--parallel-max", str(connections)]
    for number, span in enumerate(spans):
        words += ["--next", *common] if number else []
        words += ["--range", f"{span.start}-{span.stop - 1}", "--output", str(into / str(number))]
        words.append(place.url)
    began = time.monotonic()
    subprocess.run(words, check=True, stderr=subprocess.DEVNULL)
    took_s = time.monotonic() - began
    assert sum(path.stat().st_size for path in into.iterdir()) == size_of(spans)
    return took_s


def mesh_s(place: Place, spans: Sequence[Span], connections: int, into: Path) -> float:
    trusted = ssl.create_default_context(cafile=place.trusted) if place.trusted else None
    reach = Reach(welcome, welcome, trusted=trusted)

    async def pull() -> None:
        async with open_reference(parse_reference(place.url), reach) as source:
            await Pull(spans, [Supply(source, connections)], sink).run()

    sink = SparseFile(into / "model", FILE_BYTES)
    try:
        began = time.monotonic()
        trio.run(pull)
        return time.monotonic() - began
    finally:
        sink.close()


def measure(place: Place, case: Case, is_curl_first: bool) -> Round:
    spans = wanted_spans(FILE_BYTES)
    seconds = {}
    for name in ("curl", "mesh") if is_curl_first else ("mesh", "curl"):
        os.sync()  # or the second pays for what the first has left to be written
        with tempfile.TemporaryDirectory(dir=place.folder) as scratch:
            take_s = curl_s if name == "curl" else mesh_s
            seconds[name] = take_s(place, spans, case.connections, Path(scratch))
    size_bytes = size_of(spans)
    return Round(size_bytes / seconds["curl"], size_bytes / seconds["mesh"])


def outcome(case: Case, rounds: int, folder: Path, nginx: str, curl: str) -> tuple[str, float]:
    """A row of the table, and the median ratio."""
    certified = certificate_for_loopback(folder) if case.is_secure else None
    trusted = certified.certificate if certified else None
    with (
        tempfile.TemporaryDirectory(dir=folder) as scratch,
        running_nginx(nginx, folder / "served", Path(scratch), certified) as url,
    ):
        place = Place(f"{url}model.gguf", folder / "got", curl, trusted)
        warm = [measure(place, case, bool(turn % 2)) for turn in range(rounds + 1)][1:]
    ratio = statistics.median(one.mesh / one.curl for one in warm)
    curl_mb, mesh_mb = (
        statistics.median(getattr(one, who) for one in warm) / 1e6 for who in ("curl", "mesh")
    )
    return f"| {case.title} | {curl_mb:.0f} MB/s | {mesh_mb:.0f} MB/s | {ratio:.2f} |", ratio


def pull_rows(rounds: int) -> list[str]:
    nginx, curl = nginx_program(), shutil.which("curl")
    if nginx is None or curl is None:
        raise click.ClickException("needs nginx and curl: sudo apt-get install nginx-light curl")
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="mesh-bench-pull-") as name:
        folder = Path(name)
        for part in ("served", "got"):
            (folder / part).mkdir()
        with (folder / "served" / "model.gguf").open("wb") as file:
            for _ in range(FILE_BYTES >> 24):
                file.write(os.urandom(1 << 24))
        outcomes = [outcome(case, rounds, folder, nginx, curl) for case in CASES]
    today = datetime.datetime.now(datetime.UTC).date()
    beside = f"; other programs beside it (load {load:.0f})" if load >= 1 else ""
    return [
        f"{today}; {count_rounds(rounds)} by turns, medians{beside}.",
        "",
        f"| {FILE_BYTES >> 20} MiB less four holes, nginx on loopback | curl | mesh | ratio |",
        "|---|---|---|---|",
        *(row for row, _ in outcomes),
        "",
        verdict("pull, of curl's speed", min(one for _, one in outcomes), at_least=TO_REACH),
    ]


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=5)
@click.option("--write", is_flag=True, help="Put the result into docs/benchmarks.md.")
def pull(rounds: int, write: bool) -> None:
    """Pulling from a web server, beside curl, and from a member, beside the link."""
    from tests.bench.peer_speed import peer_rows

    text = "\n".join([*pull_rows(rounds), *peer_rows(rounds)])
    click.echo(text)
    if write:
        put("pull", text)


if __name__ == "__main__":
    pull()
