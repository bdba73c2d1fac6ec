"""The OpenAPI 3.1 document of the registry API, made from its table (`operations`)."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from meshnode.gateway.operations import (
    BYTES,
    JSON,
    OPERATIONS,
    SCHEMAS,
    Answer,
    Operation,
    Parameter,
    Refusals,
    Schema,
)

PATH = "/api/v1/openapi.json"
_ANY_REQUEST: Refusals = {
    403: ("forbidden_host", "forbidden_origin"),
    500: ("internal_error",),
}
_WITHOUT_KEY: Refusals = {401: ("key_needed",)}
_KEY = "operator_key"
_HEADERS = {
    "ETag": "Names the very bytes.",
    "Accept-Ranges": "bytes",
    "Content-Disposition": "The file's name.",
    "Content-Range": "Which bytes, of how many.",
}


def openapi_document() -> dict[str, Any]:
    """Ready for JSON."""
    paths: dict[str, dict[str, Any]] = {}
    for one in OPERATIONS:
        paths.setdefault(one.path, {})[one.method.lower()] = _operation(one)
        if one.method == "GET" and _gives_bytes(one):
            paths[one.path]["head"] = _head(one)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mesh: the registry API",
            "version": version("mesh-llm-node"),
            "description": "The models on a node's disk. `mesh key` prints the operator's key.",
        },
        "paths": paths,
        "components": {
            "schemas": dict(SCHEMAS),
            "securitySchemes": {_KEY: {"type": "http", "scheme": "bearer"}},
        },
    }


def _gives_bytes(one: Operation) -> bool:
    return any(BYTES in answer.kinds for answer in one.answers.values())


def _operation(one: Operation) -> dict[str, Any]:
    refusals = {**one.refusals, **_ANY_REQUEST, **(_WITHOUT_KEY if one.needs_key else {})}
    told: dict[str, Any] = {
        "operationId": one.name,
        "summary": one.summary,
        "parameters": [_parameter(parameter) for parameter in one.parameters],
        "responses": {
            **{str(status): _answer(answer) for status, answer in one.answers.items()},
            **{str(status): _refusal(codes) for status, codes in sorted(refusals.items())},
        },
    }
    if one.needs_key:
        told["security"] = [{_KEY: []}]
    if one.body is not None:
        told["requestBody"] = {"required": True, "content": {JSON: {"schema": one.body}}}
    return told


def _head(one: Operation) -> dict[str, Any]:
    """The same, told without a body."""
    told = _operation(one)
    told["operationId"] = f"{one.name}_head"
    told["summary"] = "Size and ETag of a model's file"
    for status, answer in told["responses"].items():
        answer.pop("content", None)
        if status == "200":
            answer["description"] = "The whole file's, whatever of it is here."
    del told["responses"]["206"]
    return told


def _parameter(one: Parameter) -> dict[str, Any]:
    return {
        "name": one.name,
        "in": one.place,
        "description": one.text,
        "required": one.place == "path",
        "schema": one.schema,
    }


def _answer(one: Answer) -> dict[str, Any]:
    told: dict[str, Any] = {"description": one.text}
    if one.kinds:
        told["content"] = {kind: _content(schema) for kind, schema in one.kinds.items()}
    if one.headers:
        told["headers"] = {
            name: {"description": _HEADERS[name], "schema": {"type": "string"}}
            for name in one.headers
        }
    return told


def _content(schema: Schema | None) -> dict[str, Any]:
    return {} if schema is None else {"schema": schema}


def _refusal(codes: tuple[str, ...]) -> dict[str, Any]:
    code = {"properties": {"error": {"properties": {"code": {"enum": list(codes)}}}}}
    schema = {"allOf": [{"$ref": "#/components/schemas/Error"}, code]}
    return {
        "description": f"An error: one of the codes {', '.join(codes)}, and a sentence.",
        "content": {JSON: {"schema": schema}},
    }
