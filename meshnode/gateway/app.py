"""The gateway's ASGI application: the node's own answers, and the routes passed on."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from meshnode.gateway.body import BodyRoom
from meshnode.gateway.door import Door
from meshnode.gateway.refusal import Refusal
from meshnode.gateway.relay import Relay, not_ready
from meshnode.gateway.routes import PASSED, WITHHELD, Withheld
from meshnode.gateway.rules import HostRule
from meshnode.gateway.view import NodeView, Stage


def make_app(view: NodeView, rule: HostRule, further: Sequence[BaseRoute] = ()) -> ASGIApp:
    """The whole application; `rule` says by which names it may be called."""
    routes: list[BaseRoute] = [
        *further,
        Route("/health", _health(view), methods=["GET"]),
        Route("/v1/health", _health(view), methods=["GET"]),
        Route("/api/v1/status", _status(view), methods=["GET"]),
    ]
    room = BodyRoom()
    routes += [
        Route(entry.path, Relay(entry, view, room), methods=[entry.method]) for entry in PASSED
    ]
    routes += [Route(entry.path, _withheld(entry), methods=[entry.method]) for entry in WITHHELD]
    app = Starlette(
        routes=routes,
        exception_handlers={
            Refusal: _answer_refusal,
            HTTPException: _answer_http_exception,
            Exception: _answer_defect,
        },
    )
    app.router.redirect_slashes = False
    return Door(app, rule)


_WELL = (Stage.READY, Stage.LENDING)
Endpoint = Callable[[Request], Awaitable[Response]]


def _health(view: NodeView) -> Endpoint:
    async def health(_request: Request) -> Response:
        now = view.health()
        facts: dict[str, object] = {
            "status": "ok" if now.stage in _WELL else "unavailable",
            "stage": now.stage.value,
            "message": now.message,
            "progress": now.progress,
            "workers": [asdict(worker) for worker in now.workers],
        }
        if now.stage in _WELL:
            return JSONResponse(facts)
        refusal = not_ready(now)
        return JSONResponse({**facts, **refusal.body()}, 503, dict(refusal.headers))

    return health


def _status(view: NodeView) -> Endpoint:
    async def status(_request: Request) -> Response:
        return JSONResponse(view.status())

    return status


def _withheld(entry: Withheld) -> Endpoint:
    async def withheld(_request: Request) -> Response:
        raise Refusal(501, "not_served", f"{entry.path} is not offered: {entry.reason}")

    return withheld


async def _answer_refusal(_request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return error.response()


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own: an unknown path, a wrong method."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        message = f"{request.method} is not for {request.url.path}"
        return Refusal(405, "method_not_allowed", message, error.headers or {}).response()
    message = f"nothing is served at {request.url.path[:200]}: docs/api.md lists the routes"
    return Refusal(404, "unknown_route", message).response()


async def _answer_defect(_request: Request, _error: Exception) -> Response:
    """Starlette raises the error again after this, and hypercorn logs it."""
    message = "internal error of the gateway: this is a defect of mesh, please report it"
    return Refusal(500, "internal_error", message).response()
