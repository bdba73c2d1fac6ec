"""Members that vanish, fall silent, talk nonsense or give too little: others have what they had."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest
import trio
import trio.testing

from meshnode.messages import MessageStream
from meshnode.models.facts import read_facts
from meshnode.models.peers.offers import Offers, held_spans
from meshnode.models.peers.protocol import Holding, ReadRequest
from meshnode.models.peers.service import STORE_SERVICE, StoreService, _OpenFile
from meshnode.models.peers.source import Holders, PeerSource
from meshnode.models.pull.source import SourceFault, SourceGone
from tests.meshnode.models.peers.serving import (
    FIRST,
    REFERENCE,
    fetch,
    scene,
)
from tunnels import PeerId, Session, Stream


class Unwilling(StoreService):
    """Says what it holds, and gives nothing of it."""

    async def _give(self, stream: Stream, messages: MessageStream, request: ReadRequest) -> None:
        await messages.send({"refused": "the disk is gone"})


class Short(StoreService):
    """Gives less than it says."""

    async def _give(self, stream: Stream, messages: MessageStream, request: ReadRequest) -> None:
        await messages.send({"bytes": request.stop - request.start})
        await stream.send_all(b"x" * 10)


async def test_a_member_that_vanishes_midway_leaves_the_rest_to_the_source(tmp_path: Path) -> None:
    async with scene(tmp_path) as stage:
        (member,) = stage.members
        await stage.hold(member, *FIRST)
        part = await stage.fetcher.obtain(REFERENCE)

        member.endpoint.serve(STORE_SERVICE, Unwilling(Offers(member.store)).serve)
        assert await fetch(stage, part, *FIRST) == set(FIRST)
        assert stage.source.asked_bytes > 0


async def fault_of(service: type[StoreService], tmp_path: Path, size_bytes: int) -> str:
    """Of a member that holds what is read, and serves it in that way."""
    async with scene(tmp_path) as stage:
        (member,) = stage.members
        await stage.hold(member, *FIRST)
        holder = await member.as_source()
        member.endpoint.serve(STORE_SERVICE, service(Offers(member.store)).serve)
        with trio.fail_after(20), pytest.raises(SourceFault) as raised:
            await holder.read(0, 0, size_bytes, lambda _data: None)
        return str(raised.value)


async def test_a_member_that_sends_too_little_is_a_fault(tmp_path: Path) -> None:
    assert "went away" in await fault_of(Short, tmp_path, 1000)


async def test_a_member_whose_session_has_ended_is_not_asked_again(tmp_path: Path) -> None:
    async with scene(tmp_path) as stage:
        (member,) = stage.members
        await stage.hold(member, *FIRST)
        holder = await member.as_source()
        member.session.end("it was killed in the middle of a word")
        with pytest.raises(SourceGone, match="went away"):
            await holder.read(0, 0, 1000, lambda _data: None)


@dataclass
class Gone:
    """A session with a peer that was heard of last when it began."""

    peer: PeerId

    @property
    def silence_s(self) -> float:
        return trio.current_time()

    async def open(self, _service: str) -> Stream:
        await trio.sleep_forever()
        raise AssertionError


async def test_a_member_that_falls_silent_is_left_before_its_streams_are(
    autojump_clock: trio.testing.MockClock,
) -> None:
    session = cast(Session, Gone(PeerId(bytes(range(32)))))
    holder = PeerSource(session, "ben", "00" * 32, Holding())
    with pytest.raises(SourceGone, match="nothing has been heard of ben for 10 s"):
        await holder.read(0, 0, 1000, lambda _data: None)
    assert trio.current_time() == pytest.approx(10)


@pytest.mark.parametrize("answer", ["nonsense", "silence"])
async def test_a_member_that_talks_nonsense_holds_nothing(
    tmp_path: Path, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshnode.models.peers.source.ANSWER_WITHIN_S", 0.2)
    async with scene(tmp_path) as stage:

        async def talk(stream: Stream) -> None:
            if answer == "silence":
                await trio.sleep_forever()
            await stream.send_all(b"\0\0\0\4abcd")

        (member,) = stage.members
        member.endpoint.serve(STORE_SERVICE, talk)
        assert await Holders(lambda: [member.session], lambda _: "ben").find("00" * 32) == []


async def test_who_takes_nothing_any_more_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshnode.models.peers.service.TAKE_WITHIN_S", 0.2)
    async with scene(tmp_path) as stage:
        (member,) = stage.members
        everything = [tensor.name for tensor in read_facts(stage.source.path).tensors]
        held = await stage.hold(member, *everything)
        (whole,) = held_spans(held)
        async with await member.session.open(STORE_SERVICE) as stream:
            messages = MessageStream(stream)
            await messages.send(
                ReadRequest(held.identity.provisional, 0, whole.start, whole.stop).to_message()
            )
            with trio.fail_after(10):
                while stream.state.failure is None:  # noqa: ASYNC110 - nothing is read here
                    await trio.sleep(0.01)
            assert "stood still" in stream.state.failure.reason


async def test_a_file_that_ends_too_soon_is_a_fault_and_not_the_end(tmp_path: Path) -> None:
    """Cut short between the look at it and the reading of it."""

    class Cut(StoreService):
        def _open(self, request: ReadRequest) -> _OpenFile | str:
            opened = super()._open(request)
            assert not isinstance(opened, str)
            os.truncate(opened.file.name, request.stop - 1)
            return opened

    assert "the file has ended" in await fault_of(Cut, tmp_path, 1000)


async def test_a_member_that_falls_silent_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshnode.models.peers.source.STALL_S", 0.2)

    class Silent(StoreService):
        async def _give(
            self, stream: Stream, messages: MessageStream, request: ReadRequest
        ) -> None:
            await messages.send({"bytes": request.stop - request.start})
            await trio.sleep_forever()

    assert "has sent nothing" in await fault_of(Silent, tmp_path, 1000)


async def test_a_member_that_gives_a_byte_now_and_then_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshnode.models.peers.source.STALL_S", 0.2)

    class Trickling(StoreService):
        async def _give(
            self, stream: Stream, messages: MessageStream, request: ReadRequest
        ) -> None:
            await messages.send({"bytes": request.stop - request.start})
            while True:
                await stream.send_all(b"x")
                await trio.sleep(0.02)

    assert "than 1.0 KiB a second" in await fault_of(Trickling, tmp_path, 100_000)
