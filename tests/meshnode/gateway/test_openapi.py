"""The OpenAPI document is right: what it tells is what there is, whatever is sent."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import schemathesis
import trio
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from meshnode.gateway.openapi import PATH, openapi_document
from meshnode.gateway.operations import OPERATIONS
from tests.meshnode.gateway.model_node import KEY, ModelNode, open_model_node
from tests.meshnode.models.store.slices import make_whole

CASES = 40
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
SCHEMA = schemathesis.openapi.from_dict(openapi_document())
FOUND: list[Any] = [found.ok() for found in cast(Any, SCHEMA.get_all_operations())]
ALL = {operation.label: operation for operation in FOUND}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A gateway that runs beside the test, which blocks; it has a model and a part of one."""
    home = tmp_path_factory.mktemp("node")
    started, stopped = threading.Event(), trio.Event()
    told: dict[str, Any] = {}

    async def serve() -> None:
        async with open_model_node(home) as node:
            node.put("whole.gguf", shards=2)
            whole = make_whole(home / "source")
            node.put_part(whole, whole.names("blk.1."))
            node.web.is_there = False  # so that it stays a part
            told["address"] = str(node.http.base_url).rstrip("/")
            told["token"] = trio.lowlevel.current_trio_token()
            started.set()
            await stopped.wait()

    thread = threading.Thread(target=lambda: trio.run(serve), daemon=True)
    thread.start()
    assert started.wait(30)
    yield told["address"]
    told["token"].run_sync_soon(stopped.set)
    thread.join(30)
    assert not thread.is_alive()


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("name", [None, "whole", "m"])
@pytest.mark.parametrize("label", sorted(ALL))
def test_every_answer_is_one_that_the_document_tells(
    label: str, name: str | None, mode: GenerationMode, address: str
) -> None:
    """name: a model that is there, or whatever the generator thinks of."""
    operation = ALL[label]
    if name and "{id}" not in operation.path:
        return

    @settings(
        max_examples=CASES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        if name:
            case.path_parameters["id"] = name
        headers = {"authorization": f"Bearer {KEY}"}
        case.call_and_validate(base_url=address, headers=headers, checks=CHECKS, timeout=20)

    check()


@pytest.mark.parametrize("name", ["whole", "m"])
@pytest.mark.parametrize("label", sorted(ALL))
def test_models_that_are_there_have_the_shapes_that_are_told(
    label: str, name: str, address: str
) -> None:
    operation = ALL[label]
    parameters: dict[str, Any] = {"id": name} if "{id}" in operation.path else {}
    case = operation.Case(path_parameters=parameters)
    if operation.body:
        case.body, case.media_type = {}, "application/json"
    headers = {"authorization": f"Bearer {KEY}"}
    answer = case.call_and_validate(base_url=address, headers=headers, checks=CHECKS, timeout=20)
    is_of_a_part = (label, name) == ("GET /api/v1/models/{id}/data", "m")
    assert answer.status_code == (404 if is_of_a_part else 200)


async def test_the_gateway_serves_the_document_and_every_route_in_it(node: ModelNode) -> None:
    answer = await node.http.get(PATH)
    assert answer.status_code == 200
    told = answer.json()
    assert told == json.loads(json.dumps(openapi_document()))
    assert told["openapi"] == "3.1.0"
    for one in OPERATIONS:
        assert one.method.lower() in told["paths"][one.path]
        found = await node.http.request(one.method, one.path.replace("{id}", "x"), json={})
        assert found.status_code != 405
        assert found.json().get("error", {}).get("code") != "unknown_route"


def test_the_page_names_every_route() -> None:
    page = (Path(__file__).parents[3] / "docs" / "registry.md").read_text()
    for path in (PATH, *(one.path for one in OPERATIONS)):
        assert path in page
