"""`just fuzz-engine`: N inputs into the message loop, and what came of it.

    python -m tests.engine.fuzz.run [runs=N] [--seed N] [--write] [--record]

--write puts the result into docs/fuzz-engine.json; --record makes the recorded sessions of the
corpus anew (the regressions in it stay). Exit status 1 with the input's path when it found one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

from tests.engine.fuzz.build import Sanitized, build
from tests.engine.fuzz.recording import (
    GET_ALLOC_SIZE,
    INIT_TENSOR,
    SET_TENSOR,
    recording,
    session,
)

REPOSITORY = Path(__file__).resolve().parents[3]
CORPUS = Path(__file__).resolve().parents[1] / "fuzz_corpus"
RESULT = REPOSITORY / "docs" / "fuzz-engine.json"
OPTIONS = (
    "-max_len=65536",
    "-timeout=60",
    "-rss_limit_mb=3000",
    # more than this at once no message may cause, see MESH_MAX_SCRATCH_BYTES
    "-malloc_limit_mb=600",
    "-print_final_stats=1",
)
ENVIRONMENT = {
    # memory that was never written has the same content each time; what is left at the end is the
    # backend, while a connection's leak is looked for after each input
    "ASAN_OPTIONS": "allocator_may_return_null=1:max_malloc_fill_size=10000000:"
    "leak_check_at_exit=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


@dataclass(frozen=True)
class FuzzResult:
    """`coverage` counts edges of the server and the CPU backend, as libFuzzer does."""

    inputs: int
    seconds: int
    coverage: int
    corpus_files: int
    corpus_bytes: int
    finding: str | None
    engine: str
    date: str


def fuzz(sanitized: Sanitized, runs: int, seed: int, *, artifacts: Path) -> tuple[FuzzResult, str]:
    """Run `runs` inputs, shared by one process a core, begun from the committed corpus.

    Returns the result, and the end of the log: of the process that found something, if one did.
    """
    jobs = os.cpu_count() or 1
    begun = time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        outcomes = list(
            pool.map(
                lambda job: _fuzz_alone(sanitized, -(-runs // jobs), seed + job, artifacts),
                range(jobs),
            )
        )
    outcome = next((found for found in outcomes if found.finding is not None), outcomes[0])
    files = [path.stat().st_size for path in CORPUS.iterdir()]
    result = FuzzResult(
        inputs=sum(found.inputs for found in outcomes),
        seconds=round(time.monotonic() - begun),
        coverage=max(found.coverage for found in outcomes),
        corpus_files=len(files),
        corpus_bytes=sum(files),
        finding=outcome.finding,
        engine=sanitized.engine_key,
        date=date.today().isoformat(),
    )
    return result, outcome.log


@dataclass(frozen=True)
class _Outcome:
    inputs: int
    coverage: int
    finding: str | None
    log: str


def _fuzz_alone(sanitized: Sanitized, runs: int, seed: int, artifacts: Path) -> _Outcome:
    with tempfile.TemporaryDirectory() as grown:
        options = [f"-runs={runs}", f"-seed={seed}", f"-artifact_prefix={artifacts}/"]
        process = subprocess.run(
            [str(sanitized.folder / "rpc_fuzzer"), *OPTIONS, *options, grown, str(CORPUS)],
            env={**os.environ, **ENVIRONMENT},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
        )
    log = process.stderr
    done = re.findall(r"stat::number_of_executed_units: (\d+)", log)
    covered = re.findall(r"cov: (\d+)", log)
    found = re.findall(r"Test unit written to (\S+)", log)
    return _Outcome(
        inputs=int(done[-1]) if done else 0,
        coverage=int(covered[-1]) if covered else 0,
        finding=None if process.returncode == 0 else (found[-1] if found else "no input"),
        log=log[-6000:],
    )


def record(sanitized: Sanitized) -> None:
    """Put what llama-server sends to a server into the corpus: a dense model and a mixture."""
    from meshnode.engine.build import find_engine
    from tests.engine.processes import greedy_tokens, llama_server, rpc_server
    from tests.engine.synthetic import make_model

    engine = find_engine()
    assert engine is not None, "./just build first"
    folder = Path(tempfile.mkdtemp(prefix="mesh-", dir="/tmp"))
    small = {"layers": 1, "width": 64, "vocab": 260, "heads": 2, "ffn": 64}
    variants: dict[str, tuple[dict[str, object], list[str]]] = {
        "dense": ({}, []),
        "mixture": ({"experts": 4, "type": "F16"}, []),
        "attention": ({"type": "Q8_0"}, ["-fa", "on", "-ctk", "q8_0", "-ctv", "q8_0"]),
    }
    try:
        for name, (model_options, server_options) in variants.items():
            model = make_model(folder / f"{name}.gguf", **{**small, **model_options})  # type: ignore[arg-type]
            (folder / name).mkdir()
            with (
                rpc_server(engine, folder / name) as server,
                recording(server, folder / name) as (recorded, connections),
                llama_server(
                    engine,
                    folder / name,
                    model,
                    "-b",
                    "32",
                    "-ub",
                    "32",
                    *server_options,
                    rpc=[recorded],
                ) as llama,
            ):
                greedy_tokens(llama)
            for number, connection in enumerate(connections):
                content = session(connection)
                if len(content) > 200:
                    (CORPUS / f"recorded-{name}-{number}").write_bytes(_shortened(content))
    finally:
        shutil.rmtree(folder)


def _shortened(content: bytes, limit_bytes: int = 60_000) -> bytes:
    """Whole messages from the start, the first graphs among them, without large weights and much
    of a kind."""
    at = 0
    kept = b""
    counts = Counter[int]()
    while at < len(content):
        size = 9 + int.from_bytes(content[at + 1 : at + 9], "little")
        message = content[at : at + size]
        at += size
        counts[message[0]] += 1
        if message[0] == SET_TENSOR and size > 4000:
            continue
        if message[0] in {GET_ALLOC_SIZE, INIT_TENSOR} and counts[message[0]] > 2:
            continue
        if len(kept) + size > limit_bytes:
            break
        kept += message
    return kept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="?", default="1000000", help="how many inputs: runs=N or N")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    sanitized = build()
    if options.record:
        record(sanitized)
        return 0
    artifacts = Path(tempfile.mkdtemp(prefix="mesh-fuzz-"))
    result, log = fuzz(
        sanitized, int(options.runs.removeprefix("runs=")), options.seed, artifacts=artifacts
    )
    text = json.dumps(asdict(result), indent=2) + "\n"
    print(text, end="")
    if result.finding is not None:
        print(log, file=sys.stderr)
        return 1
    if options.write:
        RESULT.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
