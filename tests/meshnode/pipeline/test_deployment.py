"""One deployment beside a llama-server of our own: what it tells while it loads and as it ends."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import trio

from meshnode.config import Address
from meshnode.engine.cache import Engine
from meshnode.engine.errors import EngineFailed
from meshnode.errors import MeshError
from meshnode.events import Event, Kind
from meshnode.gateway.view import WorkerProgress
from meshnode.nurseries import accompanied_by
from meshnode.pipeline.borrow import LeaseLost, ask_facts
from meshnode.pipeline.deployment import Deployed, Deployment, Placement
from meshnode.pipeline.plan import Plan, PlanNode, Share
from meshnode.pipeline.ring import Pair, Ring, RingLost
from meshnode.pipeline.survey import Lender
from tests.lab.lenders import Town

START_LIMIT_S = 60

# Reports a load of two servers, answers /health once, and ends.
LLAMA_SERVER = """#!{python}
import http.server, json, os, socketserver, sys
def say(**event):
    with open(os.environ["GGML_RPC_MESH_REPORT"], "a") as report:
        report.write(json.dumps(event) + "\\n")
def of_server(server, done, total):
    say(event="server_progress", server=server, done_bytes=done, total_bytes=total)
of_server("192.0.2.1:50052", 30, 100)
of_server("192.0.2.2:50052", 20, 0)
say(event="progress", done_bytes=60, total_bytes=200)
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_):
        pass
    def address_string(self):
        return ""
socket = sys.argv[sys.argv.index("--host") + 1]
socketserver.UnixStreamServer(socket, Answer).handle_request()
"""

# Answers as long as it lives, and does not end when it is told to.
STUBBORN_LLAMA_SERVER = LLAMA_SERVER.replace("handle_request", "serve_forever").replace(
    "def say", "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ndef say"
)


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a path short enough for a unix socket."""
    with tempfile.TemporaryDirectory(prefix="mesh-", dir="/tmp") as name:
        yield Path(name)


def engine_of(script: str, folder: Path) -> Engine:
    program = folder / "llama-server"
    program.write_text(script.format(python=sys.executable))
    program.chmod(0o755)
    return Engine(folder, "key", "cpu", False, "source", "c++", "cpu")


def placement(folder: Path) -> Placement:
    lenders = tuple(
        Lender(name, None, None, Address(f"192.0.2.{index}", 50052))
        for index, name in enumerate(("tower", "attic"), 1)
    )
    shares = tuple(Share(lender.name, "CPU", 0, 1, False, 80, 10, 1) for lender in lenders)
    plan = Plan(shares, False, 2, (1, 1), ("RPC0", "RPC1"), ("tower", "attic"))
    local = PlanNode("local", True, ())
    return Placement(local, folder / "m.gguf", "glm", plan, lenders, None, 512, 1, None, ())


async def test_each_workers_progress_is_shown_and_told(short: Path) -> None:
    events = list[Event]()
    shown = list[tuple[str, float | None, tuple[WorkerProgress, ...]]]()
    ready = list[Deployed]()
    deployment = Deployment(
        placement(short),
        engine=engine_of(LLAMA_SERVER, short),
        runtime_folder=short,
        log_folder=short,
        emit=events.append,
        on_step=lambda _stage, *step: shown.append(step),
    )
    with trio.fail_after(START_LIMIT_S), pytest.raises(EngineFailed):
        await deployment.run(ready.append)
    assert ready
    # 80 is what the plan gives the one of which llama-server does not know the total
    workers = (WorkerProgress("tower", 30, 100), WorkerProgress("attic", 20, 80))
    assert shown[-1] == ("loading glm", 0.3, workers)
    told = [event for event in events if event.kind is Kind.PROGRESS]
    assert [event.text for event in told] == [
        "tower has loaded 30 B of 100 B",
        "attic has loaded 20 B of 80 B",
    ]
    assert told[0].data == {"node": "tower", "done_bytes": 30, "total_bytes": 100}


async def test_a_lost_lease_is_told_before_its_llama_server_is_ended(short: Path) -> None:
    """A server may hang, as one does whose client reads nothing: nobody waits for its end."""
    servers = list[int]()
    told = list[str]()
    ready = trio.Event()

    def on_ready(deployed: Deployed) -> None:
        servers.append(deployed.server.child.pid)
        ready.set()

    def on_loss(error: MeshError) -> None:
        told.append(str(error))
        os.kill(servers[0], signal.SIGKILL)  # it is there still, and would stay for its grace

    town = Town(short)
    async with town.lender("tower") as tower, town.borrower() as borrower:
        session = await borrower.session(tower)
        lender = Lender("tower", session, await ask_facts(session))
        plan = Plan(
            (Share("tower", "CPU", 0, 2, True, 80, 10, 1),), False, 3, (1,), ("RPC0",), ("tower",)
        )
        deployment = Deployment(
            replace(placement(short), plan=plan, lenders=(lender,), manifest=await town.manifest()),
            engine=replace(engine_of(STUBBORN_LLAMA_SERVER, short), key="stand-in"),
            runtime_folder=short,
            log_folder=short,
            emit=lambda _event: None,
            on_step=lambda *_: None,
            on_loss=on_loss,
        )

        async def lose_it() -> None:
            await ready.wait()
            (at_worker,) = tower.endpoint.sessions()
            at_worker.end("the user wants it so")

        with trio.fail_after(START_LIMIT_S), pytest.raises(LeaseLost) as raised:
            async with accompanied_by(lose_it):
                await deployment.run(on_ready)
    assert told == [str(raised.value)]
    assert "the lease on tower ended" in told[0]


async def test_a_lost_ring_is_told_at_once_too(short: Path) -> None:
    told = list[MeshError]()
    lost = RingLost("tower lost its way to attic", cast(Pair, None))

    class Lost:
        async def run(self) -> None:
            raise lost

    deployment = Deployment(
        placement(short),
        engine=engine_of(LLAMA_SERVER, short),
        runtime_folder=short,
        log_folder=short,
        emit=lambda _event: None,
        on_step=lambda *_: None,
        on_loss=told.append,
    )
    with pytest.raises(RingLost):
        await deployment._keep(cast(Ring, Lost()))
    assert told == [lost]
