"""What is drawn of a scene, as text and as SVG."""

from __future__ import annotations

from xml.etree import ElementTree

from meshnode.trace import tables as tables_module
from meshnode.trace.reading import Choice, FirstReading, SecondReading, choose
from meshnode.trace.rows import Bar, Kind, Row, make_rows, thin
from meshnode.trace.scene import Scene, Stretch, make_scene
from meshnode.trace.svg import draw_svg
from meshnode.trace.tables import columns, hop_lines, json_report, notes, table_lines
from meshnode.trace.text import WIDTH, describe_split, draw_text, fit, list_events
from tests.meshnode.trace.test_scene import first_readings, scene_of
from tests.meshnode.trace.writing import MS, Run, TraceText, typical_run

NAMES = ["client 100", "server 200", "server 201"]
ENDPOINTS = {0: "unix:/run/0.sock", 1: "unix:/run/1.sock"}


def rows_of(scene: Scene) -> list[Row]:
    return make_rows(scene, ENDPOINTS, NAMES)


def drawn(scene: Scene) -> list[str]:
    return draw_text(scene, rows_of(scene))


def cells(lines: list[str], label: str) -> list[str]:
    return [line[28:] for line in lines if line[:28].strip() == label]


def test_a_decode_as_text() -> None:
    lines = drawn(scene_of(typical_run().encode()))
    assert lines[0].split() == ["ms", "0", "2", "4", "6", "8", "10"]
    labels = [line[:28].rstrip() for line in lines if line[:28].strip()]
    assert labels == [
        *("ms", "client", "0 unix:/run/0.sock", "  on the way", "  server 200"),
        *("1 unix:/run/1.sock", "  on the way", "  server 201"),
    ]
    (client,) = cells(lines, "client")
    assert client.startswith("█" * 18)
    assert client.count("·") > 40
    (asked,) = cells(lines, "0 unix:/run/0.sock")
    (served,) = cells(lines, "server 200")
    way = cells(lines, "on the way")[0]
    assert asked.index("|") <= way.index(">") < served.index("█") < way.index("<")
    assert served.rindex("█") < way.rindex("<")
    assert max(map(len, lines)) <= WIDTH


def test_a_load_of_many_messages_shows_how_long_and_not_how_often() -> None:
    run = Run(workers=1)
    for _ in range(200):
        run.ask(0, "SET_TENSOR", 9, 9)
    run.decode()
    (asked,) = cells(drawn(scene_of(run.encode(), load=True)), "0 unix:/run/0.sock")
    assert "|" not in asked
    assert set(asked) == {"·"}


def test_pushes_takes_and_what_we_do_not_know_are_drawn() -> None:
    run = Run(workers=1)
    run.client.add(0.5, "dance", "TANGO", dur_ms=0.5)
    run.decode()
    server = run.servers[0]
    server.add(2, "take", "TAKE", dur_ms=1)
    server.add(3.5, "push", "PUSH", size_bytes=4096)
    server.add(3.6, "push", "PUSH", conn=7, size_bytes=4096)
    lines = drawn(scene_of(run.encode()))
    (served,) = cells(lines, "server 200")
    assert "~" in served
    assert "^" in served
    assert "?" in cells(lines, "0 unix:/run/0.sock")[0]
    assert "^" in cells(lines, "server 200 7")[0], "a connection that is none of the client's"
    assert "pushes" in lines[-1]


def test_what_lies_outside_is_not_drawn_and_nothing_is_wider_than_100_columns() -> None:
    bars = (
        *(Bar(Kind.SERVE, -50, -10, "before"), Bar(Kind.SERVE, 150, 190, "after")),
        *(Bar(Kind.WAIT, -50, 50, "half"), Bar(Kind.SEND, 100, 100, "at the end")),
    )
    scene = Scene(Stretch(0, 100), (), (), 0)
    line = draw_text(scene, [Row("x" * 200, bars)])[1]
    assert len(line) == WIDTH
    assert "█" not in line
    assert [bar.text for bar in thin(bars, 100, 0)] == ["half", "at the end"]
    empty = Scene(Stretch(5, 5), (), (), 0)
    assert draw_text(empty, [Row("", (Bar(Kind.SEND, 0, 0, ""),))])[1].strip() == "|"


def test_a_long_label_keeps_its_begin_and_its_end() -> None:
    assert fit("0 unix:/run/user/1000/mesh/abcdef.sock", 20) == "0 unix…h/abcdef.sock"
    assert fit("a", 3) == "a  "


def test_events_are_listed_in_their_order_with_their_way() -> None:
    scene = scene_of(typical_run().encode())
    lines = list_events(scene.events, scene, NAMES)
    assert lines[1].split() == ["0.000", "client", "mark", "decode", "11.10"]
    served = [line.split() for line in lines if " serve " in line]
    assert served[1] == [
        *("4.000", "0", "server", "200", "serve", "GRAPH_AGAIN", "20", "B", "2.000", "1.000")
    ]
    assert max(map(len, lines)) <= WIDTH


def test_a_long_list_of_events_ends_in_how_many_more() -> None:
    run = Run(workers=1)
    for _ in range(30):
        run.ask(0, "SET_TENSOR", 9, 9)
    run.servers[0].add(1, "serve", "STRAY", seq=999)
    scene = scene_of(run.encode(), load=True)
    lines = list_events(scene.events, scene, NAMES)
    assert lines[-1].split() == ["…", "and", str(len(scene.events) - 60), "more", "events"]
    assert len(scene.round_trips()) == 30


def report_of(files: list[bytes], **wish: bool) -> tuple[str, dict[str, object], list[str]]:
    readings = first_readings(files)
    choice = choose(readings, token=None, load=wish.get("load", False))
    scene = scene_of(files, load=wish.get("load", False))
    paths = [f"{number}.tsv" for number in range(len(files))]
    text = "\n".join([*table_lines(columns(choice, scene, readings)), *hop_lines(scene, ENDPOINTS)])
    return text, json_report(choice, scene, readings, paths), notes(choice, scene, readings, paths)


def test_the_table_has_the_load_the_decode_and_the_median() -> None:
    text, facts, said = report_of(typical_run().encode())
    rows = {line[:26].strip(): line[26:].split() for line in text.splitlines() if line}
    assert rows["messages sent"] == ["4", "4", "4"]
    assert rows["bytes up"] == ["20", "B", "240", "B", "240", "B"]
    assert rows["synchronous round trips"] == ["2", "2", "2"]
    assert rows["one after another"] == ["2", "2", "2"], "each worker in its turn"
    assert rows["GRAPH_AGAIN"] == ["0", "2", "(2)", "2", "(2)"]
    assert rows["0 unix:/run/0.sock"][:2] == ["there", "1.000"]
    assert said == []
    typical = facts["typical"]
    assert isinstance(typical, dict)
    assert (typical["decodes"], typical["round_trips"]) == (5, 2)


def test_a_load_has_no_column_of_a_decode() -> None:
    text, facts, _ = report_of(typical_run().encode(), load=True)
    assert text.splitlines()[0].split() == ["load", "median", "of", "5"]
    shown = facts["shown"]
    assert isinstance(shown, dict)
    assert shown["decode"] is None


def test_a_trace_without_decodes_has_the_load_alone_and_servers_have_no_table() -> None:
    text, facts, _ = report_of([TraceText().encode()])
    assert text.splitlines()[0].split() == ["load"]
    assert facts["typical"] is None
    text, facts, _ = report_of(typical_run().encode()[1:])
    assert text == ""
    assert (facts["decodes"], facts["columns"]) == (0, [])


def test_a_thousand_commands_are_not_all_shown() -> None:
    run = Run(workers=1, hop_ms=0)
    for number in range(100):
        run.send(0, f"X{number}", 1)
    text, _, _ = report_of(run.encode())
    assert f"and {100 - tables_module.MAX_COMMANDS_SHOWN} more commands" in text
    assert "requests: 100" in text
    assert "back" not in text, "nothing was answered"


def test_what_is_wrong_with_a_file_is_said() -> None:
    run = Run(workers=1)
    run.decode()
    run.servers[0].start_ns -= 50 * MS
    files = run.encode()
    files[0] = files[0] + b"rubbish\n" + files[0] + b"rubbish\n5\t1"
    _, _, said = report_of(files, load=True)
    assert said[:3] == [
        "0.tsv: 2 broken lines were passed over",
        "0.tsv: its last line has no end and was passed over",
        "0.tsv: 2 runs wrote to it; this is the last one",
    ]
    assert said[3].startswith("1.tsv: its clock disagrees with the client's; moved by 50.00 ms")


def test_events_left_out_are_said_to_be() -> None:
    scene = Scene(Stretch(0, 1), (), (), 12345)
    said = notes(Choice("", "", scene.stretch), scene, [], [])
    assert said == ["12,345 events more than can be drawn were left out"]


def test_a_decode_as_svg_is_whole_and_fetches_nothing() -> None:
    scene = scene_of(typical_run().encode())
    text = draw_svg(scene, rows_of(scene), "decode <1> & more", describe_split(scene))
    root = ElementTree.fromstring(text)
    shown = "".join(root.itertext())
    for words in ("decode <1> & more", "0 unix:/run/0.sock", "server 201", "10 ms", "on the way"):
        assert words in shown
    kinds = [rect.get("class") for rect in root.iter("{http://www.w3.org/2000/svg}rect")]
    assert kinds.count("lane") == 5
    assert kinds.count("serve") == 2 + 1, "one a worker, and one in the legend"
    assert "prefers-color-scheme: dark" in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")


def test_every_kind_of_bar_has_room_in_the_legend() -> None:
    bars = tuple(Bar(kind, 0, 10, "<b>") for kind in Kind)
    scene = Scene(Stretch(0, 10), (), scene_of(typical_run().encode()).hops, 0)
    root = ElementTree.fromstring(draw_svg(scene, [Row("a", bars)], "t", "s"))
    for text in root.iter("{http://www.w3.org/2000/svg}text"):
        if text.get("x") != "980.0":
            assert float(text.get("x", 0)) + 6 * len(text.text or "") < 1000
    assert len(list(root.iter("{http://www.w3.org/2000/svg}line"))) < 20, "no hop without its lanes"


def test_a_drawing_of_a_hundred_thousand_messages_stays_small() -> None:
    bars = tuple(Bar(Kind.SEND, at, at, "send") for at in range(0, 10**8, 10**3))
    scene = Scene(Stretch(0, 10**8), (), (), 0)
    text = draw_svg(scene, [Row("a", bars)], "t", "s")
    assert len(text) < 20_000
    assert "100000 × send" in text


def test_without_a_client_only_servers_have_lanes() -> None:
    files = typical_run().encode()[1:]
    scene = scene_of(files)
    rows = make_rows(scene, {}, ["server 200", "server 201"])
    assert [row.label for row in rows] == ["server 200 0", "server 201 0"]
    assert "<svg" in draw_svg(scene, rows, "t", "s")


def test_the_split_in_words() -> None:
    assert describe_split(scene_of(typical_run().encode())) == (
        "the client works 3.100 ms (28%); it waits 4.000 ms (36%) while workers compute and "
        "4.000 ms (36%) for the wire"
    )
    assert describe_split(scene_of(typical_run().encode()[:1])).endswith("the workers and the wire")


def test_the_readings_agree_on_what_a_file_held() -> None:
    """A file that grew between them shows nothing that the first one did not see."""
    (client, *_) = typical_run().encode()
    reading = FirstReading(0)
    reading.receive(client)
    reading.finish()
    choice = choose([reading], token=None, load=False)
    second = SecondReading(reading, choice)
    second.receive(client + client)
    scene = make_scene(choice.stretch, [second.clipping], choice.pairs)
    assert len(scene.round_trips()) == 2


def test_what_takes_no_time_is_not_on_the_way() -> None:
    run = Run(workers=1, hop_ms=0)
    run.decode()
    scene = scene_of(run.encode())
    assert [hop.there_ns for hop in scene.hops] == [0, 0]
    assert "  on the way" not in [row.label for row in rows_of(scene)]
    assert "there 0.000 ms" in hop_lines(scene, {})[0]
