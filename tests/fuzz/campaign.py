"""Many inputs for one parser: made, run, timed, and what was found.

An input that takes a way through the parser that none took before (told by the lines of the
exception it ends in) is kept to be changed further: poor man's coverage, which costs nothing.
"""

from __future__ import annotations

import random
import resource
import sys
import time
import tracemalloc
import types
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import trio
import trio.testing

from tests.fuzz.parser import REJECTED, Parser

MAX_CORPUS = 600
MAX_INPUT_BYTES = 256 * 1024
MEMORY_SAMPLE = 997  # one input in so many has its memory measured
MAX_FINDINGS = 20
_KIB = 1024 if sys.platform == "linux" else 1  # the unit of ru_maxrss


@dataclass(frozen=True)
class Finding:
    """One input that broke a promise; `where` tells two findings apart."""

    data: bytes
    what: str
    where: str


@dataclass
class Result:
    """What a campaign saw. Times are CPU seconds of one input, memory the peak over the start."""

    inputs: int = 0
    accepted: int = 0
    seconds: float = 0.0
    worst_seconds: float = 0.0
    worst_memory_bytes: int = 0
    corpus: int = 0
    findings: list[Finding] = field(default_factory=list)


class Campaign:
    """I make inputs and judge what became of them; who runs the parser is not my concern."""

    def __init__(self, parser: Parser, seed: int) -> None:
        self.parser = parser
        self.result = Result()
        self._dice = random.Random(zlib.crc32(parser.name.encode()) ^ seed)
        self._corpus = list(parser.seeds())
        self._seeds = len(self._corpus)
        self._ways: set[tuple[object, ...]] = set()
        self._found: set[str] = set()

    def next_input(self) -> bytes:
        made = self.parser.format.mutated(self._choice(), self._choice(), self._dice)
        return made[:MAX_INPUT_BYTES]

    def _choice(self) -> bytes:
        corpus, dice = self._corpus, self._dice
        among = len(corpus) if dice.random() < 0.6 else self._seeds
        return corpus[int(dice.random() * among)]

    def judge(self, data: bytes, ending: object) -> None:
        """`ending`: what the parser returned, or the exception it raised."""
        result = self.result
        result.inputs += 1
        if not isinstance(ending, BaseException):
            result.accepted += ending is not REJECTED
            way: tuple[object, ...] = (type(ending),)
        else:
            way = way_of(ending)
            if not isinstance(ending, self.parser.declared):
                self.find(data, f"{type(ending).__name__}: {str(ending)[:120]!r}", repr(way[-2:]))
        if way not in self._ways and len(self._ways) < MAX_CORPUS:
            self._ways.add(way)
            if self.keeps_mutable:
                self._corpus.append(data)
        result.corpus = len(self._corpus)

    @property
    def keeps_mutable(self) -> bool:
        """Sealed inputs are no bodies: they cannot be changed again."""
        return not hasattr(self.parser.format, "_seal")

    def find(self, data: bytes, what: str, where: str) -> None:
        if where not in self._found and len(self._found) < MAX_FINDINGS:
            self._found.add(where)
            self.result.findings.append(Finding(data, what, where))

    def note_time(self, data: bytes, seconds: float, again: Callable[[], float]) -> None:
        """The least of three decides: what a busy machine adds is not the parser's, nor is what
        whoever counts lines adds."""
        if seconds <= self.result.worst_seconds:
            return
        seconds = min(seconds, again(), again())
        self.result.worst_seconds = max(self.result.worst_seconds, seconds)
        if seconds > self.parser.seconds_for(len(data)):
            self.find(data, f"{seconds:.3f} s for {len(data)} bytes", "time")

    def note_memory(self, data: bytes, peak_bytes: int) -> None:
        self.result.worst_memory_bytes = max(self.result.worst_memory_bytes, peak_bytes)
        if peak_bytes > self.parser.memory_for(len(data)):
            self.find(data, f"{peak_bytes} bytes of memory for {len(data)}", "memory")


def way_of(error: BaseException) -> tuple[object, ...]:
    """The lines that an exception went through, and those of its cause."""
    way: list[object] = [type(error)]
    seen: BaseException | None = error
    while seen is not None:
        trace: types.TracebackType | None = seen.__traceback__
        while trace is not None:
            way.append((trace.tb_frame.f_code.co_name, trace.tb_lineno))
            trace = trace.tb_next
        seen = seen.__cause__
    return tuple(way)


def run_campaign(parser: Parser, inputs: int, seed: int = 0) -> Result:
    """`inputs` inputs, the same in every run with this seed."""
    campaign = Campaign(parser, seed)
    started = time.perf_counter()
    if parser.run_in_trio is None:
        _run(campaign, inputs)
    else:
        trio.run(_run_in_trio, campaign, inputs, clock=trio.testing.MockClock())
    campaign.result.seconds = time.perf_counter() - started
    return campaign.result


def ending_of(run: Callable[[bytes], object], data: bytes) -> object:
    """What became of one input. A panic of native code is a BaseException as well."""
    try:
        return run(data)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return error


async def ending_in_trio(parser: Parser, data: bytes) -> object:
    assert parser.run_in_trio is not None
    try:
        return await parser.run_in_trio(data)
    except (KeyboardInterrupt, trio.Cancelled):
        raise
    except BaseException as error:
        return error


def _run(campaign: Campaign, inputs: int) -> None:
    run = campaign.parser.run
    assert run is not None
    clock = time.thread_time

    def timed(data: bytes) -> float:
        with untraced():
            before = clock()
            ending_of(run, data)
            return clock() - before

    highest = _highest_memory()
    for number in range(inputs):
        data = campaign.next_input()
        before = clock()
        ending = ending_of(run, data)
        spent = clock() - before
        campaign.judge(data, ending)
        campaign.note_time(data, spent, lambda data=data: timed(data))  # type: ignore[misc]
        grown = _highest_memory() > highest + (1 << 20)
        if grown or number % MEMORY_SAMPLE == 0:
            del ending
            campaign.note_memory(data, _peak_memory(lambda data=data: ending_of(run, data)))  # type: ignore[misc]
            highest = _highest_memory()


async def _run_in_trio(campaign: Campaign, inputs: int) -> None:
    parser, clock = campaign.parser, time.thread_time
    for number in range(inputs):
        data = campaign.next_input()
        sampled = number % MEMORY_SAMPLE == 0
        if sampled:
            tracemalloc.start()
        before = clock()
        ending = await ending_in_trio(parser, data)
        spent = clock() - before
        if sampled:
            campaign.note_memory(data, tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        else:
            worst = campaign.result.worst_seconds
            for _ in range(2):  # as in note_time, but awaited
                if spent > worst:
                    with untraced():
                        before = clock()
                        await ending_in_trio(parser, data)
                        spent = min(spent, clock() - before)
            campaign.note_time(data, spent, lambda spent=spent: spent)  # type: ignore[misc]
        campaign.judge(data, ending)


@contextmanager
def untraced() -> Iterator[None]:
    """Nobody counts lines while the block runs."""
    tracer = sys.gettrace()
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(tracer)


def _highest_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB


def _peak_memory(run: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
