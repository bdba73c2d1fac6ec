"""Whole messages over byte streams that deliver in any pieces."""

from __future__ import annotations

import contextlib

import cbor2
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from meshnode.errors import BadMessage
from meshnode.messages import MAX_VALUES, MessageStream, PeerGone, parse_message_untrusted


async def test_messages_arrive_whole_and_in_order() -> None:
    left, right = trio.testing.lockstep_stream_pair()
    async with trio.open_nursery() as nursery:

        async def speak() -> None:
            messages = MessageStream(left)
            await messages.send({"n": 1})
            await messages.send({"n": 2, "data": bytes(10_000)})
            await left.send_eof()

        nursery.start_soon(speak)
        messages = MessageStream(right)
        assert await messages.receive_untrusted() == {"n": 1}
        assert (await messages.receive_untrusted())["data"] == bytes(10_000)
        assert await messages.receive_or_end_untrusted() is None
        with pytest.raises(PeerGone):
            await messages.receive_untrusted()


async def test_an_announced_giant_is_refused_before_it_arrives() -> None:
    left, right = trio.testing.memory_stream_pair()
    await left.send_all(b"\xff\xff\xff\xff")
    with pytest.raises(BadMessage, match="too large"):
        await MessageStream(right).receive_untrusted()


@pytest.mark.parametrize("sent", [b"\x00", b"\x00\x00\x00\x05ab"])
async def test_a_message_cut_short_is_told_from_a_clean_end(sent: bytes) -> None:
    left, right = trio.testing.memory_stream_pair()
    await left.send_all(sent)
    await left.send_eof()
    with pytest.raises(BadMessage, match="cut short"):
        await MessageStream(right).receive_or_end_untrusted()


@given(st.binary(max_size=64))
def test_junk_is_a_bad_message_and_nothing_else(data: bytes) -> None:
    with contextlib.suppress(BadMessage):
        parse_message_untrusted(data)


def test_a_message_of_very_many_values_is_refused_unread() -> None:
    """It takes a tenth of a second to make them, and a manifest travels as bytes."""
    few, many = [100] * (MAX_VALUES - 3), [100] * MAX_VALUES
    assert parse_message_untrusted(cbor2.dumps({"op": few})) == {"op": few}
    with pytest.raises(BadMessage, match="cannot be read"):
        parse_message_untrusted(cbor2.dumps({"op": many}))
    assert parse_message_untrusted(cbor2.dumps({"wanted": cbor2.dumps(many)}))
