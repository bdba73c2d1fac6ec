"""`just engine-sanitize`: the engine's tests against sanitized builds of it.

    python -m tests.engine.sanitizers.run [--only address|thread] [--shipped-client] [--write]
                                          [-- PYTEST ARGUMENTS …]

Each sanitizer's engine is built (a quarter of an hour, once), tests/engine runs with its
llama-server and ggml-rpc-server, then llama.cpp's own tests of two servers at once and of
operations, both ends sanitized, through a tunnel. --shipped-client: llama-server is the one that
nodes run, which spares most of the building. A report of a sanitizer counts, whether or not a
test failed by it. --write puts the result into docs/sanitizers.md. Exit status 1 when not clean.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from meshnode.engine.build import find_engine
from meshnode.engine.errors import EngineMissing
from tests.engine.ops.cases import smallest
from tests.engine.ops.run import run_ops
from tests.engine.processes import rpc_server
from tests.engine.sanitizers.build import SanitizedEngine, Sanitizer, build_sanitized
from tests.engine.sanitizers.page import write_page

REPOSITORY = Path(__file__).resolve().parents[3]
# What these measure an instrumented program does not have: its own memory and speed.
LEFT_OUT = {
    "test_fuzz_engine.py": "sanitized by itself",
    "test_engine_ops.py": "sanitized by itself; here the whole selection follows",
    "test_bytes_read.py": "counts what a process reads and holds",
    "test_kept_graphs.py::test_graphs_of_more_than_512_mib_are_not_kept": "counts what it holds",
    "test_push_sockets.py::test_pushes_that_nobody_takes_are_kept_up_to_a_bound": "counts too",
}
_COUNTS = re.compile(r"(\d+) (passed|failed|error|skipped|deselected)")


@dataclass(frozen=True)
class Sanitation:
    """`reports`: each different one, its first lines."""

    sanitizer: Sanitizer
    engine: SanitizedEngine
    tests: Mapping[str, int]
    two_servers: bool
    operations: int
    operations_failed: int
    reports: tuple[str, ...]
    minutes: float

    @property
    def clean(self) -> bool:
        bad = self.tests.get("failed", 0) + self.tests.get("error", 0) + self.operations_failed
        ran = bool(self.tests.get("passed")) and bool(self.operations)
        return ran and bad == 0 and self.two_servers and not self.reports


def environment(sanitizer: Sanitizer, reports: Path) -> dict[str, str]:
    """Reports go to files: what a test makes of a program's end does not hide them."""
    if sanitizer is Sanitizer.THREAD:
        options = f"log_path={reports}/thread:halt_on_error=0:second_deadlock_stack=1"
        return {"TSAN_OPTIONS": options}
    # what the backends keep until the end is no leak
    options = f"log_path={reports}/address:detect_leaks=0:allocator_may_return_null=1"
    undefined = f"log_path={reports}/undefined:print_stacktrace=1"
    return {"ASAN_OPTIONS": options, "UBSAN_OPTIONS": undefined}


def sanitize(sanitizer: Sanitizer, arguments: Sequence[str], *, own_client: bool) -> Sanitation:
    shipped = find_engine()
    if shipped is None:
        raise EngineMissing
    engine = build_sanitized(sanitizer, own_client=own_client, shipped=shipped)
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="mesh-sanitize-", dir="/tmp"))
    try:
        settings = environment(sanitizer, folder)
        tests = _run_tests(engine, settings, arguments)
        two_servers = _run_two_servers(engine, folder, settings)
        outcome = trio.run(
            lambda: run_ops(
                engine.folder / "test-backend-ops",
                engine.folder,
                link="tcp",
                choose=smallest,
                environment=settings,
                show=lambda line: print(line, flush=True),
            )
        )
        return Sanitation(
            sanitizer=sanitizer,
            engine=engine,
            tests=tests,
            two_servers=two_servers,
            operations=len(outcome.passed),
            operations_failed=len(outcome.failed) + (not outcome.server_lived),
            reports=different_reports(folder),
            minutes=(time.monotonic() - began) / 60,
        )
    finally:
        shutil.rmtree(folder)


def _run_tests(
    engine: SanitizedEngine, settings: Mapping[str, str], arguments: Sequence[str]
) -> dict[str, int]:
    command = [sys.executable, "-m", "pytest", "-q", "-k", "not sanitized", "tests/engine"]
    command += [f"--deselect=tests/engine/{name}" for name in LEFT_OUT]
    run = subprocess.run(
        [*command, *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **settings, "MESH_TEST_ENGINE": str(engine.folder)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(run.stdout, flush=True)
    return read_counts(run.stdout)


def read_counts(said: str) -> dict[str, int]:
    """Of pytest's last line; {} where no test ran."""
    last = said.strip().rpartition("\n")[2]
    return {word: int(count) for count, word in _COUNTS.findall(last)}


def _run_two_servers(engine: SanitizedEngine, folder: Path, settings: Mapping[str, str]) -> bool:
    """llama.cpp's test-rpc-multi-server: a tensor of one server means nothing to the other."""
    env = dict(settings)
    with (
        rpc_server(engine.folder, folder, name="a", env=env) as first,
        rpc_server(engine.folder, folder, name="b", env=env) as second,
    ):
        run = subprocess.run(
            [str(engine.folder / "test-rpc-multi-server"), first.address, second.address],
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            check=False,
        )
        lived = first.alive and second.alive
    return run.returncode == 0 and lived


def different_reports(folder: Path) -> tuple[str, ...]:
    """One of each kind: of equal summaries the first."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.*")):
        if not path.name.startswith(("thread.", "address.", "undefined.")):
            continue
        text = path.read_text(errors="replace")
        for part in re.split(r"^={18}$", text, flags=re.MULTILINE):
            if "SUMMARY: " in part or "runtime error: " in part:
                found.setdefault(_summary(part), part.strip())
    return tuple(found.values())


def _summary(report: str) -> str:
    line = re.search(r"SUMMARY: (.+)|(\S+: runtime error: .+)", report)
    return line[0] if line else report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=[one.value for one in Sanitizer])
    parser.add_argument("--shipped-client", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("arguments", nargs="*", help="for pytest")
    options = parser.parse_args()
    chosen = [Sanitizer(options.only)] if options.only else list(Sanitizer)
    own_client = not options.shipped_client
    results = [sanitize(one, options.arguments, own_client=own_client) for one in chosen]
    for result in results:
        for report in result.reports:
            print(report, end="\n\n")
        print(
            f"{result.sanitizer.value}: {dict(result.tests)}, {result.operations} operations "
            f"passed, {len(result.reports)} different reports, {result.minutes:.0f} minutes"
        )
    if options.write:
        write_page(results, LEFT_OUT)
    return 0 if all(result.clean for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
