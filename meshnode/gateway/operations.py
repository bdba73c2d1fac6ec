"""The registry API as a table: what the gateway routes by, and what its OpenAPI document tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from meshnode.gateway.pull_request import MAX_NODES

Schema = Mapping[str, Any]
Refusals = Mapping[int, tuple[str, ...]]

ROOT = "/api/v1/models"
BYTES = "application/octet-stream"
EVENTS = "text/event-stream"
JSON = "application/json"


@dataclass(frozen=True)
class Parameter:
    """`place`: path, query or header."""

    name: str
    place: str
    text: str
    schema: Schema


@dataclass(frozen=True)
class Answer:
    """An answer that is no error: `kinds` of content, each with its shape (None: bytes), and the
    headers it has."""

    text: str
    kinds: Mapping[str, Schema | None]
    headers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Operation:
    """`refusals`: the errors it has beside those that any request may get, codes by status. `body`:
    the shape of what is sent to it. HEAD goes with each GET whose answer is bytes."""

    method: str
    path: str
    name: str
    summary: str
    answers: Mapping[int, Answer]
    parameters: tuple[Parameter, ...] = ()
    refusals: Refusals = field(default_factory=dict)
    body: Schema | None = None
    needs_key: bool = False

    @property
    def route(self) -> str:
        """As starlette writes it: a model's name may have a slash, written %2F."""
        return self.path.replace("{id}", "{id:path}")


def _object(**fields: Schema) -> Schema:
    """All of them are there."""
    return {"type": "object", "required": sorted(fields), "properties": dict(fields)}


def _list(of: Schema) -> Schema:
    return {"type": "array", "items": of}


def _shape(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


TEXT: Schema = {"type": "string"}
MAYBE_TEXT: Schema = {"type": ["string", "null"]}
COUNT: Schema = {"type": "integer", "minimum": 0}
MAYBE_AMOUNT: Schema = {"type": ["number", "null"], "minimum": 0}
FLAG: Schema = {"type": "boolean"}
HEX: Schema = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
MAYBE_HEX: Schema = {"type": ["string", "null"], "pattern": "^[0-9a-f]{64}$"}
DIGEST: Schema = {"type": ["string", "null"], "pattern": "^blake3:[0-9a-f]{64}$"}
FILES = _list(_object(name=TEXT, size_bytes=COUNT))
HOLDER = _object(
    node=TEXT,
    peer=TEXT,
    complete=FLAG,
    held_bytes=COUNT,
    tensors={"type": ["array", "null"], "items": TEXT},
)
MODEL = _object(
    id=HEX,
    name=TEXT,
    aliases=_list(TEXT),
    root=MAYBE_HEX,
    provisional=HEX,
    format=TEXT,
    quantization=MAYBE_TEXT,
    architecture=TEXT,
    parameters=COUNT,
    layers=COUNT,
    tensors=COUNT,
    weight_bytes=COUNT,
    files=FILES,
    source=MAYBE_TEXT,
    holders=_list(HOLDER),
    members_asked=FLAG,
)
METADATA = _object(
    id=HEX,
    name=TEXT,
    title=TEXT,
    root=MAYBE_HEX,
    provisional=HEX,
    format=TEXT,
    quantization=MAYBE_TEXT,
    architecture=TEXT,
    parameters=COUNT,
    layers=COUNT,
    width=COUNT,
    vocabulary=COUNT,
    context=COUNT,
    experts=COUNT,
    tensors=COUNT,
    weight_bytes=COUNT,
    held_bytes=COUNT,
    held_tensors=COUNT,
    kv_bytes_per_token=COUNT,
    chat_template=FLAG,
    files=FILES,
    source=MAYBE_TEXT,
)
TENSOR = _object(
    name=TEXT,
    type=TEXT,
    shape=_list(COUNT),
    file=COUNT,
    offset=COUNT,
    size_bytes=COUNT,
    digest=DIGEST,
    here=FLAG,
)
ERROR = _object(message=TEXT, type=TEXT, param=MAYBE_TEXT, code=TEXT)
PULL_EVENTS: Mapping[str, Schema] = MappingProxyType(
    {
        "progress": _object(
            node=TEXT,
            peer=TEXT,
            done_bytes=COUNT,
            total_bytes=COUNT,
            bytes_per_s=MAYBE_AMOUNT,
            eta_s=MAYBE_AMOUNT,
        ),
        "held": _object(
            node=TEXT,
            peer=TEXT,
            id=HEX,
            name=TEXT,
            pulled_bytes=COUNT,
            held_bytes=COUNT,
            weight_bytes=COUNT,
            complete=FLAG,
            proof=TEXT,
        ),
        "failed": _object(node=TEXT, peer=TEXT, error=ERROR),
    }
)
SCHEMAS: Mapping[str, Schema] = MappingProxyType(
    {
        "Error": _object(error=ERROR),
        **{f"Pull{name.capitalize()}": shape for name, shape in PULL_EVENTS.items()},
        "Unusable": _object(name=TEXT, trouble=TEXT),
        "Model": MODEL,
        "Metadata": METADATA,
        "Tensors": _object(id=HEX, name=TEXT, files=FILES, tensors=_list(TENSOR)),
        "Registry": _object(models=_list({"anyOf": [_shape("Model"), _shape("Unusable")]})),
    }
)


ID = Parameter(
    "id",
    "path",
    "A root, a provisional identity or a name; a slash in a name is written %2F.",
    {"type": "string", "minLength": 1, "maxLength": 512},
)
_TAG = Parameter("If-None-Match", "header", "An ETag: 304 where the bytes are those.", TEXT)
_SAME = Parameter("If-Match", "header", "An ETag: 412 where the bytes are others.", TEXT)
_RANGE = Parameter("Range", "header", "bytes=0-1023, or several: 64 at most.", TEXT)
_IF_RANGE = Parameter("If-Range", "header", "An ETag: else the whole file is sent.", TEXT)
_FILE = Parameter(
    "file",
    "query",
    "Which file of a model in shards, from 0.",
    {"type": "integer", "minimum": 0, "maximum": 998, "default": 0},
)
_MESH = Parameter(
    "mesh", "query", "1: the members are asked too.", {"type": "integer", "enum": [0, 1]}
)
_MODEL_REFUSALS: Refusals = {
    404: ("unknown_model", "unknown_route"),  # the second for an id that a path cannot hold
    409: ("ambiguous_model", "model_unusable"),
    503: ("model_changing",),
}
_DATA_REFUSALS: Refusals = {
    **_MODEL_REFUSALS,
    400: ("bad_request",),
    404: ("unknown_model", "unknown_file", "not_here", "unknown_route"),
    412: ("other_bytes",),
    416: ("no_such_bytes", "too_many_ranges"),
    503: ("model_changing", "gateway_busy"),
}
_PULL_REFUSALS: Refusals = {
    **_MODEL_REFUSALS,
    400: ("bad_request", "invalid_json", "bad_length"),
    404: ("unknown_model", "unknown_node", "unknown_route"),
    408: ("body_too_slow",),
    413: ("body_too_large",),
    415: ("not_json",),
    503: ("model_changing", "gateway_busy"),
}
_BYTES_HEADERS = ("ETag", "Accept-Ranges", "Content-Disposition")

OPERATIONS = (
    Operation(
        "GET",
        f"{ROOT}/registry",
        "list_models",
        "The models on this node's disk, and who holds which tensors",
        {200: Answer("All of them.", {JSON: _shape("Registry")})},
        (_MESH,),
        {400: ("bad_request",), 503: ("model_changing",)},
    ),
    Operation(
        "GET",
        f"{ROOT}/{{id}}/metadata",
        "describe_model",
        "What a model's header says",
        {200: Answer("Its facts.", {JSON: _shape("Metadata")})},
        (ID,),
        _MODEL_REFUSALS,
    ),
    Operation(
        "GET",
        f"{ROOT}/{{id}}/tensors",
        "list_tensors",
        "Each tensor of a model: what it is, where it lies, whether it is here",
        {200: Answer("All of them.", {JSON: _shape("Tensors")})},
        (ID,),
        _MODEL_REFUSALS,
    ),
    Operation(
        "GET",
        f"{ROOT}/{{id}}/data",
        "read_model",
        "The bytes of a model's file, whole or in ranges",
        {
            200: Answer("The whole file.", {BYTES: None}, _BYTES_HEADERS),
            206: Answer(
                "A range of it, or several in parts.",
                {BYTES: None, "multipart/byteranges": None},
                _BYTES_HEADERS,
            ),
            304: Answer("The bytes are those of If-None-Match.", {}, ("ETag",)),
        },
        (ID, _FILE, _RANGE, _IF_RANGE, _TAG, _SAME),
        _DATA_REFUSALS,
        needs_key=True,
    ),
    Operation(
        "POST",
        f"{ROOT}/{{id}}/pull",
        "pull_model",
        "Fetch what nodes lack of a model; {id} may be its source, like hf:org/repo/file.gguf",
        {
            200: Answer(
                "Server-sent events, each with one object as its data: `progress` (PullProgress), "
                "and at the end of each node's pull `held` (PullHeld) or `failed` (PullFailed).",
                {EVENTS: None},
            )
        },
        (ID,),
        _PULL_REFUSALS,
        {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "layers": {
                    "type": ["string", "null"],
                    "description": "The first and the last, like 27:52 or 27:output; null: all.",
                },
                "nodes": {
                    "type": ["array", "null"],
                    "items": TEXT,
                    "maxItems": MAX_NODES,
                    "description": "Names or ids of nodes, each told of by itself; null: this one.",
                },
            },
        },
        needs_key=True,
    ),
)
