"""What is told of a deployment, how often, and what remains to be asked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import trio
import trio.testing

from meshnode.config import WireType
from meshnode.engine.load_report import ServerLoad
from meshnode.events import Event, Kind
from meshnode.gateway.view import Stage, WorkerProgress
from meshnode.pipeline.deployment import Deployed, Placement
from meshnode.pipeline.output import OutputChoice
from meshnode.pipeline.plan import Plan, PlanNode, Share
from meshnode.pipeline.speculation import Guesser, Speculation
from meshnode.pipeline.standing import Standing

SHARE = Share("tower", "CPU", 3, 8, True, 100, 10, 1)
LOAD = ServerLoad("unix:/x", 9, 900, 1, 100, 0, None)


def standing() -> tuple[Standing, list[Event]]:
    events: list[Event] = []
    one = Standing("glm", events.append)
    one.url = "http://127.0.0.1:8090"
    return one, events


def placement() -> Placement:
    plan = Plan((SHARE,), False, 6, (6,), ("RPC0",), ("tower",))
    local = PlanNode("local", True, ())
    return Placement(local, Path("glm.gguf"), "glm", plan, (), None, 4096, 1, None, ())


def test_what_guesses_ahead_is_told_with_the_plan_and_can_be_asked_for() -> None:
    one, events = standing()
    one.planned(placement())
    assert [event.text for event in events] == ["plan: tower (CPU) computes layers 3-7 and output"]
    assert one.deployment_status()["speculation"]["guesser"] == "off"
    guesses = Speculation(Guesser.NGRAM, "repeated text needs fewer trips over the wire")
    one.planned(replace(placement(), speculation=guesses))
    assert events[-1].text == f"plan: repeated text is guessed ahead: {guesses.why}"
    told = {"guesser": "ngram", "why": guesses.why}
    assert events[-1].data == told
    assert one.deployment_status()["speculation"] == told


def test_numbers_that_cross_the_wire_inexactly_are_told() -> None:
    one, events = standing()
    one.planned(replace(placement(), wire_type=WireType.Q8))
    assert events[-1].text == "plan: activations cross the wire as q8, not exactly"
    assert one.deployment_status()["wire_dtype"] == "q8"
    alone = replace(placement().plan, alone=True)
    one.planned(replace(placement(), plan=alone, wire_type=WireType.Q8))
    assert "wire" not in events[-1].text


def test_where_the_output_computes_is_told_with_its_reason() -> None:
    one, events = standing()
    output = OutputChoice("CPU", "the output stays here, as told")
    one.planned(replace(placement(), plan=replace(placement().plan, output=output)))
    assert events[-1].text == "plan: the output stays here, as told"


def deployed() -> Deployed:
    server = cast("Any", SimpleNamespace(socket_path=Path("/run/llama.sock")))
    return Deployed(server, {"tower": LOAD})


def test_waiting_is_told_once_and_again_after_it_was_ready() -> None:
    one, events = standing()
    for _ in range(3):
        one.enter(Stage.PLANNING, "asking")
        one.withdraw("no worker is connected", "waiting for workers")
    assert [event.kind for event in events] == [Kind.STAGE, Kind.WARNING]
    one.ready(deployed(), embeddings=False)
    one.withdraw("no worker is connected", "waiting for workers")
    assert [event.kind for event in events[2:]] == [Kind.READY, Kind.WARNING]


def test_the_reason_of_a_loss_outlasts_the_next_stage() -> None:
    one, _ = standing()
    one.ready(deployed(), embeddings=False)
    loss = one.loss()
    one.withdraw("the lease on tower ended\n  a line of a log", "trying again")
    one.enter(Stage.PLANNING, "asking")
    assert loss.happened.is_set()
    assert loss.health
    assert loss.health.message == "the lease on tower ended; trying again"
    assert one.upstream() is None


def test_who_asks_later_still_learns_what_happened() -> None:
    one, _ = standing()
    one.ready(deployed(), embeddings=False)
    one.withdraw("the lease on tower ended", "trying again")
    one.enter(Stage.PLANNING, "asking")
    assert one.health().message == "asking (the lease on tower ended)"
    one.ready(deployed(), embeddings=False)
    one.enter(Stage.PLANNING, "asking")
    assert one.health().message == "asking"


def test_each_server_has_a_generation_and_a_loss_of_its_own() -> None:
    one, _ = standing()
    one.ready(deployed(), embeddings=False)
    first, first_loss = one.upstream(), one.loss()
    one.withdraw("lost", "trying again")
    one.ready(deployed(), embeddings=True)
    second = one.upstream()
    assert first
    assert second
    assert second.generation == first.generation + 1
    assert (first.embeddings, second.embeddings) == (False, True)
    assert one.loss() is not first_loss


def test_what_is_lost_is_withdrawn_until_the_next_plan() -> None:
    one, _ = standing()
    one.planned(placement())
    assert not one.is_answering
    one.ready(deployed(), embeddings=False)
    with one.held_up("the worker is silent"):
        assert one.upstream() is None
        assert one.is_answering, "those who wait already go on"
    one.withdraw("lost", "trying again")
    assert one.is_withdrawn
    assert not one.is_answering
    one.planned(placement())
    assert not one.is_withdrawn
    assert one.times_ready == 1


def test_the_status_is_json_and_says_what_came_from_where() -> None:
    one, events = standing()
    one.planned(placement())
    one.ready(deployed(), embeddings=False)
    one.record_generation(20, 2.0)
    status = json.loads(json.dumps(one.deployment_status()))
    assert status["load"][0] == {
        "node": "tower",
        "local_tensors": 9,
        "local_bytes": 900,
        "sent_tensors": 1,
        "sent_bytes": 100,
    }
    assert (status["layers"][0]["first"], status["layers"][0]["last"]) == (3, 8)
    assert status["tokens_per_s"] == 10.0
    assert "tower (CPU) computes layers 3-7 and output" in events[0].text


def test_the_workers_progress_is_there_until_the_model_answers() -> None:
    one, _ = standing()
    one.progress(Stage.LOADING, "loading glm", 0.5, (WorkerProgress("tower", 1, 2),))
    told = [{"node": "tower", "done_bytes": 1, "total_bytes": 2}]
    assert json.loads(json.dumps(one.deployment_status()))["health"]["workers"] == told
    one.ready(deployed(), embeddings=False)
    assert one.health().workers == ()


async def test_a_deployment_is_quiet_when_no_request_was_in_flight_for_a_while(
    autojump_clock: trio.testing.MockClock,
) -> None:
    one, _ = standing()
    await one.wait_until_quiet(3)
    assert trio.current_time() == 0, "nobody misses what does not answer yet"
    one.ready(deployed(), embeddings=False)
    one.begin_request()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.wait_until_quiet, 3)
        await trio.sleep(100)
        one.begin_request()
        one.end_request()
        await trio.sleep(100)
        one.end_request()
        await trio.sleep(2)
        one.begin_request()
        one.end_request()
    assert trio.current_time() == 205


async def test_nobody_waits_for_quiet_once_the_deployment_is_lost(
    autojump_clock: trio.testing.MockClock,
) -> None:
    one, _ = standing()
    one.ready(deployed(), embeddings=False)
    one.begin_request()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.wait_until_quiet, 3)
        await trio.sleep(10)
        one.withdraw("the worker died", "trying again")
        one.end_request()
    assert trio.current_time() == 10
