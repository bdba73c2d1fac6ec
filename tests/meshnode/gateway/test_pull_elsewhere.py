"""A pull over HTTP on other nodes: each is told of by its name, and none holds up another."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from meshnode.errors import NetworkError
from meshnode.gateway import pull_events
from meshnode.models.peers.overview import Model, Share
from tests.meshnode.gateway.model_node import ROOT, ModelNode
from tests.meshnode.gateway.test_answers import error_of
from tests.meshnode.gateway.test_model_pull import FAR, events_of, pull
from tests.meshnode.models.store.slices import SOURCE as SLICE_SOURCE
from tests.meshnode.models.store.slices import make_whole
from tunnels import PeerId

SOURCE = "https://example.org/far.gguf"


@asynccontextmanager
async def following(
    node: ModelNode, model: str = FAR, **fields: Any
) -> AsyncIterator[AsyncIterator[str]]:
    """The lines of the answer, as they come."""
    url = f"{ROOT}/{model}/pull"
    async with node.http.stream("POST", url, json=fields) as answer:
        assert answer.status_code == 200
        yield answer.aiter_lines()


async def until(lines: AsyncIterator[str], wanted: str) -> None:
    async for line in lines:
        if wanted in line:
            return
    pytest.fail(f"the answer ended without {wanted!r}")


async def test_another_node_pulls_from_the_source_that_was_named(node: ModelNode) -> None:
    node.tower.go_on.set()
    answer = await pull(node, nodes=["tower"], layers="0:1")
    told = events_of(answer.text)
    assert [name for name, _ in told][-1] == "held"
    assert {(one["node"], one["peer"]) for _, one in told} == {("tower", "peer-of-tower")}
    assert node.tower.asked == [(SOURCE, "0:1")]
    assert node.web.asked == [], "this node fetched nothing"


async def test_two_nodes_pull_at_once_and_each_has_an_ending(node: ModelNode) -> None:
    async with following(node, nodes=["attic", "tower"]) as lines:
        await until(lines, '"complete": true')  # attic's, while tower has not gone on
        assert not node.tower.go_on.is_set()
        node.tower.go_on.set()
        await until(lines, "event: held")
        assert [line async for line in lines if line][-1].endswith('"peer": "peer-of-tower"}')


async def test_a_node_that_fails_leaves_the_others_alone(node: ModelNode) -> None:
    node.tower.failure = NetworkError("tower pulls nothing from web servers: start it with …")
    node.tower.go_on.set()
    endings = {
        one["node"]: (name, one)
        for name, one in events_of((await pull(node, nodes=["tower", "attic"])).text)
        if name != "progress"
    }
    assert endings["attic"][0] == "held"
    name, told = endings["tower"]
    assert (name, told["error"]["code"]) == ("failed", "pull_failed")
    assert "pulls nothing from web servers" in told["error"]["message"]


async def test_a_node_is_asked_once_whatever_it_is_called(node: ModelNode) -> None:
    node.tower.go_on.set()
    names = ["tower", "peer-of-tower", "tower", "attic", "peer-of-attic"]
    told = events_of((await pull(node, nodes=names)).text)
    assert sorted(one["node"] for name, one in told if name == "held") == ["attic", "tower"]
    assert len(node.tower.asked) == 1


async def test_what_is_here_others_take_from_here_and_the_rest_from_the_web(
    node: ModelNode, tmp_path: Path
) -> None:
    node.tower.go_on.set()
    whole = make_whole(tmp_path / "source")
    node.put_part(whole, whole.names("blk.0."))
    node.put("whole.gguf")
    ids = {
        name: (await node.http.get(f"{ROOT}/{name}/metadata")).json()["id"]
        for name in ("m", "whole")
    }
    for model, layers in (("m", "0"), ("m", "1"), ("whole", None)):
        answer = await pull(node, model, nodes=["tower"], layers=layers)
        assert "event: held" in answer.text
    assert node.tower.asked == [
        (f"mesh:{ids['m']}", "0"),
        (SLICE_SOURCE, "1"),
        (f"mesh:{ids['whole']}", None),
    ]


@pytest.mark.parametrize("names", [["cellar"], ["tower", "cellar"], [""], ["../attic"]])
async def test_a_node_that_nobody_knows_is_told_before_anything_is_pulled(
    node: ModelNode, names: list[str]
) -> None:
    answer = await pull(node, nodes=names)
    assert (answer.status_code, error_of(answer)["code"]) == (404, "unknown_node")
    assert (node.tower.asked, node.web.asked) == ([], [])


async def test_where_another_has_this_nodes_name_ids_tell_them_apart(node: ModelNode) -> None:
    node.tower.names = ("attic", "peer-of-tower")
    node.tower.go_on.set()
    answer = await pull(node, nodes=["attic"])
    assert (answer.status_code, error_of(answer)["code"]) == (400, "bad_request")
    told = events_of((await pull(node, nodes=["peer-of-attic", "peer-of-tower"])).text)
    assert sorted(one["peer"] for name, one in told if name == "held") == [
        "peer-of-attic",
        "peer-of-tower",
    ]


async def test_what_members_have_is_a_source_too(node: ModelNode) -> None:
    node.tower.go_on.set()
    assert "event: held" in (await pull(node, "mesh:far", nodes=["tower"])).text
    assert node.tower.asked == [("mesh:far", None)]
    *_, (name, told) = events_of((await pull(node, "mesh:far")).text)
    assert (name, told["error"]["code"]) == ("failed", "pull_failed")
    assert "asks no members" in told["error"]["message"]


async def test_a_client_that_leaves_ends_the_pulls_of_all(node: ModelNode) -> None:
    async with following(node, nodes=["tower"]) as lines:
        await until(lines, "progress")
    with trio.fail_after(10):
        await node.tower.left.wait()


async def test_while_nothing_is_new_a_comment_keeps_the_connection(
    node: ModelNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull_events, "KEEPALIVE_S", 0.01)
    monkeypatch.setattr(pull_events, "PROGRESS_S", 0.01)
    async with following(node, nodes=["tower"]) as lines:
        await until(lines, ": the pull goes on")
        node.tower.go_on.set()
        await until(lines, "event: held")


async def test_who_does_not_read_holds_up_nobody(node: ModelNode) -> None:
    node.tower.go_on.set()
    async with following(node, nodes=["tower"]):
        with trio.fail_after(10):
            await node.tower.done.wait()
    assert (await node.http.get(f"{ROOT}/registry")).status_code == 200


async def test_a_model_that_only_members_have_is_pulled_as_the_list_names_it(
    node: ModelNode,
) -> None:
    node.tower.go_on.set()
    peer = PeerId(bytes(range(32)))
    shares = [Share("tower", peer, "a" * 64, 3, complete=True)]
    node.elsewhere = [
        Model(("far", "ann/Far"), "a" * 64, "b" * 64, shares),
        Model(("new",), "c" * 64, None, shares),
        *(Model(("both",), letter * 64, None, shares) for letter in "de"),
    ]
    for name, identity in {
        **dict.fromkeys(("far", "ann%2Ffar", "a" * 64, "B" * 64), "b" * 64),
        **dict.fromkeys(("NEW", "c" * 64), "c" * 64),
        "e" * 64: "e" * 64,
    }.items():
        answer = await pull(node, name, nodes=["tower"], layers="0:1")
        assert [name for name, _ in events_of(answer.text)][-1] == "held", name
        assert node.tower.asked[-1] == (f"mesh:{identity}", "0:1")
    for name, status, code in (
        ("fa", 404, "unknown_model"),
        ("0" * 64, 404, "unknown_model"),
        ("both", 409, "ambiguous_model"),
    ):
        answer = await pull(node, name, nodes=["tower"])
        assert (answer.status_code, error_of(answer)["code"]) == (status, code)
