"""The registry API: which models there are, what they are made of, who holds them, their bytes."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

import trio
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from meshnode.errors import AmbiguousModel, ModelError, NoSuchModel
from meshnode.gateway import openapi
from meshnode.gateway.body import BodyRoom, read_json_body
from meshnode.gateway.holder_rows import elsewhere_row, holder_row
from meshnode.gateway.key import check_key
from meshnode.gateway.model_data import RETRY_AFTER, ModelData, Streams, file_index
from meshnode.gateway.model_pull import (
    Pulls,
    checked_source,
    is_source,
    source_for_others,
    source_of_members,
    wanted_tensors,
)
from meshnode.gateway.operations import OPERATIONS, Operation
from meshnode.gateway.pull_events import PullEvents, Work
from meshnode.gateway.pull_request import MAX_PULL_BYTES, PullRequest, parse_pull_untrusted
from meshnode.gateway.refusal import Refusal
from meshnode.models.description import describe, type_name
from meshnode.models.identity import Identity
from meshnode.models.peers.overview import Model, Overview
from meshnode.models.registry import KnownModel, ModelUnusable, Registry, Summary, files_of
from meshnode.pipeline.orders import Target

MAX_ID_CHARS = 512

T = TypeVar("T")
Endpoint = Callable[[Request], Awaitable[Response]]


class LookAround(Protocol):
    """What the members hold; `own`: of the models that are here."""

    async def __call__(self, own: Sequence[Identity]) -> Overview: ...


class ModelRoutes:
    """I answer for the models of this node."""

    def __init__(
        self, registry: Registry, look_around: LookAround, pulls: Pulls, me: Target, key: str
    ) -> None:
        """me: this node. key: the operator's, for the bytes and for what changes something."""
        self._registry = registry
        self._pulls = pulls
        self._bodies = BodyRoom()
        self._look_around = look_around
        self._me = me
        self._key = key
        self._streams = Streams()
        self._disk = trio.CapacityLimiter(2)

    def routes(self) -> list[BaseRoute]:
        answers = {
            "list_models": self._list,
            "describe_model": self._metadata,
            "list_tensors": self._tensors,
            "read_model": self._data,
            "pull_model": self._pull,
        }
        document = Route(openapi.PATH, self._document, methods=["GET"])
        return [document, *(_route(one, answers[one.name], self._key) for one in OPERATIONS)]

    async def _document(self, _request: Request) -> Response:
        return _answer(_json(openapi.openapi_document()))

    async def _list(self, request: Request) -> Response:
        mesh = request.query_params.get("mesh", "0")
        if mesh not in ("0", "1"):
            text = f"mesh={mesh[:20]!r} is neither 0 nor 1: 1 asks the members too"
            raise Refusal(400, "bad_request", text)
        models = await self._in_thread(self._registry.models)
        if mesh == "0":
            return _answer(await self._in_thread(lambda: _json({"models": self._rows(models)})))
        seen = await self._look(models)

        def render() -> bytes:
            there = [elsewhere_row(one, seen.all_said) for one in seen.elsewhere]
            return _json({"models": [*self._rows(models, seen), *there]})

        return _answer(await self._in_thread(render))

    async def _metadata(self, request: Request) -> Response:
        model = await self._find(request)
        return _answer(await self._in_thread(lambda: _json(_metadata_row(model))))

    async def _tensors(self, request: Request) -> Response:
        model = await self._find(request)
        return _answer(await self._in_thread(lambda: _json(_tensors_row(model))))

    async def _data(self, request: Request) -> Response:
        model = await self._find(request)
        return ModelData(self._registry, self._streams, model, file_index(request, model))

    async def _pull(self, request: Request) -> Response:
        with self._bodies.place() as place:
            wanted = parse_pull_untrusted(await read_json_body(request, place, MAX_PULL_BYTES))
        text = str(request.path_params["id"])
        if is_source(text):
            return PullEvents(self._works(checked_source(text), None, wanted))
        try:
            model = await self._find(request)
        except Refusal as refusal:
            if refusal.code != "unknown_model":
                raise
            elsewhere = (await self._look(await self._in_thread(self._registry.models))).elsewhere
            if (source := source_of_members(elsewhere, text)) is None:
                raise
            return PullEvents(self._works(source, None, wanted))
        source = source_for_others(model, wanted_tensors(model.facts, wanted.layers))
        return PullEvents(self._works(source, model, wanted))

    async def _look(self, models: Sequence[Summary]) -> Overview:
        return await self._look_around([one.identity for one in models if one.identity is not None])

    def _works(
        self, source: str, model: KnownModel | None, wanted: PullRequest
    ) -> Mapping[Target, Work]:
        """By node, each once, whatever it is called. model: where it is one that is here. Raises
        `Refusal`."""
        works: dict[Target, Work] = {}
        for node in wanted.nodes or (self._me.peer,):
            where = self._pulls.find_node(node, self._me)
            if where != self._me:
                works[where] = self._pulls.of_source(source, wanted.layers, on=where)
            elif model is None:
                works[where] = self._pulls.of_source(source, wanted.layers)
            else:
                works[where] = self._pulls.of_model(model, wanted.layers)
        return works

    # -- this node's models -------------------------------------------------------------------

    async def _find(self, request: Request) -> KnownModel:
        text = str(request.path_params["id"])
        if len(text) > MAX_ID_CHARS:
            text = f"{text[:100]}…"
        return await self._in_thread(lambda: self._registry.find(text))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Raises `Refusal`."""
        try:
            return await trio.to_thread.run_sync(work, limiter=self._disk)
        except NoSuchModel as error:
            raise Refusal(404, "unknown_model", str(error)) from None
        except AmbiguousModel as error:
            raise Refusal(409, "ambiguous_model", str(error)) from None
        except ModelUnusable as error:
            raise Refusal(409, "model_unusable", str(error)) from None
        except ModelError:  # names paths, which are the operator's business
            text = "a folder of models is gone or a file is being written to: ask again in a moment"
            raise Refusal(503, "model_changing", text, RETRY_AFTER) from None

    def _rows(
        self, models: Iterable[Summary], seen: Overview | None = None
    ) -> list[dict[str, object]]:
        """seen: None where no member was asked."""
        here = iter(seen.here if seen else ())
        return [self._row(one, next(here, None) if one.identity else None, seen) for one in models]

    def _row(self, one: Summary, there: Model | None, seen: Overview | None) -> dict[str, object]:
        if one.model is None or one.identity is None:
            trouble = "it cannot be read: `mesh models info` on the node's machine says why"
            return {"name": one.entry.name, "trouble": trouble}
        mine = {
            "node": self._me.node,
            "peer": self._me.peer,
            "complete": one.held is None,
            "held_bytes": one.held_bytes,
            "tensors": None if one.held is None else list(one.held),
        }
        known = self._registry.find_again(one) if there and there.shares else None
        facts, sizes = (known.facts, known.sizes) if known else (None, ())
        rows = [holder_row(share, facts, sizes) for share in there.shares] if there else []
        all_said = seen is not None and seen.all_said
        return {**one.model, "holders": [mine, *rows], "members_asked": all_said}


def _route(one: Operation, answer: Endpoint, key: str) -> Route:
    async def answer_to_operator(request: Request) -> Response:
        check_key(key, request.headers.get("authorization", ""))
        return await answer(request)

    return Route(one.route, answer_to_operator if one.needs_key else answer, methods=[one.method])


def _metadata_row(model: KnownModel) -> dict[str, object]:
    return {
        "id": str(model.identity),
        **describe(model.facts),
        "title": model.facts.name,
        "name": model.entry.name,
        "root": model.identity.root,
        "provisional": model.identity.provisional,
        "format": "gguf",
        "files": files_of(model),
        "held_bytes": model.part.held_bytes if model.part else model.facts.weight_bytes,
        "held_tensors": len(model.facts.tensors if model.held is None else model.held),
        "source": model.entry.source,
    }


def _tensors_row(model: KnownModel) -> dict[str, object]:
    held = model.held
    return {
        "id": str(model.identity),
        "name": model.entry.name,
        "files": files_of(model),
        "tensors": [
            {
                "name": tensor.name,
                "type": type_name(tensor.type),
                "shape": _shape(tensor.ne),
                "file": tensor.file_index,
                "offset": tensor.offset,
                "size_bytes": tensor.nbytes,
                "digest": _hex(model.digests.get(tensor.name)),
                "here": held is None or tensor.name in held,
            }
            for tensor in model.facts.tensors
        ],
    }


def _shape(ne: tuple[int, int, int, int]) -> list[int]:
    """Innermost first, without the ones at the end."""
    shape = list(ne)
    while len(shape) > 1 and shape[-1] == 1:
        shape.pop()
    return shape


def _hex(digest: bytes | None) -> str | None:
    return None if digest is None else f"blake3:{digest.hex()}"


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()


def _answer(body: bytes) -> Response:
    return Response(body, media_type="application/json")
