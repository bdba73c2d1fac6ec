"""A source of a model that is a file here, with a memory of what was asked of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from meshnode.models.facts import shard_paths
from meshnode.models.pull.source import SourceFault, SourceFile, joint_validator
from meshnode.models.spans import Span


@dataclass
class FileSource:
    """All shards of a model. `spoil`: what becomes of the bytes on their way."""

    path: Path
    version: str = "etag:1"
    title: str = "a folder"
    holds: tuple[Span, ...] | None = None
    is_sequential: bool = False
    is_there: bool = True
    rtt_s: float | None = None
    spoil: Callable[[bytes], bytes] = bytes
    asked: list[Span] = field(default_factory=list)

    @property
    def files(self) -> tuple[SourceFile, ...]:
        return tuple(
            SourceFile(path.name, path.stat().st_size, self.version)
            for path in shard_paths(self.path)
        )

    @property
    def validator(self) -> str:
        return joint_validator(self.files)

    @property
    def asked_bytes(self) -> int:
        return sum(span.size_bytes for span in self.asked)

    async def read(
        self, file_index: int, start: int, stop: int, into: Callable[[memoryview], None]
    ) -> None:
        self.asked.append(Span(file_index, start, stop))
        with shard_paths(self.path)[file_index].open("rb") as file:
            file.seek(start)
            into(memoryview(self.spoil(file.read(stop - start))))

    @asynccontextmanager
    async def open(self, _reference: str) -> AsyncIterator[FileSource]:
        if not self.is_there:
            raise SourceFault("nobody answers")
        yield self
