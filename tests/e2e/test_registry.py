"""Two workers with gateways: each answers for its own disk, and tells what the other holds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from meshnode.demo.nodes import NodeProcess
from meshnode.models.spans import Span
from meshnode.models.store.store import Store
from tests.e2e.conftest import ANY_HTTP, World
from tests.e2e.test_pulled_model import served
from tests.engine.synthetic import make_model
from tests.meshnode.gateway.test_model_pull import events_of

pytestmark = pytest.mark.engine

API = "/api/v1/models"


async def registry_of(node: NodeProcess) -> str:
    event = await node.wait_event("node", containing="its models:")
    return f"{event['url']}{API}"


def key_of(home: Path) -> dict[str, str]:
    printed = subprocess.run(
        [sys.executable, "-m", "meshnode.cli.main", "key", "--home", str(home)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return {"authorization": f"Bearer {printed.stdout.strip()}"}


async def model_held_by(http: httpx.AsyncClient, registry: str, *names: str) -> dict[str, Any]:
    """The one model, once a node knows that these hold it: lists are a few seconds old."""
    with trio.fail_after(30):
        while True:
            answer = await http.get(f"{registry}/registry?mesh=1")
            assert answer.status_code == 200, answer.text
            for row in answer.json()["models"]:
                holders = [holder["node"] for holder in row["holders"]]
                if row["name"] != "mesh-demo" and holders == list(names):
                    return dict(row)
            await trio.sleep(0.2)


async def test_workers_pull_by_http_and_know_what_the_other_holds(world: World) -> None:
    (world.folder / "served").mkdir()
    model = make_model(world.folder / "served" / "far.gguf", layers=4, width=256, ffn=512)
    content = model.read_bytes()
    with served(model, world.folder / "nginx") as url:
        async with (
            httpx.AsyncClient(timeout=60, trust_env=False) as http,
            world.worker(*ANY_HTTP, name="one") as one,
        ):
            joins = f"--join-file={await world.join_file(one)}"
            async with world.worker(*ANY_HTTP, joins, name="two") as two:
                await one.wait_event("peer", containing="two")
                source = url.replace("/", "%2F")
                for node, layers in ((one, "0:1"), (two, "1:output")):
                    answer = await http.post(
                        f"{await registry_of(node)}/{source}/pull",
                        json={"layers": layers},
                        headers=key_of(world.folder / node.name),
                    )
                    assert "event: held" in answer.text, answer.text
                    if node is one:
                        row = await model_held_by(http, await registry_of(two), "one")
                        assert any("blk.0." in name for name in row["holders"][0]["tensors"])
                row = await model_held_by(http, await registry_of(one), "one", "two")
                held = [set(holder["tensors"]) for holder in row["holders"]]
                assert any("blk.0." in name for name in held[0] - held[1])
                assert any("blk.3." in name for name in held[1] - held[0])
                data = f"{await registry_of(two)}/{row['id']}/data"
                assert (await http.get(data)).status_code == 401
                other_key = await http.get(data, headers=key_of(world.folder / "one"))
                assert other_key.status_code == 401, "each operator has a key of his own"
                for span in held_by(world.folder / "two")[:3]:
                    asked = {"range": f"bytes={span.start}-{span.stop - 1}"}
                    part = await http.get(data, headers={**key_of(world.folder / "two"), **asked})
                    assert part.content == content[span.start : span.stop]


async def test_one_request_has_several_nodes_pull(world: World) -> None:
    (world.folder / "served").mkdir()
    model = make_model(world.folder / "served" / "far.gguf", layers=4, width=256, ffn=512)
    with served(model, world.folder / "nginx") as url:
        async with (
            httpx.AsyncClient(timeout=60, trust_env=False) as http,
            world.worker(*ANY_HTTP, name="one") as one,
        ):
            joins = f"--join-file={await world.join_file(one)}"
            async with (
                world.worker(joins, name="two"),
                world.worker("--allow-pull=hub", joins, name="three"),
            ):
                for name in ("two", "three"):
                    await one.wait_event("peer", containing=name)

                async def pull(model: str, layers: str, *nodes: str) -> dict[str, Any]:
                    answer = await http.post(
                        f"{await registry_of(one)}/{model.replace('/', '%2F')}/pull",
                        json={"layers": layers, "nodes": nodes},
                        headers=key_of(world.folder / "one"),
                    )
                    assert answer.status_code == 200, answer.text
                    ends = [told for told in events_of(answer.text) if told[0] != "progress"]
                    return {told["node"]: (name, told) for name, told in ends}

                own = (await pull(url, "0:2", "one"))["one"][1]
                ends = await pull("far", "1:2", "one", "two", "three")
                assert {node: name for node, (name, _) in ends.items()} == {
                    "one": "held",
                    "two": "held",
                    "three": "failed",
                }
                assert "--allow-pull peers" in ends["three"][1]["error"]["message"]
                other = ends["two"][1]
                assert (other["id"], other["pulled_bytes"]) == (own["id"], other["held_bytes"])
                assert 0 < other["held_bytes"] < own["held_bytes"] < own["weight_bytes"]
                part = set(held_by(world.folder / "two"))
                assert part < set(held_by(world.folder / "one"))


def held_by(home: Path) -> list[Span]:
    (part,) = Store(home / "models").slices()
    return [Span(0, one.offset, one.offset + one.nbytes) for one in part.held]
