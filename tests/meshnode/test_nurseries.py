"""Errors of work done side by side come out as themselves."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from meshnode.errors import NetworkError
from meshnode.nurseries import accompanied_by, bare_nursery


async def fail(error: Exception) -> None:
    await trio.lowlevel.cancel_shielded_checkpoint()  # so that both of two errors happen
    raise error


async def test_a_companions_error_ends_the_body_and_comes_out_bare() -> None:
    async def companion() -> None:
        await fail(NetworkError("gone"))

    with pytest.raises(NetworkError, match="gone"):
        async with accompanied_by(companion):
            await trio.sleep_forever()


async def test_a_companion_ends_with_the_body(autojump_clock: trio.testing.MockClock) -> None:
    ended = trio.Event()

    async def companion() -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    async with accompanied_by(companion):
        await trio.sleep(1)
    assert ended.is_set()


async def test_of_several_errors_the_one_with_a_sentence_is_told() -> None:
    async def both() -> None:
        async with bare_nursery() as nursery:
            nursery.start_soon(fail, ValueError("a defect"))
            nursery.start_soon(fail, NetworkError("the worker is gone"))

    with pytest.raises(NetworkError, match="the worker is gone"):
        await both()


async def test_a_cancelled_body_stays_cancelled() -> None:
    with trio.CancelScope() as scope:
        async with bare_nursery():
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
