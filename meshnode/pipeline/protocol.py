"""Messages of the `control` service between an orchestrator and a worker. Sans-IO.

One stream a request; the first message names the operation:

- `facts`: answered with one `WorkerFacts`; where it says `fresh`, once the worker has measured what
  it never has, or some seconds later.
- `lease`: answered with any number of `progress`, then `granted` or `refused`. The stream then
  *is* the lease: when either side closes it, or it is lost, the lease has ended. The worker says
  `ended` with the reason when it is the one who ends it. A request may hold an order of what the
  worker is to pull before it grants (`pull_order`).

Activations go over `rpc/<lease id>`, open to the lease's owner alone, and over `push/<lease id>`,
open to the one worker that the owner names (docs/architecture.md, "The ring"). A worker whose
engine can do that says so in its grant, and then alone hears more on the lease's stream: `PushFrom`
and `PushTo`, each once at most. It answers each with a `PushNews`, and tells by another one when
what it pushed into has ended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import chain, repeat
from typing import Any

from meshnode.errors import BadMessage
from meshnode.pipeline.speeds import Speed, speed_of
from meshnode.pipeline.ways import Way, read_ways
from tunnels.peer import KEY_BYTES, PeerId

MAX_TEXT_CHARS = 512
MAX_DEVICES = 64
MAX_REPORTED_TENSORS = 64
RPC_SERVICE = "rpc/"
PUSH_SERVICE = "push/"
RING_VERSION = 1
"""Of what a worker understands of the ring; 0, or nothing, for none of it."""


@dataclass(frozen=True)
class DeviceFacts:
    """A device as its node reports it; bytes are of memory. `speed`: where it has measured it."""

    name: str
    description: str
    is_gpu: bool
    total_bytes: int
    free_bytes: int
    speed: Speed | None = None


@dataclass(frozen=True)
class WorkerFacts:
    """What a worker lends. `usable_bytes`: over all devices, its operator's limit applied. `ways`:
    from other members to it."""

    name: str
    engine_key: str
    backend: str
    usable_bytes: int
    devices: tuple[DeviceFacts, ...]
    models: tuple[str, ...]
    ways: tuple[Way, ...] = ()

    def to_message(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "engine_key": self.engine_key,
            "backend": self.backend,
            "usable_bytes": self.usable_bytes,
            "models": list(self.models),
            "devices": [
                [d.name, d.description, d.is_gpu, d.total_bytes, d.free_bytes] for d in self.devices
            ],
            "ways": [way.to_row() for way in self.ways],
            "speeds": [d.speed.to_row() if d.speed else None for d in self.devices],
        }


@dataclass(frozen=True)
class LeaseRequest:
    """`memory_bytes` is what the worker's rpc-server may allocate in all; `wanted` the packed
    root and tensor digests of the model (`meshnode.models.manifest`); `order` what is to be pulled
    first (`pull_order`), b"" for nothing."""

    engine_key: str
    model: str
    memory_bytes: int
    wanted: bytes
    order: bytes = b""

    def to_message(self) -> dict[str, Any]:
        return {
            "op": "lease",
            "engine_key": self.engine_key,
            "model": self.model,
            "memory_bytes": self.memory_bytes,
            "wanted": self.wanted,
            "order": self.order,
        }


@dataclass(frozen=True)
class Progress:
    """How far a worker is with what goes before the grant: bytes pulled, else digested."""

    done_bytes: int
    total_bytes: int
    pulls: bool = False

    def to_message(self) -> dict[str, Any]:
        return {
            "event": "progress",
            "done_bytes": self.done_bytes,
            "total_bytes": self.total_bytes,
            "pulls": self.pulls,
        }


@dataclass(frozen=True)
class Granted:
    """`usable`: tensors the worker reads from its own disk. `differing`: names of tensors whose
    bytes there are not the model's (the first few), `differing_count` of them in all. `ring`: the
    version of the ring that it understands. `digests`: of the tensors it was ordered to pull."""

    lease: str
    usable_count: int
    missing_count: int
    differing_count: int
    differing: tuple[str, ...]
    ring: int = 0
    digests: bytes = b""

    def to_message(self) -> dict[str, Any]:
        return {
            "event": "granted",
            "ring": self.ring,
            "digests": self.digests,
            "lease": self.lease,
            "usable_count": self.usable_count,
            "missing_count": self.missing_count,
            "differing_count": self.differing_count,
            "differing": list(self.differing),
        }


class End(Enum):
    """Which end of a push a worker is, seen from itself."""

    FROM = "from"  # the one before it pushes here
    TO = "to"  # it pushes to the next one


@dataclass(frozen=True)
class PushFrom:
    """The owner of a lease: this peer, and no other, may push into it."""

    peer: PeerId

    def to_message(self) -> dict[str, Any]:
        return {"op": "push_from", "peer": self.peer.key}


@dataclass(frozen=True)
class PushTo:
    """The owner of a lease: what is computed on it may be pushed into this lease at this peer."""

    peer: PeerId
    lease: str

    def to_message(self) -> dict[str, Any]:
        return {"op": "push_to", "peer": self.peer.key, "lease": self.lease}


@dataclass(frozen=True)
class PushNews:
    """A worker: that end of the push stands, or it does not, or no more, and `reason` says why.
    `silent`: it stands, and its other end has not been heard for long."""

    end: End
    stands: bool
    reason: str = ""
    silent: bool = False

    def to_message(self) -> dict[str, Any]:
        return {
            "event": "push",
            "end": self.end.value,
            "stands": self.stands,
            "silent": self.silent,
            "reason": self.reason,
        }


def printable(text: str) -> str:
    """The text with whatever a terminal or an encoding could trip over shown as `?`."""
    return "".join(char if char.isprintable() else "?" for char in text)[:MAX_TEXT_CHARS]


def parse_worker_facts_untrusted(message: Mapping[str, Any]) -> WorkerFacts:
    """Raises `BadMessage` and nothing else."""
    rows = _list(message, "devices", MAX_DEVICES)
    if not rows:
        raise BadMessage("the worker reports no device")
    # Beside the devices and not among them: older nodes take rows of five values only.
    speeds = _list(message, "speeds", MAX_DEVICES) if "speeds" in message else ()
    told = chain(map(speed_of, speeds), repeat(None))
    devices = tuple(_device(row, speed) for row, speed in zip(rows, told, strict=False))
    return WorkerFacts(
        name=_text(message, "name"),
        engine_key=_text(message, "engine_key"),
        backend=_text(message, "backend"),
        usable_bytes=_count(message, "usable_bytes"),
        devices=devices,
        models=tuple(_as_text(name) for name in _list(message, "models", 10_000)),
        ways=read_ways(message.get("ways", [])),
    )


def parse_lease_request_untrusted(message: Mapping[str, Any]) -> LeaseRequest:
    """Raises `BadMessage` and nothing else."""
    wanted, order = message.get("wanted"), message.get("order", b"")
    if not isinstance(wanted, bytes) or not isinstance(order, bytes):
        raise BadMessage("the peer's lease request names no tensors")
    return LeaseRequest(
        engine_key=_text(message, "engine_key"),
        model=_text(message, "model"),
        memory_bytes=_count(message, "memory_bytes"),
        wanted=wanted,
        order=order,
    )


def parse_granted_untrusted(message: Mapping[str, Any]) -> Granted:
    """Raises `BadMessage` and nothing else."""
    lease = _lease_id(message)
    names = _list(message, "differing", MAX_REPORTED_TENSORS)
    digests = message.get("digests", b"")
    if not isinstance(digests, bytes):
        raise BadMessage("the worker's digests have an unknown shape")
    return Granted(
        lease=lease,
        usable_count=_count(message, "usable_count"),
        missing_count=_count(message, "missing_count"),
        differing_count=_count(message, "differing_count"),
        differing=tuple(_as_text(name) for name in names),
        ring=_count(message, "ring") if "ring" in message else 0,
        digests=digests,
    )


def parse_push_order_untrusted(message: Mapping[str, Any]) -> PushFrom | PushTo:
    """Raises `BadMessage` and nothing else."""
    match message.get("op"):
        case "push_from":
            return PushFrom(_peer(message))
        case "push_to":
            return PushTo(_peer(message), _lease_id(message))
    raise BadMessage("the peer talks on where the rest of the stream is the lease")


def parse_push_news_untrusted(message: Mapping[str, Any]) -> PushNews:
    """Raises `BadMessage` and nothing else."""
    end, stands, silent = (message.get(key) for key in ("end", "stands", "silent"))
    if end not in ("from", "to") or not isinstance(stands, bool) or not isinstance(silent, bool):
        raise BadMessage("the worker's word about a push has an unknown shape")
    return PushNews(End(end), stands, _text(message, "reason"), silent)


def parse_reason_untrusted(message: Mapping[str, Any]) -> str:
    """The peer's sentence, made safe to show."""
    return _text(message, "reason")


def parse_progress_untrusted(message: Mapping[str, Any]) -> Progress:
    """Raises `BadMessage` and nothing else."""
    pulls = message.get("pulls", False)
    if not isinstance(pulls, bool):
        raise BadMessage("the worker's word about its progress has an unknown shape")
    return Progress(_count(message, "done_bytes"), _count(message, "total_bytes"), pulls)


def _device(row: object, speed: Speed | None) -> DeviceFacts:
    if not isinstance(row, Sequence) or isinstance(row, str | bytes) or len(row) != 5:
        raise BadMessage("the worker's device list has an unknown shape")
    name, description, is_gpu, total_bytes, free_bytes = row
    counts = (total_bytes, free_bytes)
    if not isinstance(is_gpu, bool) or not all(_is_count(value) for value in counts):
        raise BadMessage("the worker's device list has an unknown shape")
    named = (_as_text(name), _as_text(description))
    return DeviceFacts(*named, is_gpu, total_bytes, free_bytes, speed)


def _text(message: Mapping[str, Any], key: str) -> str:
    return _as_text(message.get(key))


def _as_text(value: object) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT_CHARS:
        raise BadMessage("the peer's message lacks a text or has one too long")
    return printable(value)


def _lease_id(message: Mapping[str, Any]) -> str:
    """Fit to be in a service's name."""
    lease = _text(message, "lease")
    if not (lease.isascii() and lease.isalnum()):
        raise BadMessage("the peer's lease has no proper id")
    return lease


def _peer(message: Mapping[str, Any]) -> PeerId:
    key = message.get("peer")
    if not isinstance(key, bytes) or len(key) != KEY_BYTES:
        raise BadMessage("the peer's message names no proper peer")
    return PeerId(key)


def _count(message: Mapping[str, Any], key: str) -> int:
    value = message.get(key)
    if not _is_count(value):
        raise BadMessage(f"the peer's message has no proper {key}")
    assert isinstance(value, int)
    return value


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _list(message: Mapping[str, Any], key: str, limit: int) -> Sequence[Any]:
    value = message.get(key)
    if not isinstance(value, list) or len(value) > limit:
        raise BadMessage(f"the peer's message has no proper {key}")
    return value
