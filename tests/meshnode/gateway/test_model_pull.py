"""A pull over HTTP: for the operator alone, told as it goes, and nothing lost where it was cut."""

from __future__ import annotations

import json
from typing import Any

import httpx
import jsonschema_rs
import pytest
import trio
import trio.testing

from meshnode.gateway.operations import PULL_EVENTS
from meshnode.models.store.store import Store
from meshnode.pipeline import user_pulls
from tests.meshnode.gateway.model_node import KEY, ROOT, ModelNode, listed
from tests.meshnode.gateway.test_answers import error_of
from tests.meshnode.models.store.slices import make_whole

FAR = "https:%2F%2Fexample.org%2Ffar.gguf"


SHAPES = {name: jsonschema_rs.validator_for(dict(shape)) for name, shape in PULL_EVENTS.items()}


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Name and data of each; comments are left out."""
    found = []
    for event in text.split("\n\n"):
        lines = [line for line in event.split("\n") if line and not line.startswith(":")]
        if lines:
            name, data = lines
            told, name = json.loads(data.removeprefix("data: ")), name.removeprefix("event: ")
            SHAPES[name].validate(told)  # as the OpenAPI document has it
            found.append((name, told))
    return found


async def pull(node: ModelNode, model: str = FAR, **fields: Any) -> httpx.Response:
    return await node.http.post(f"{ROOT}/{model}/pull", json=fields)


async def ending_of(node: ModelNode, model: str = FAR, **fields: Any) -> tuple[str, dict[str, Any]]:
    answer = await pull(node, model, **fields)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    *progress, ending = events_of(answer.text)
    assert {name for name, _ in progress} <= {"progress"}
    return ending


async def test_a_model_that_nobody_has_comes_from_its_source(node: ModelNode) -> None:
    name, held = await ending_of(node)
    assert name == "held"
    assert (held["node"], held["peer"], held["complete"]) == ("attic", "peer-of-attic", True)
    (row,) = await listed(node)
    assert (row["id"], row["source"]) == (held["id"], "https://example.org/far.gguf")
    assert (await node.data("far")).content == node.web.path.read_bytes()


async def test_some_layers_come_alone_and_more_by_the_models_own_name(node: ModelNode) -> None:
    _, first = await ending_of(node, layers="0:1")
    assert 0 < first["held_bytes"] < first["weight_bytes"]
    _, again = await ending_of(node, "far", layers="1", nodes=["attic"])
    assert again["held_bytes"] == first["held_bytes"]
    _, whole = await ending_of(node, first["id"])
    assert whole["complete"]


async def test_progress_is_told_in_bytes(node: ModelNode) -> None:
    answer = await pull(node)
    *progress, (_, held) = events_of(answer.text)
    assert progress, "at least the first word"
    for _, told in progress:
        assert 0 <= told["done_bytes"] <= told["total_bytes"]
        assert told["node"] == "attic"
        assert (told["bytes_per_s"] or 0.0) >= 0.0
    assert progress[-1][1]["eta_s"] == 0.0
    assert held["held_bytes"] == held["weight_bytes"]


async def test_of_a_whole_model_nothing_is_asked(node: ModelNode) -> None:
    node.put()
    name, held = await ending_of(node, "m")
    assert (name, held["complete"]) == ("held", True)
    assert node.web.asked == []


async def test_a_source_that_is_gone_is_told_in_the_last_event(node: ModelNode) -> None:
    node.web.is_there = False
    name, told = await ending_of(node)
    assert name == "failed"
    assert told["error"]["code"] == "pull_failed"
    assert "nobody answers" in told["error"]["message"]
    assert await listed(node) == []


async def test_a_client_that_leaves_ends_its_pull_and_what_came_stays(
    node: ModelNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, left = trio.Event(), trio.Event()
    read = type(node.web).read

    async def stall(source: Any, file_index: int, start: int, stop: int, into: Any) -> None:
        if await trio.to_thread.run_sync(lambda: bool(list(Store(node.home / "models").slices()))):
            reading.set()
            try:
                await trio.sleep_forever()
            finally:
                left.set()
        await read(source, file_index, start, stop, into)

    monkeypatch.setattr(type(node.web), "read", stall)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pull, node)
        await reading.wait()
        nursery.cancel_scope.cancel()
    with trio.fail_after(10):
        await left.wait()
    monkeypatch.undo()
    assert (await ending_of(node))[1]["complete"]


async def test_so_many_pulls_that_wait_are_enough(
    node: ModelNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(user_pulls, "MAX_ASKED", 0)
    name, told = await ending_of(node)
    assert (name, told["error"]["code"]) == ("failed", "gateway_busy")


@pytest.mark.parametrize("shown", ["", f"Bearer {KEY[:-1]}x", f"Basic {KEY}"])
async def test_without_the_key_nothing_is_pulled(node: ModelNode, shown: str) -> None:
    headers = {"authorization": shown}
    answer = await node.http.post(f"{ROOT}/{FAR}/pull", json={}, headers=headers)
    assert (answer.status_code, error_of(answer)["code"]) == (401, "key_needed")
    assert node.web.asked == []


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_what_a_page_can_send_without_asking_pulls_nothing_even_with_the_key(
    node: ModelNode, kind: str
) -> None:
    headers = {"content-type": kind}
    answer = await node.http.post(f"{ROOT}/{FAR}/pull", content=b"{}", headers=headers)
    assert (answer.status_code, error_of(answer)["code"]) == (415, "not_json")
    foreign = {"origin": "http://evil.example"}
    answer = await node.http.post(f"{ROOT}/{FAR}/pull", json={}, headers=foreign)
    assert (answer.status_code, error_of(answer)["code"]) == (403, "forbidden_origin")
    assert node.web.asked == []


@pytest.mark.parametrize(
    "fields",
    [
        *({"layers": 3}, {"layers": ["0:1"]}, {"layers": "9"}, {"layers": "x"}, {"layers": ""}),
        *({"nodes": "attic"}, {"nodes": [1]}, {"nodes": {}}, {"quickly": True}),
    ],
)
async def test_a_body_that_makes_no_sense_is_refused(
    node: ModelNode, tmp_path: Any, fields: dict[str, Any]
) -> None:
    node.put_part(make_whole(tmp_path / "source"), [])
    answer = await pull(node, "m", **fields)
    assert (answer.status_code, error_of(answer)["code"]) == (400, "bad_request")


@pytest.mark.parametrize(
    ("model", "status"),
    [
        ("nothing", 404),
        ("file:%2F%2F%2Fetc%2Fpasswd", 404),
        ("..%2F..%2Fetc%2Fpasswd", 404),
        ("hf:nothing", 400),
        ("http:%2F%2F", 400),
        ("https:%2F%2Fexample.org%2F%0d%0aHost: x", 404),
    ],
)
async def test_what_is_neither_model_nor_source_is_refused(
    node: ModelNode, model: str, status: int
) -> None:
    answer = await pull(node, model)
    assert answer.status_code == status, answer.text
    assert node.web.asked == []


@pytest.mark.parametrize(("before", "behind"), [("ann:hunter2@", ""), ("", "%3Ftoken=hunter2")])
async def test_an_address_that_may_hold_a_secret_is_refused_and_not_repeated(
    node: ModelNode, before: str, behind: str
) -> None:
    secret = f"https:%2F%2F{before}example.org%2Ffar.gguf{behind}"
    answer = await pull(node, secret, layers="0")
    assert (answer.status_code, error_of(answer)["code"]) == (400, "bad_request")
    assert "mesh pull" in str(error_of(answer)["message"])
    assert "hunter" not in answer.text
    assert node.web.asked == []
