"""What a user sees: lines for people, lines for programs, a live view on a terminal."""

from __future__ import annotations

import io
import json

import pytest
import trio
import trio.testing
from rich.console import Console

from meshnode.cli.views import JsonView, LiveView, PlainView, choose_view
from meshnode.events import Event, Kind

STATUS = {
    "peers": [
        {
            "name": "tower",
            "link": "quic",
            "address": "192.0.2.7:4433",
            "rtt_ms": 1.25,
            "bytes_in": 2**20,
            "bytes_out": 3 * 2**20,
        },
        {"name": "[/red]", "link": None, "address": None, "rtt_ms": None},
    ],
    "layers": [
        {"node": "local", "device": "CPU", "first": 0, "last": 0, "weight_bytes": 2**20},
        {"node": "tower", "device": "CUDA0", "first": 0, "last": 8, "output": True},
    ],
    "health": {"stage": "loading", "progress": 0.5},
    "tokens_per_s": 12.34,
}


def test_a_program_reads_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    JsonView().emit(Event(Kind.READY, "ready:\nhere", {"url": "http://127.0.0.1:1"}))
    (line,) = capsys.readouterr().out.splitlines()
    record = json.loads(line)
    assert (record["event"], record["text"], record["url"]) == (
        "ready",
        "ready:\nhere",
        "http://127.0.0.1:1",
    )


def test_a_warning_is_marked_in_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    PlainView().emit(Event(Kind.PEER, "connected"))
    PlainView().emit(Event(Kind.WARNING, "lost"))
    assert capsys.readouterr().out == "connected\nwarning: lost\n"


def test_output_that_is_no_terminal_gets_plain_lines() -> None:
    assert isinstance(choose_view("auto"), PlainView)
    assert isinstance(choose_view("plain"), PlainView)
    assert isinstance(choose_view("json"), JsonView)


def console_on(text: io.StringIO) -> Console:
    return Console(file=text, width=100, force_terminal=False)


def test_the_live_view_shows_peers_layers_progress_and_speed() -> None:
    text = io.StringIO()
    view = LiveView(console_on(text))
    view.emit(Event(Kind.STAGE, "loading glm"))
    console_on(text).print(view.render(STATUS))
    shown = text.getvalue()
    for words in (
        "loading glm",
        "192.0.2.7:4433",
        "[/red]",
        "1.2 ms",
        "3.0 MiB",
        "0-7 and output",
        "none",
    ):
        assert words in shown
    assert "loading 50%" in shown
    assert "12.3 tok/s" in shown


def test_the_live_view_shows_how_far_each_worker_is() -> None:
    workers = [{"node": "tower", "done_bytes": 2**20, "total_bytes": 4 * 2**20}]
    health = {"stage": "loading", "progress": 0.5, "workers": workers}
    text = io.StringIO()
    view = LiveView(console_on(text))
    view.emit(Event(Kind.PROGRESS, "tower has loaded 1.0 MiB of 4.0 MiB", workers[0]))
    console_on(text).print(view.render(STATUS | {"health": health}))
    shown = text.getvalue()
    assert "loaded" in shown.splitlines()[3]
    assert "1.0 MiB of 4.0 MiB (25%)" in shown
    assert "has loaded" not in shown, "the table has it"


def test_a_node_with_two_devices_tells_its_progress_once() -> None:
    layers = [{"node": "tower", "device": f"CUDA{i}", "first": i, "last": i + 1} for i in (0, 1)]
    health = {"stage": "leasing", "workers": [{"node": "tower", "done_bytes": 0, "total_bytes": 0}]}
    text = io.StringIO()
    console_on(text).print(LiveView(console_on(text)).render({"layers": layers, "health": health}))
    assert text.getvalue().count("0.0 MiB") == 1
    assert "digested" in text.getvalue()


def test_a_worker_without_a_model_shows_no_empty_tables() -> None:
    text = io.StringIO()
    console_on(text).print(LiveView(console_on(text)).render({"peers": []}))
    assert text.getvalue().strip() == ""


async def test_an_invite_stays_on_screen_whole(autojump_clock: trio.testing.MockClock) -> None:
    text = io.StringIO()
    view = LiveView(console_on(text))
    line = "mesh serve join=mesh1" + "q" * 220
    with trio.move_on_after(1):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(view.run, lambda: STATUS)
            await trio.sleep(0.5)
            view.emit(Event(Kind.INVITE, line))
    assert line in text.getvalue(), "on one line, to be copied"
