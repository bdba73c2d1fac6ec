"""A reply code pasted at the terminal of a running node. A real pseudo-terminal."""

from __future__ import annotations

import os
import pty
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio

from meshnode.cli.prompt import follow_pasted_codes, is_at_terminal

CODE = "meshr1qqqqqqq"


@contextmanager
def at_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The person's end, of a terminal that is standard input and output."""
    person, ours = pty.openpty()
    with open(ours, "r+b", buffering=0) as raw:
        monkeypatch.setattr("sys.stdin", raw)
        monkeypatch.setattr("sys.stdout", raw)
        try:
            yield person
        finally:
            monkeypatch.undo()
            os.close(person)


async def test_a_pasted_code_is_followed_and_stray_keys_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    send, receive = trio.open_memory_channel[str](9)
    with at_terminal(monkeypatch) as person:
        async with trio.open_nursery() as nursery:
            assert is_at_terminal()
            nursery.start_soon(follow_pasted_codes, send.send)
            os.write(person, b"\nhello?\n" + CODE.encode() + b"\n")
            with trio.fail_after(10):
                assert await receive.receive() == CODE
                os.write(person, b"  mesh accept MESHR1QQ\xff\n")
                assert (await receive.receive()).startswith("MESHR1QQ")
            nursery.cancel_scope.cancel()


async def test_a_terminal_that_goes_away_ends_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    send, receive = trio.open_memory_channel[str](9)
    with at_terminal(monkeypatch) as person:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(follow_pasted_codes, send.send)
            os.write(person, CODE.encode() + b"\n\x04")  # Ctrl-D
            with trio.fail_after(10):
                await receive.receive()
            await trio.testing.wait_all_tasks_blocked()
            assert len(nursery.child_tasks) == 1, "it is waited for as if it were for ever"
            nursery.cancel_scope.cancel()


async def test_where_there_is_no_terminal_nothing_is_read(nursery: trio.Nursery) -> None:
    async def never(_code: str) -> None:
        raise AssertionError

    assert not is_at_terminal()
    nursery.start_soon(follow_pasted_codes, never)
    await trio.testing.wait_all_tasks_blocked()
    nursery.cancel_scope.cancel()
