"""`just engine-ops`: llama.cpp's own test of operations, against a worker through a tunnel.

    python -m tests.engine.ops.run [--smallest] [--link tcp|quic] [--op NAME …] [--write]

Every case that the client gives to a worker is run and compared with the CPU's reference kernels;
one that fails is run on this machine's CPU too: what the CPU fails alone is no fault of the wire.
--write puts the counts into docs/engine-ops.md. Exit status 1 when a case failed.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio

from meshnode.engine.build import find_engine
from meshnode.engine.errors import EngineMissing
from tests.engine.ops.cases import LOCAL, Case, Client, Failure, Place, smallest
from tests.engine.ops.client import build_client
from tests.engine.ops.page import write_page
from tests.engine.ops.tunnelled import tunnelled_server

LINKS = ("tcp", "quic")


@dataclass
class Outcome:
    """`alone`: cases that fail on this machine's CPU too."""

    places: dict[Case, Place]
    passed: list[Case] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    alone: list[Failure] = field(default_factory=list)
    server_lived: bool = True

    def kept(self) -> Counter[str]:
        return Counter(case.op for case, place in self.places.items() if place is Place.KEPT)

    def count(self, place: Place) -> int:
        return sum(one is place for one in self.places.values())


async def run_ops(
    program: Path,
    server_bin: Path,
    *,
    link: str,
    choose: Callable[[Sequence[Case]], Sequence[Case]],
    environment: Mapping[str, str],
    show: Callable[[str], None],
) -> Outcome:
    """`environment` is for the server and the client alike."""
    folder = Path(tempfile.mkdtemp(prefix="mesh-", dir="/tmp"))
    try:
        async with tunnelled_server(server_bin, folder, link, environment) as (server, endpoint):
            client = Client(program, endpoint, environment)
            outcome = Outcome(await trio.to_thread.run_sync(client.places))
            given = [case for case, place in outcome.places.items() if place is Place.WORKER]
            await trio.to_thread.run_sync(_run_all, client, choose(given), outcome, show)
            outcome.server_lived = server.alive
    finally:
        shutil.rmtree(folder)
    return outcome


def _run_all(
    client: Client, cases: Sequence[Case], outcome: Outcome, show: Callable[[str], None]
) -> None:
    op = ""
    for number, result in enumerate(client.run(cases), 1):
        if isinstance(result, Failure):
            [again] = client.run([result.case], LOCAL)
            (outcome.alone if isinstance(again, Failure) else outcome.failed).append(result)
            show(f"{result.case}: {result.said}")
            continue
        outcome.passed.append(result)
        if result.op != op:
            op = result.op
            show(f"[{number}/{len(cases)}] {op}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smallest", action="store_true", help="one case an operation and type")
    parser.add_argument("--link", choices=LINKS, default=LINKS[0])
    parser.add_argument("--op", action="append", default=[])
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    engine = find_engine()
    if engine is None:
        raise EngineMissing

    def choose(cases: Sequence[Case]) -> Sequence[Case]:
        wanted = [case for case in cases if not options.op or case.op in options.op]
        return smallest(wanted) if options.smallest else wanted

    program = build_client()
    outcome = trio.run(
        lambda: run_ops(
            program,
            engine,
            link=options.link,
            choose=choose,
            environment={},
            show=lambda line: print(line, flush=True),
        )
    )
    print(
        f"{len(outcome.passed)} passed, {len(outcome.failed)} failed, {len(outcome.alone)} fail on "
        f"the CPU alone; of {len(outcome.places)}: "
        + ", ".join(f"{outcome.count(place)} {place.value}" for place in Place)
    )
    if options.write:
        chosen = "one case an operation and set of types" if options.smallest else "every case"
        run = f"{chosen}, a tunnel over {options.link}"
        write_page(outcome.places, len(outcome.passed), outcome.alone, run)
    return 1 if outcome.failed or not outcome.server_lived else 0


if __name__ == "__main__":
    sys.exit(main())
