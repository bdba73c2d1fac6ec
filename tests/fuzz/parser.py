"""A parser of bytes from outside, and what must hold whatever the bytes are."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.fuzz.mutation import BytesFormat, Format

REJECTED = object()
"""What `run` may return for an input that the parser turned down without an exception."""

SECONDS = 0.1
SECONDS_A_BYTE = 2e-6
MEMORY_BYTES = 4 << 20
MEMORY_A_BYTE = 64


class Broken(AssertionError):
    """A property that the parser promises does not hold for this input."""


@dataclass(frozen=True)
class Parser:
    """One row of the table.

    declared: the exceptions it may raise; none: it must never raise.
    seeds: valid inputs, as the real encoders make them (bodies, where `format` seals them).
    run(data): parses one input and checks what was accepted (`Broken`). Where the parser lives
    under trio, `run_in_trio` takes its place; all inputs share one run then.
    """

    name: str
    declared: tuple[type[BaseException], ...]
    seeds: Callable[[], Sequence[bytes]]
    run: Callable[[bytes], Any] | None = None
    run_in_trio: Callable[[bytes], Awaitable[Any]] | None = None
    format: Format = field(default_factory=BytesFormat)
    memory_bytes: int = MEMORY_BYTES

    @property
    def declares(self) -> str:
        return ", ".join(kind.__name__ for kind in self.declared) or "nothing"

    def seconds_for(self, size: int) -> float:
        """The most CPU time that an input of this size may take."""
        return SECONDS + size * SECONDS_A_BYTE

    def memory_for(self, size: int) -> int:
        """The most memory, over what stood before, that an input of this size may take."""
        return self.memory_bytes + size * MEMORY_A_BYTE


def check(holds: bool, promise: str) -> None:
    if not holds:
        raise Broken(promise)


def text_of(data: bytes) -> str:
    """Any text at all, lone surrogates too."""
    return data.decode("utf-8", "surrogateescape")
