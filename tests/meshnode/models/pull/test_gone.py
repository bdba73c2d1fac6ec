"""A source that goes away in the middle of what it gives, beside one that stays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from meshnode.models.pull.pull import Pull, Supply
from meshnode.models.pull.source import SourceError, SourceGone
from tests.lab.sources import FileSource
from tests.lab.web import Bucket
from tests.meshnode.models.pull.from_web import CONTENT, WHOLE

HALF_BYTES = len(CONTENT) // 2


@dataclass
class Leaving(FileSource):
    """Gives the first half of what it has, and no more."""

    ends_in: type[SourceError] = SourceGone

    async def read(
        self, file_index: int, start: int, stop: int, into: Callable[[memoryview], None]
    ) -> None:
        await super().read(file_index, start, start + HALF_BYTES, into)
        raise self.ends_in("no more")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "m.gguf").write_bytes(CONTENT)
    return tmp_path / "m.gguf"


async def asked_of_the_other(path: Path, leaving: Leaving) -> int:
    """How many bytes, once all of it is here."""
    bucket, staying = Bucket(CONTENT), FileSource(path)
    supplies = [Supply(leaving, 1), Supply(staying, 1, rank=1)]
    await Pull([WHOLE], supplies, bucket, chunk_bytes=len(CONTENT)).run()
    assert bytes(bucket.data) == CONTENT
    assert len(leaving.asked) == 1, "nobody asks it again"
    return staying.asked_bytes


async def test_what_came_of_a_source_that_is_gone_stands(path: Path) -> None:
    assert await asked_of_the_other(path, Leaving(path)) == len(CONTENT) - HALF_BYTES


async def test_what_came_of_a_source_that_refuses_comes_anew(path: Path) -> None:
    assert await asked_of_the_other(path, Leaving(path, ends_in=SourceError)) == len(CONTENT)
