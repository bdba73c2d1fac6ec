"""How peers are reached: what commands answer, and what is told of a change of path."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from click.testing import CliRunner

from discovery.roster import Member
from meshnode.cli import peers as commands
from meshnode.cli.views import bytes_text, loss_text, path_text
from meshnode.config import human_duration
from meshnode.errors import NetworkError, UsageError
from meshnode.events import Event, Kind
from meshnode.peers import PATH_LOOK_S, Peers
from tests.lab.parties import Party, parties
from tunnels import Candidate, PeerId
from tunnels.link import CloseCode

Clock = trio.testing.MockClock
HOUR_S = 3600
A_WHILE_S = 600


def desk(party: Party) -> Peers:
    return Peers(party.endpoint, party.membership, party.connections, party.events.append)


@asynccontextmanager
async def members(folder: Path, *names: str) -> AsyncIterator[list[Party]]:
    """The first founded the mesh that the others have joined."""
    async with parties(folder, *names) as nodes:
        founder, *others = nodes
        for node in nodes:
            await node.nursery.start(desk(node).run)
            node.run_connections()
        await trio.testing.wait_all_tasks_blocked()
        for node in others:
            await node.connections.join(founder.invite())
        await trio.sleep(5)
        yield nodes


def told(party: Party) -> list[Event]:
    return [event for event in party.events if event.kind is Kind.PATH]


async def ping(party: Party, who: str) -> dict[str, object]:
    return dict(await desk(party).answer_ping({"op": "ping", "peer": who}))


# -- who is asked -----------------------------------------------------------------------------


async def test_a_peer_is_meant_by_name_by_id_or_by_its_first_letters(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with members(tmp_path, "ann", "bob") as (ann, bob):
        for who in ("bob", str(bob.peer), str(bob.peer)[:4], str(bob.peer)[:9].upper()):
            answer = await ping(ann, who)
            assert (answer["name"], answer["peer"]) == ("bob", str(bob.peer))


async def test_nobody_of_that_name_two_of_that_beginning_and_this_node_are_told_apart(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with members(tmp_path, "ann", "bob") as (ann, bob):
        twins = [PeerId(bytes(31) + bytes([number])) for number in range(2)]
        for twin in twins:
            ann.ledger.members.roster.merge(Member(twin, "twin"))
        for who in ("carl", str(bob.peer)[:3], str(PeerId(bytes([9]) * 32)), ""):
            with pytest.raises(UsageError, match="mesh members"):
                await ping(ann, who)
        for who in ("twin", str(twins[0])[:8]):
            with pytest.raises(UsageError, match=f"{twins[0]}, {twins[1]}"):
                await ping(ann, who)
        for who in ("ann", str(ann.peer), str(ann.peer)[:8]):
            with pytest.raises(UsageError, match="itself"):
                await ping(ann, who)


async def test_a_name_that_is_anothers_id_catches_nobody(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with members(tmp_path, "ann", "bob") as (ann, bob):
        ann.ledger.members.roster.merge(Member(PeerId(bytes(32)), str(bob.peer)))
        assert (await ping(ann, str(bob.peer)))["name"] == "bob"


# -- what is measured -------------------------------------------------------------------------


async def test_a_ping_takes_a_round_trip_over_each_link(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with members(tmp_path, "ann", "bob") as (ann, bob):
        await ann.session(bob).ping(lambda _link, _seconds: None)
        answer = await ping(ann, "bob")
        links = answer["links"]
        assert isinstance(links, list)
        assert links
        assert links[0]["in_use"]
        for link in links:
            assert link["took_ms"] == pytest.approx(20, abs=2)
            assert link["relayed"] is False


async def test_a_member_that_is_not_connected_is_dialled(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "ann", "bob") as (ann, bob):
        await ann.connections.join(bob.invite())
        ann.session(bob).end("for this test")
        await trio.sleep(1)
        assert ann.endpoint.session(bob.peer) is None
        assert (await ping(ann, "bob"))["links"]


async def test_a_member_that_is_gone_is_told_of_in_time(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "ann", "bob") as (ann, bob):
        await ann.connections.join(bob.invite())
        ann.session(bob).end("for this test")
        ann.membership.ledger.members.roster.merge(
            Member(bob.peer, "bob", (Candidate("quic", "11.0.0.99", 4433),))
        )
        began_s = trio.current_time()
        with pytest.raises(NetworkError, match=r"bob .* is not connected"):
            await ping(ann, "bob")
        assert trio.current_time() - began_s < 9, "the command waits ten seconds"


async def test_a_silent_peer_has_links_that_do_not_answer(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with members(tmp_path, "ann", "bob") as (ann, _bob):
        ann.endpoint._network.world.cut = True  # type: ignore[attr-defined]
        answer = await ping(ann, "bob")
        links = answer["links"]
        assert isinstance(links, list)
        assert [link["took_ms"] for link in links] == [None] * len(links)


async def test_the_rows_are_what_a_program_needs(tmp_path: Path, autojump_clock: Clock) -> None:
    async with members(tmp_path, "ann", "bob") as (ann, _bob):
        await trio.sleep(A_WHILE_S)
        [row] = json.loads(json.dumps(await desk(ann).answer_peers({})))["peers"]
        assert (row["name"], row["member"], row["suspected"]) == ("bob", True, False)
        assert row["silent_s"] is None
        assert row["link"] in ("quic", "tcp")
        assert row["relayed"] is False
        assert row["rtt_ms"] == pytest.approx(20, abs=2)
        assert row["jitter_ms"] == pytest.approx(0, abs=2)
        assert ann.wall() - row["since"] == pytest.approx(A_WHILE_S + 5, abs=3)
        assert row["links"][0]["address"] == row["address"]
        assert row["bytes_in"] >= row["links"][0]["bytes_in"] > 1000


async def test_a_peer_that_is_not_heard_is_told_as_silent_until_it_is(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async def seen() -> tuple[dict[str, Any], str]:
        answer = json.loads(json.dumps(await desk(ann).answer_peers({})))["peers"]
        return answer[0], commands._peers_text(answer, ann.wall())

    async with members(tmp_path, "ann", "bob") as (ann, _bob):
        world = ann.endpoint._network.world  # type: ignore[attr-defined]
        row, text = await seen()
        assert "direct  " in text
        world.cut = True
        await trio.sleep(30)
        row, text = await seen()
        assert row["suspected"]
        assert 29 <= row["silent_s"] <= 41
        assert all(link["suspected"] for link in row["links"])
        assert f"silent for {row['silent_s']:.0f} s" in text
        world.cut = False
        await trio.sleep(5)
        row, text = await seen()
        assert not row["suspected"]
        assert "silent" not in text


# -- changes of path --------------------------------------------------------------------------


async def test_a_better_link_is_told_once(tmp_path: Path, autojump_clock: Clock) -> None:
    """A firewall kept TCP out at first."""
    async with members(tmp_path, "ann", "bob") as (ann, bob):
        paths = {event.data["link"] for event in told(ann)}
        session = ann.session(bob)
        assert session.stats.link_kind == "quic"
        assert paths <= {"quic"}
        before = len(told(ann))
        for link in session.standing:
            if link.kind == "quic":
                await session_over_tcp(ann, bob)
                link.close(CloseCode.LINK_OVER, "for this test")
        await trio.sleep(1)
        news = told(ann)[before:]
        assert [event.data["link"] for event in news] == ["tcp"]
        [event] = news
        assert event.data["relayed"] is False
        assert event.text.startswith(f"bob ({bob.peer.short}) is now reached directly over tcp at ")
        assert "; before, directly over quic at 11.0.0." in event.text


async def session_over_tcp(ann: Party, bob: Party) -> None:
    tcp = [one for one in bob.endpoint.candidates() if one.transport == "tcp"]
    proven = await ann.endpoint._attempt(bob.peer, tcp[0])
    ann.endpoint._sessions.adopt(proven)


async def test_an_address_that_moves_under_a_link_is_told(
    tmp_path: Path, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NAT forgot the mapping: the same link, another port."""
    async with members(tmp_path, "ann", "bob") as (ann, bob):
        before = len(told(ann))
        link = ann.session(bob).best_link
        assert link is not None
        monkeypatch.setattr(type(link), "remote", "11.0.0.2:50001")
        await trio.sleep(2 * PATH_LOOK_S)
        assert [event.data["address"] for event in told(ann)[before:]] == ["11.0.0.2:50001"]


# -- what is shown ----------------------------------------------------------------------------

ROW = {
    "name": "tower",
    "peer": "abcdefgh" * 6,
    "member": True,
    "link": "quic",
    "address": "192.0.2.7:4433",
    "relayed": False,
    "suspected": False,
    "smoothed_rtt_ms": 12.34,
    "jitter_ms": 0.5,
    "loss": 0.0123,
    "bytes_in": 2**21,
    "bytes_out": 512,
    "since": 1000,
}


def test_a_line_for_the_link_in_use_and_one_for_each_that_stands_by() -> None:
    relay = {**ROW, "link": "relay", "relayed": True, "loss": None, "since": 4000}
    text = commands._peers_text([{**ROW, "links": [ROW, relay]}], now=1000 + 2 * HOUR_S)
    titles, first, second = text.splitlines()
    assert titles.split()[:3] == ["name", "peer", "link"]
    cells = ("tower", "abcdefgh", "quic", "192.0.2.7:4433", "direct", "12.3 ms", "0.5 ms")
    assert re.split("  +", first) == [*cells, "1.2%", "2.0 MiB", "0.5 KiB", "2 h 0 min"]
    assert second.split()[:3] == ["relay", "192.0.2.7:4433", "relayed"]
    assert "1 h 10 min" in second


def test_a_link_and_a_peer_that_are_silent_are_shown_as_such() -> None:
    silent = {**ROW, "suspected": True}
    text = commands._peers_text([{**ROW, "links": [ROW, silent]}], now=1000)
    assert [line.count("direct, silent ") for line in text.splitlines()] == [0, 0, 1]
    text = commands._peers_text([{**silent, "silent_s": 6.2, "links": [silent]}], now=1000)
    assert "direct, silent for 6 s " in text


def test_a_peer_without_a_path_and_a_stranger_are_shown_as_such() -> None:
    nothing = dict.fromkeys(ROW) | {"name": "x", "peer": "y" * 9, "member": False}
    row: dict[str, object] = {**nothing, "bytes_in": 0, "bytes_out": 0, "since": 1000, "links": []}
    assert "x (no member)  yyyyyyyy  -" in commands._peers_text([row], now=1005)
    assert "mesh members" in commands._peers_text([], now=0)


def test_times_sizes_and_shares_are_short() -> None:
    assert [human_duration(one) for one in (-3, 59, 61, 3700, 90_000)] == [
        *("0 s", "59 s", "1 min", "1 h 1 min", "1 d 1 h"),
    ]
    assert (bytes_text(None), bytes_text(0), bytes_text(2**30)) == ("-", "0.0 KiB", "1024.0 MiB")
    assert (loss_text(None), loss_text(0.5)) == ("-", "50.0%")
    assert [path_text({"relayed": one}) for one in (None, True, False)] == [
        *("-", "relayed", "direct"),
    ]


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """What the rounds take, one after the other."""
    took: list[float | None] = []

    def ask(_home: Path, request: dict[str, object]) -> dict[str, object]:
        link = {"link": "quic", "address": "192.0.2.7:4433", "relayed": False, "in_use": True}
        return {"name": "tower", "peer": "a" * 52, "links": [link | {"took_ms": took.pop(0)}]}

    monkeypatch.setattr(commands, "ask_node", ask)
    monkeypatch.setattr(commands, "PAUSE_S", 0)
    return took


def test_a_ping_sums_up_what_was_measured(rounds: list[float | None]) -> None:
    rounds += [10.0, None, 30.0]
    done = CliRunner().invoke(commands.ping, ["tower", "-c", "3"])
    assert done.exit_code == 0
    lines = done.output.splitlines()
    assert lines[0] == "1: tower (aaaaaaaa) over quic at 192.0.2.7:4433 (direct): 10.0 ms"
    assert lines[1].endswith(": no answer")
    assert lines[3] == (
        "quic at 192.0.2.7:4433 (direct): 2 of 3 answered, least/mean/most 10.0/20.0/30.0 ms"
    )


def test_a_ping_for_programs_is_one_object(rounds: list[float | None]) -> None:
    rounds += [10.0, None]
    done = CliRunner().invoke(commands.ping, ["tower", "-c", "2", "--json"])
    [link] = json.loads(done.output)["links"]
    assert (link["asked"], link["answered"], link["mean_ms"]) == (2, 1, 10.0)


def test_a_peer_that_answers_nothing_is_a_failure(rounds: list[float | None]) -> None:
    rounds += [None]
    done = CliRunner().invoke(commands.ping, ["tower", "-c", "1"])
    assert isinstance(done.exception, NetworkError)
    assert "0 of 1 answered" in done.output
