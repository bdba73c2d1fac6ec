"""Reading a request's body: bounded in size and time, and a JSON object."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import trio
from starlette.requests import ClientDisconnect, Request

from meshnode.config import human_bytes
from meshnode.gateway.refusal import Refusal
from meshnode.gateway.rules import is_json

MAX_BODY_BYTES = 32 * 2**20
MAX_BODIES_BYTES = 128 * 2**20  # of all requests under way
BUSY_RETRY_S = 5
BODY_TIMEOUT_S = 60.0
_LENGTH = re.compile(r"[0-9]{1,20}")
_SURROGATE = re.compile(rb"\\u[dD]")
_PARSED_AT_ONCE_BYTES = 256 * 1024


class BodyRoom:
    """I bound the memory that the bodies of all requests together take."""

    def __init__(self) -> None:
        self.held_bytes = 0

    @contextmanager
    def place(self) -> Iterator[Place]:
        """Room for one request's body, until the request is over."""
        place = Place(self)
        try:
            yield place
        finally:
            self.held_bytes -= place.held_bytes


class Place:
    def __init__(self, room: BodyRoom) -> None:
        self._room = room
        self.held_bytes = 0

    def grow(self, count: int) -> None:
        """Raises `Refusal` when all bodies together would be too much."""
        if self._room.held_bytes + count > MAX_BODIES_BYTES:
            raise Refusal(
                503,
                "gateway_busy",
                "too many large requests are under way: send it again in a moment",
                {"retry-after": str(BUSY_RETRY_S)},
            )
        self._room.held_bytes += count
        self.held_bytes += count


async def read_json_body(request: Request, place: Place, most_bytes: int = MAX_BODY_BYTES) -> bytes:
    """The body of a POST as it came, known to be a JSON object. Raises `Refusal`."""
    if not is_json(request.headers.get("content-type", "")):
        raise Refusal(
            415, "not_json", "the body must be JSON: send it with `Content-Type: application/json`"
        )
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise Refusal(415, "not_json", "compressed bodies are not read: send plain JSON")
    body = await read_body(request, place, most_bytes)
    if len(body) > _PARSED_AT_ONCE_BYTES:
        await trio.to_thread.run_sync(check_json, body)
    else:
        check_json(body)
    return body


async def read_body(request: Request, place: Place, most_bytes: int = MAX_BODY_BYTES) -> bytes:
    """The whole body. Raises `Refusal` for one that is too large, too slow or cut short."""
    if declared_bytes(request.headers.get("content-length", "0")) > most_bytes:
        _refuse_size(most_bytes)
    body = bytearray()
    try:
        with trio.fail_after(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                if len(body) + len(chunk) > most_bytes:
                    _refuse_size(most_bytes)
                place.grow(len(chunk))
                body += chunk
    except trio.TooSlowError:
        raise Refusal(
            408, "body_too_slow", f"the body did not arrive within {BODY_TIMEOUT_S:.0f} seconds"
        ) from None
    except ClientDisconnect:
        raise Refusal(400, "client_gone", "the client left before its body was whole") from None
    return bytes(body)


def declared_bytes(content_length: str) -> int:
    """What a Content-Length header says. Raises `Refusal` (400) for one that is no number, or of so
    many digits that reading it would be work."""
    if not _LENGTH.fullmatch(content_length):
        raise Refusal(
            400,
            "bad_length",
            f"the Content-Length header {content_length[:40]!r} is no number of bytes: leave it "
            "to the client's library",
        )
    return int(content_length)


def check_json(body: bytes) -> None:
    """Raises `Refusal` (400) unless the body is a JSON object, strictly (RFC 8259, UTF-8)."""
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
        if _SURROGATE.search(body):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        _refuse_json("half of a surrogate pair is no character")
    except UnicodeDecodeError as error:
        _refuse_json(f"not UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        _refuse_json(f"{error.msg} at line {error.lineno}, column {error.colno}")
    except RecursionError:
        _refuse_json("it is nested too deeply")
    except ValueError as error:
        _refuse_json(str(error))
    if not isinstance(value, dict):
        _refuse_json("an object, like {…}, is needed at the top")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _refuse_json(reason: str) -> NoReturn:
    raise Refusal(400, "invalid_json", f"the body is not a JSON object: {reason}") from None


def _refuse_size(most_bytes: int) -> NoReturn:
    raise Refusal(
        413, "body_too_large", f"the body is larger than {human_bytes(most_bytes)}, the limit"
    )
