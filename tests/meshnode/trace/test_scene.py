"""One decode, seen from both ends: who is who, what was on the way, where the time went."""

from __future__ import annotations

import pytest

from meshnode.errors import UsageError
from meshnode.trace import connections as connections_module
from meshnode.trace import scene as scene_module
from meshnode.trace.connections import ConnectionBook, pair
from meshnode.trace.reading import Choice, FirstReading, SecondReading, choose
from meshnode.trace.records import Record
from meshnode.trace.scene import Scene, make_scene
from tests.meshnode.trace.writing import MS, START_NS, Run, TraceText, typical_run


def first_readings(files: list[bytes]) -> list[FirstReading]:
    readings = [FirstReading(number) for number in range(len(files))]
    for reading, data in zip(readings, files, strict=True):
        reading.receive(data)
        reading.finish()
    return readings


def scene_of(files: list[bytes], *, token: int | None = None, load: bool = False) -> Scene:
    readings = first_readings(files)
    choice = choose(readings, token=token, load=load)
    clippings = []
    for reading, data in zip(readings, files, strict=True):
        second = SecondReading(reading, choice)
        second.receive(data)
        clippings.append(second.clipping)
    return make_scene(choice.stretch, clippings, choice.pairs)


def choice_of(files: list[bytes], *, token: int | None = None, load: bool = False) -> Choice:
    return choose(first_readings(files), token=token, load=load)


def title_of(files: list[bytes], *, token: int | None = None, load: bool = False) -> str:
    return choice_of(files, token=token, load=load).title


def test_the_median_decode_is_shown_unless_another_is_named() -> None:
    files = typical_run().encode()
    assert title_of(files) == "decode 4 of 6 (1 token): 11.10 ms"
    assert title_of(files, token=1) == "decode 1 of 6 (16 tokens): 48.10 ms"
    assert title_of(files, load=True) == "load, from the start to the first decode: 8.100 ms"


def test_time_is_split_between_the_client_the_workers_and_the_wire() -> None:
    split = scene_of(typical_run().encode()).split()
    assert split.client_ns == pytest.approx(3.1 * MS, abs=2)
    assert split.workers_ns == pytest.approx(4 * MS, abs=2)
    assert split.wire_ns == pytest.approx(4 * MS, abs=2)


def test_without_the_workers_traces_their_work_is_part_of_the_wait() -> None:
    scene = scene_of(typical_run().encode()[:1])
    assert not scene.has_servers
    assert scene.split().wire_ns == pytest.approx(8 * MS, abs=2)


def test_each_request_is_followed_to_its_server_and_its_answer_back() -> None:
    scene = scene_of(typical_run().encode())
    ways = [(hop.conn, hop.command, hop.there_ns, hop.back_ns) for hop in scene.hops]
    assert [way[:2] for way in ways] == [
        *((0, "INPUT"), (0, "GRAPH_AGAIN"), (1, "INPUT"), (1, "GRAPH_AGAIN"))
    ]
    assert all(there == pytest.approx(MS, abs=2) for _, _, there, _ in ways)
    assert [back is None for _, _, _, back in ways] == [True, False, True, False]
    assert scene.hops[1].back_ns == pytest.approx(MS, abs=2)


def test_the_tally_is_of_what_began_within() -> None:
    tally = scene_of(typical_run().encode()).tally()
    assert (tally.messages, tally.bytes_up, tally.round_trips) == (4, 240, 2)


def test_a_worker_that_waits_for_a_push_does_not_compute() -> None:
    run = Run(workers=1)
    run.decode()
    run.servers[0].add(2, "take", "TAKE", dur_ms=1.5)
    assert scene_of(run.encode()).split().workers_ns == pytest.approx(0.5 * MS, abs=2)


def test_one_worker_computes_while_another_waits_for_it() -> None:
    run = Run(workers=2)
    run.decode()
    run.servers[1].add(2, "take", "TAKE", dur_ms=2)
    assert scene_of(run.encode()).split().workers_ns == pytest.approx(4 * MS, abs=2)


def test_a_server_whose_clock_is_late_is_moved_between_its_two_ways() -> None:
    run = Run(workers=1)
    for _ in range(3):
        run.decode()
    run.servers[0].start_ns -= 50 * MS
    assert choice_of(run.encode()).shifted_ns == {1: pytest.approx(50 * MS, abs=2)}
    hops = scene_of(run.encode()).hops
    assert [hop.there_ns for hop in hops] == [pytest.approx(MS, abs=2)] * 2


def test_a_clock_is_moved_by_the_way_there_where_no_answer_came() -> None:
    client, server = TraceText(), TraceText("server", start_ns=START_NS - 5 * MS)
    client.add(2, "send", "FREE")
    server.add(3, "serve", "FREE")
    files = [client.encode(), server.encode()]
    assert choice_of(files, load=True).shifted_ns == {1: 4 * MS}
    assert [hop.there_ns for hop in scene_of(files, load=True).hops] == [0]


def test_an_answer_without_a_line_of_the_servers_left_when_its_work_was_done() -> None:
    run = Run(workers=1)
    run.decode()
    run.servers[0].lines = [line for line in run.servers[0].lines if "reply" not in line]
    assert scene_of(run.encode()).hops[-1].back_ns == pytest.approx(MS, abs=2)


def test_a_server_that_was_put_aside_as_it_answered_worked_no_longer_than_to_its_answer() -> None:
    run = Run(workers=1)
    run.decode()
    (serve,) = [line for line in run.servers[0].lines if line.endswith("\t2000000")]
    (reply,) = [line for line in run.servers[0].lines if "reply" in line]
    late = [serve.replace("\t2000000", "\t9000000"), "11000000" + reply[reply.index("\t") :]]
    run.servers[0].lines = [run.servers[0].lines[0], *late]
    files = run.encode()
    assert choice_of(files).shifted_ns == {}
    scene = scene_of(files)
    assert scene.split().workers_ns == pytest.approx(3 * MS, abs=2), "the wire cannot be told apart"
    assert scene.hops[-1].back_ns == 0
    assert scene.length_ns == pytest.approx(5.1 * MS, abs=2)


def test_what_a_server_notes_late_does_not_reach_into_the_next_token() -> None:
    run = Run(workers=1)
    run.decode()
    run.decode(own_ms=2)
    lines = run.servers[0].lines
    lines[1] = lines[1].replace("\t2000000", "\t7000000")
    lines[2] = f"{9 * MS}" + lines[2][lines[2].index("\t") :]
    scene = scene_of(run.encode(), token=2)
    assert scene.split().workers_ns == pytest.approx(2 * MS, abs=2)
    assert scene.events[0].record.event == "mark", "nothing of the token before is left"


def test_the_last_of_several_runs_in_a_file_is_shown() -> None:
    old, new = Run(workers=1), typical_run()
    old.client.start_ns -= 10**12
    old.decode()
    files = new.encode()
    files[0] = old.client.encode() + files[0]
    assert title_of(files) == "decode 4 of 6 (1 token): 11.10 ms"
    assert len(scene_of(files).hops) == 4


def test_more_than_can_be_drawn_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scene_module, "MAX_RECORDS", 5)
    scene = scene_of(typical_run().encode())
    assert len(scene.events) == 3 * 5 - 4
    assert scene.left_out > 0


def test_servers_alone_are_shown_from_the_first_start_to_the_last_end() -> None:
    files = typical_run().encode()[1:]
    assert title_of(files).startswith("all there is, without a client's trace: 111.1 ms")
    assert scene_of(files).hops == ()
    with pytest.raises(UsageError, match="give llama-server's trace too"):
        choose(first_readings(files), token=1, load=False)


def test_two_clients_cannot_be_shown_together() -> None:
    files = [typical_run().encode()[0], typical_run().encode()[0]]
    with pytest.raises(UsageError, match="2 of these are traces of clients"):
        choose(first_readings(files), token=None, load=False)


def test_a_decode_that_is_not_there_is_said_to_be_missing() -> None:
    files = typical_run().encode()
    with pytest.raises(UsageError, match=r"no decode 7 in this trace: it has 6$"):
        choose(first_readings(files), token=7, load=False)
    files = [TraceText().encode()]
    with pytest.raises(UsageError, match="it has 0, only a load"):
        choose(first_readings(files), token=1, load=False)
    title = "load, from the start to the end of the trace: it has no decode: 0.000 ms"
    assert title_of(files) == title


# -- which connection is which --------------------------------------------------------------------


def book(file: int, *conns: tuple[str, list[str]], event: str) -> ConnectionBook:
    one = ConnectionBook(file, START_NS)
    for number, (endpoint, commands) in enumerate(conns):
        one.take(Record(number * MS, number, "open", endpoint, 0, 0, 0))
        for seq, command in enumerate(commands):
            one.take(Record(number * MS + seq, number, event, command, seq, 0, 0))
    return one


def pairs_of(client: ConnectionBook, *servers: ConnectionBook) -> dict[tuple[int, int], int]:
    theirs = [one for server in servers for one in server.connections.values()]
    return dict(pair(list(client.connections.values()), theirs))


def test_connections_are_told_apart_by_their_first_commands() -> None:
    client = book(0, ("", ["HELLO", "A"]), ("", ["HELLO", "B"]), ("", ["HELLO"]), event="send")
    server = book(1, ("-", ["HELLO", "B", "C"]), ("-", ["HELLO", "A"]), event="serve")
    assert pairs_of(client, server) == {(1, 0): 1, (1, 1): 0}


def test_connections_that_look_alike_go_by_the_order_in_which_they_were_opened() -> None:
    client = book(0, ("", ["HELLO"]), ("", ["HELLO"]), event="send")
    first, second = (book(file, ("-", ["HELLO"]), event="serve") for file in (1, 2))
    assert pairs_of(client, second, first) == {(1, 0): 0, (2, 0): 1}


def test_a_server_need_not_tell_of_the_greeting() -> None:
    client = book(0, ("", ["HELLO", "A"]), ("", ["HELLO", "B"]), event="send")
    server = ConnectionBook(1, START_NS)
    server.take(Record(0, 0, "serve", "B", 1, 0, 0))
    assert pairs_of(client, server) == {(1, 0): 1}


def test_an_endpoint_that_both_name_decides() -> None:
    client = book(0, ("unix:/a", ["HELLO"]), ("unix:/b", ["HELLO"]), event="send")
    server = book(1, ("unix:/b", ["HELLO"]), event="serve")
    assert pairs_of(client, server) == {(1, 0): 1}


def test_a_connection_of_someone_else_belongs_to_none() -> None:
    client = book(0, ("", ["HELLO"]), event="send")
    server = book(1, ("", ["SONG"]), ("", []), event="serve")
    assert pairs_of(client, server) == {}


def test_a_file_has_no_end_of_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections_module, "MAX_CONNECTIONS", 2)
    one = book(0, *(("", ["A"] * 100) for _ in range(5)), event="send")
    assert len(one.connections) == 2
    assert len(one.connections[0].commands) == connections_module.TIMED_REQUESTS
