"""The cases of test-backend-ops: which of them both sides know, and how they are run.

The program is llama.cpp's own, unchanged; `remote.cpp` beside this file makes it know the servers
that MESH_TEST_RPC names. It compares what a device computes with the CPU's reference kernels.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from math import prod
from pathlib import Path

LOCAL, REMOTE = "CPU", "RPC0"
_ROW = re.compile(
    r'"[^"]*","(?P<op>[^"]*)","(?P<params>[^"]*)","(?:test|support)","(?P<yes>[01])",'
    r'"(?P<error>[^"]*)","[^"]*"\n'
)
_FILTER_BYTES = 60_000  # of one command line's 128 KiB
_TAIL_LINES = 12


@dataclass(frozen=True)
class Case:
    op: str
    params: str

    def __str__(self) -> str:
        return f"{self.op}({self.params})"

    @property
    def is_empty(self) -> bool:
        """Half of one row is set: none, so nobody is asked to compute it."""
        return self.op == "SET_ROWS" and self.params.endswith("r=1,v=1")

    @property
    def size(self) -> int:
        """Grows with the work in it: the product of all lengths that are named."""
        return prod(max(1, int(number)) for number in re.findall(r"\b\d+\b", self.params))


class Place(Enum):
    """Who computes a case's operation, as the client plans it."""

    WORKER = "run on the worker"
    KEPT = "kept by the orchestrator"
    REFUSED = "sent to a device that does not support it"
    NOBODY = "supported by no one"


@dataclass(frozen=True)
class Failure:
    """`said` are the program's last lines, where it ended instead of going on."""

    case: Case
    said: str


@dataclass(frozen=True)
class Client:
    """test-backend-ops, and the worker it knows as RPC0."""

    program: Path
    endpoint: str
    environment: Mapping[str, str]

    def places(self) -> dict[Case, Place]:
        """Every case, in the program's order. Nothing is computed."""
        here, there = self._supported(LOCAL), self._supported(REMOTE)
        assert here.keys() == there.keys()
        by_answers = {
            (True, True): Place.WORKER,
            (True, False): Place.KEPT,
            (False, True): Place.REFUSED,
            (False, False): Place.NOBODY,
        }
        return {
            case: by_answers[here[case], there[case] and (here[case] or not case.is_empty)]
            for case in here
        }

    def _supported(self, device: str) -> dict[Case, bool]:
        run = self._run("support", "-b", device)
        assert run.returncode == 0, run.stdout
        return {_case(row): row["yes"] == "1" for row in _ROW.finditer(run.stdout)}

    def run(self, cases: Sequence[Case], device: str = REMOTE) -> Iterator[Case | Failure]:
        """Each case as it passed, or its failure; begun anew after one that ended the program."""
        left = list(dict.fromkeys(cases))
        while left:
            chunk = _first_chunk(left)
            run = self._run("test", "-b", device, "-o", ",".join(map(str, chunk)))
            errors = {_case(row): row["error"] for row in _ROW.finditer(run.stdout)}
            for case in chunk:
                left.remove(case)
                if case not in errors:
                    said = "\n".join(run.stdout.splitlines()[-_TAIL_LINES:])
                    yield Failure(case, f"it ended with {run.returncode}:\n{said}")
                    break
                yield Failure(case, errors[case]) if errors[case] else case

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **self.environment, "MESH_TEST_RPC": self.endpoint}
        return subprocess.run(
            [str(self.program), *arguments, "--output", "csv"],
            env={**environment, "GGML_NO_BACKTRACE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )


def smallest(cases: Sequence[Case]) -> list[Case]:
    """One case for each operation and set of types: the one with the least work."""
    chosen: dict[tuple[str, ...], Case] = {}
    for case in cases:
        kind = (case.op, *re.findall(r"(?:type|mode|order)\w*=\w+", case.params))
        if kind not in chosen or case.size < chosen[kind].size:
            chosen[kind] = case
    return list(chosen.values())


def _case(row: re.Match[str]) -> Case:
    return Case(row["op"], row["params"])


def _first_chunk(cases: Sequence[Case]) -> list[Case]:
    """Of one operation, as many as one command line takes."""
    chunk: list[Case] = []
    total = 0
    for case in cases:
        total += len(str(case)) + 1
        if chunk and (case.op != chunk[0].op or total > _FILTER_BYTES):
            break
        chunk.append(case)
    return chunk
