"""The seams of a pull: where bytes come from, where they go, and how it can fail.

Threads: `into` of a read and every method of a `Sink` may block on a disk, so they are called in
worker threads, never in trio's; those of a sink by several at once, each for other bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from meshnode.errors import NetworkError
from meshnode.models.spans import Span


class SourceError(NetworkError):
    """A source will not give these bytes, however often it is asked."""


class NotForEverybody(SourceError):
    """A source gives these bytes only to those it knows. `shown`: what was asked for."""

    def __init__(self, message: str, shown: str) -> None:
        self.shown = shown
        super().__init__(message)


class SourceGone(SourceError):
    """A source is not there any more. What it gave stands."""


class SourceChanged(SourceError):
    """The file at the source is another one than when the pull began."""


class SourceFault(NetworkError):
    """A source did not give these bytes this time: to be asked again, not before `retry_after_s`
    where the source named a time."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


@dataclass(frozen=True)
class SourceFile:
    """One file of a model as its source names it.

    `validator` is what the source says of the bytes: `sha256:HEX` where it knows that, else a
    strong ETag (`etag:…`), else when it was modified (`modified:DATE LENGTH`), else no more than
    its length (`length:N`).
    """

    name: str
    size_bytes: int
    validator: str


def joint_validator(files: Iterable[SourceFile]) -> str:
    """One validator for the files of a model."""
    return "\n".join(file.validator for file in files)


class RangeSource(Protocol):
    """Somebody who has a model's files, or parts of them."""

    @property
    def title(self) -> str:
        """What to call it before a user. No secret is in it."""

    @property
    def files(self) -> tuple[SourceFile, ...]: ...

    @property
    def validator(self) -> str: ...

    @property
    def holds(self) -> Sequence[Span] | None:
        """What of the files it has; None: all."""

    @property
    def is_sequential(self) -> bool:
        """Whether a read costs all that lies before it too, as where a server ignores Range."""

    @property
    def rtt_s(self) -> float | None:
        """How far away it is; None: nobody has measured it."""

    async def read(
        self, file_index: int, start: int, stop: int, into: Callable[[memoryview], None]
    ) -> None:
        """Hands the bytes from `start` up to `stop` to `into`, in order, piece by piece; a piece is
        valid during the call only. Returns once all were handed over, never with fewer or more.

        Several reads may go on at once. What `into` raises comes out as it is. Raises
        `SourceFault` (what was handed over until then is right as far as the source can tell),
        `SourceError`, `SourceChanged`.
        """


class Sink(Protocol):
    """Where the bytes go. What is wrong with the disk is raised as a `MeshError`."""

    def write(self, file_index: int, offset: int, data: memoryview) -> None:
        """Some bytes came. They are not to be relied on before `done` was called for them."""

    def done(self, file_index: int, start: int, stop: int) -> Sequence[Span]:
        """All bytes from `start` up to `stop` were written. Returns what turned out to be wrong,
        by a digest say, and so must come anew; mostly nothing."""

    def missing(self, tensors: Iterable[str]) -> tuple[Span, ...]:
        """What is still to come for these tensors."""
