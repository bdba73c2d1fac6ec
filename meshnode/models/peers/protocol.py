"""Messages of the `store` service, by which members give each other parts of models. Sans-IO.

One stream a question; the first message asks, by a model's identity (32 bytes, a root or a
provisional one, `meshnode.models.identity`):

- `holds`: answered with one `Holding`, whose `files` are none where nothing of it is here.
- `read`: bytes of one file. Answered with `{"refused": sentence}`, or with `{"bytes": count}` and
  then those bytes as they are, and the end of the stream.
- `models`, which names none, and `digests`: see `meshnode.models.peers.listing`. Members of before
  these do not know them, and break the stream off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meshnode.errors import BadMessage
from meshnode.models.facts import MAX_SHARDS, shown_name
from meshnode.models.manifest import DIGEST_BYTES
from meshnode.models.packed_spans import SPAN_BYTES, PackedSpans, pack, rows
from meshnode.models.spans import Span

MAX_READ_BYTES = 256 << 20
MAX_SPANS = 1 << 16
MAX_NAME_CHARS = 255
MAX_VALIDATOR_CHARS = 256 * 1024
HOLDING_BYTES = 4 << 20
_MAX_BYTES = 2**63 - 1


@dataclass(frozen=True)
class HoldsRequest:
    """What is here of this model?"""

    identity: str

    def to_message(self) -> dict[str, Any]:
        return {"op": "holds", "identity": bytes.fromhex(self.identity)}


@dataclass(frozen=True)
class ModelsRequest:
    """Which models are here?"""

    def to_message(self) -> dict[str, Any]:
        return {"op": "models"}


@dataclass(frozen=True)
class DigestsRequest:
    """What are the digests of this model's tensors?"""

    identity: str

    def to_message(self) -> dict[str, Any]:
        return {"op": "digests", "identity": bytes.fromhex(self.identity)}


@dataclass(frozen=True)
class ReadRequest:
    """The bytes `start` up to `stop` of a file, MAX_READ_BYTES at most."""

    identity: str
    file_index: int
    start: int
    stop: int

    def to_message(self) -> dict[str, Any]:
        return {
            "op": "read",
            "identity": bytes.fromhex(self.identity),
            "file": self.file_index,
            "start": self.start,
            "stop": self.stop,
        }


@dataclass(frozen=True)
class Holding:
    """What a member has of a model. `files`: names and lengths of all its files; `validator`: what
    its source said of them; `spans`: the bytes of them that are here, headers too."""

    files: tuple[tuple[str, int], ...] = ()
    validator: str = ""
    spans: Sequence[Span] = ()

    def to_message(self) -> dict[str, Any]:
        files = [list(file) for file in self.files]
        return {"files": files, "validator": self.validator, "spans": pack(self.spans)}


Request = HoldsRequest | ModelsRequest | DigestsRequest | ReadRequest


def parse_request_untrusted(message: Mapping[str, Any]) -> Request:
    """Raises `BadMessage` and nothing else."""
    match message.get("op"):
        case "holds":
            return HoldsRequest(_identity(message))
        case "models":
            return ModelsRequest()
        case "digests":
            return DigestsRequest(_identity(message))
        case "read":
            start, stop = _count(message.get("start")), _count(message.get("stop"))
            if not start < stop <= start + MAX_READ_BYTES:
                raise BadMessage("the peer asks for no bytes, or for too many at once")
            file_index = _count(message.get("file"), MAX_SHARDS)
            return ReadRequest(_identity(message), file_index, start, stop)
    raise BadMessage("the peer asks the store for an operation this version does not know")


def parse_holding_untrusted(message: Mapping[str, Any]) -> Holding:
    """Raises `BadMessage` and nothing else."""
    files, validator, spans = (message.get(key) for key in ("files", "validator", "spans"))
    if not isinstance(files, list) or len(files) > MAX_SHARDS:
        raise BadMessage("the peer's word on what it holds has an unknown shape")
    if not isinstance(validator, str) or len(validator) > MAX_VALIDATOR_CHARS:
        raise BadMessage("the peer's word on what it holds has no proper validator")
    if not isinstance(spans, bytes) or len(spans) % SPAN_BYTES:
        raise BadMessage("the peer's word on what it holds has no proper spans")
    if len(spans) // SPAN_BYTES > MAX_SPANS:
        raise BadMessage("the peer holds more pieces than a model has")
    known = tuple(_file(row) for row in files)
    for row in rows(spans):
        _check_span(row, known)
    return Holding(known, validator, PackedSpans(spans))


def parse_read_answer_untrusted(message: Mapping[str, Any], expected_bytes: int) -> str | None:
    """None where the bytes follow, else the peer's refusal. Raises `BadMessage` and nothing
    else."""
    refused = message.get("refused")
    if isinstance(refused, str):
        return shown_name(refused)
    if message.get("bytes") != expected_bytes or isinstance(message.get("bytes"), bool):
        raise BadMessage("the peer gives other bytes than were asked for")
    return None


def _file(row: object) -> tuple[str, int]:
    if not isinstance(row, Sequence) or isinstance(row, str | bytes) or len(row) != 2:
        raise BadMessage("the peer's word on its files has an unknown shape")
    name, size_bytes = row
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARS:
        raise BadMessage("the peer names a file that cannot be")
    return name, _count(size_bytes)


def _check_span(row: tuple[int, int, int], files: Sequence[tuple[str, int]]) -> None:
    file_index, start, stop = row
    if file_index >= len(files) or not start < stop <= files[file_index][1]:
        raise BadMessage("the peer says that it holds bytes that cannot be")


def _identity(message: Mapping[str, Any]) -> str:
    identity = message.get("identity")
    if not isinstance(identity, bytes) or len(identity) != DIGEST_BYTES:
        raise BadMessage("the peer's question names no model")
    return identity.hex()


def _count(value: object, most: int = _MAX_BYTES) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise BadMessage("the peer's message has no proper number")
    return value
