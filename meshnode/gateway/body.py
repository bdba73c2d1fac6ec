"""Reading a request's body: bounded in size and time, and a JSON object."""

from __future__ import annotations

import json
import re
from typing import NoReturn

import trio
from starlette.requests import ClientDisconnect, Request

from meshnode.config import human_bytes
from meshnode.gateway.refusal import Refusal
from meshnode.gateway.rules import is_json

MAX_BODY_BYTES = 32 * 2**20
BODY_TIMEOUT_S = 60.0
_SURROGATE = re.compile(rb"\\u[dD]")
_PARSED_AT_ONCE_BYTES = 256 * 1024


async def read_json_body(request: Request) -> bytes:
    """The body of a POST as it came, known to be a JSON object. Raises `Refusal`."""
    if not is_json(request.headers.get("content-type", "")):
        raise Refusal(
            415, "not_json", "the body must be JSON: send it with `Content-Type: application/json`"
        )
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise Refusal(415, "not_json", "compressed bodies are not read: send plain JSON")
    body = await read_body(request)
    if len(body) > _PARSED_AT_ONCE_BYTES:
        await trio.to_thread.run_sync(check_json, body)
    else:
        check_json(body)
    return body


async def read_body(request: Request) -> bytes:
    """The whole body. Raises `Refusal` for one that is too large, too slow or cut short."""
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared) > MAX_BODY_BYTES:
        _refuse_size()
    body = bytearray()
    try:
        with trio.fail_after(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    _refuse_size()
    except trio.TooSlowError:
        raise Refusal(
            408, "body_too_slow", f"the body did not arrive within {BODY_TIMEOUT_S:.0f} seconds"
        ) from None
    except ClientDisconnect:
        raise Refusal(400, "client_gone", "the client left before its body was whole") from None
    return bytes(body)


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


def _refuse_size() -> NoReturn:
    raise Refusal(
        413, "body_too_large", f"the body is larger than {human_bytes(MAX_BODY_BYTES)}, the limit"
    )
