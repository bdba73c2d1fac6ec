"""Messages of the `pull` service, by which one node has another pull. Sans-IO.

One stream an order. The first message is the order, {"source": …, "layers": … or absent}; from then
on the asker says nothing, and its end of the stream is the end of the order. The other node answers
with any number of {"event": "progress", "done_bytes": …, "total_bytes": …}, which also say that it
is there, and then with one of {"event": "held", …}, the fields of `Held`, and
{"event": "failed", "reason": sentence, "code": exit code}. Unknown keys are passed over.

Secrets do not travel: an address with a password, or with anything behind a question mark, is
refused on both sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from meshnode.errors import BadMessage, UsageError
from meshnode.models.facts import shown_name
from meshnode.models.peers.listing import is_identity
from meshnode.models.pull.reference import is_secret, parse_reference
from meshnode.pipeline.pull_order import MAX_REFERENCE_CHARS

MAX_LAYERS_CHARS = 40
MAX_REASON_CHARS = 1000
MAX_NAME_CHARS = 255
_MAX_BYTES = 2**63 - 1
_MAX_CODE = 125


@dataclass(frozen=True)
class Commission:
    """`source`: as a user writes it. `layers`: as a user writes them, None for all."""

    source: str
    layers: str | None = None

    def to_message(self) -> dict[str, Any]:
        layers = {} if self.layers is None else {"layers": self.layers}
        return {"source": self.source, **layers}


@dataclass(frozen=True)
class Progressed:
    """How far it is; both 0 where that is not known yet."""

    done_bytes: int
    total_bytes: int

    def to_message(self) -> dict[str, Any]:
        return {"event": "progress", **asdict(self)}


@dataclass(frozen=True)
class Held:
    """What the other node holds then. `proof`: in the words of `meshnode.pipeline.pulling`."""

    name: str
    id: str
    pulled_bytes: int
    held_bytes: int
    weight_bytes: int
    complete: bool
    proof: str

    def to_message(self) -> dict[str, Any]:
        return {"event": "held", **asdict(self)}


@dataclass(frozen=True)
class Failed:
    """Why it did not come to that."""

    reason: str
    code: int = 1

    def to_message(self) -> dict[str, Any]:
        return {"event": "failed", "reason": self.reason[:MAX_REASON_CHARS], "code": self.code}


News = Progressed | Held | Failed


def check_no_secrets(source: str, node: str) -> str:
    """The source as it may travel. Raises `UsageError`, which repeats no secret: it is none, or it
    holds what is not to leave this machine."""
    reference = parse_reference(source)
    if is_secret(reference):
        raise UsageError(
            "a password in an address, or what stands behind its question mark, does not leave "
            f"this machine: run `mesh pull` with it on {node}, or give an address without it"
        )
    text = str(reference)
    if len(text) > MAX_REFERENCE_CHARS:
        raise UsageError(f"the address is longer than {MAX_REFERENCE_CHARS} characters")
    return text


def check_layers_text(layers: str | None) -> None:
    """Raises `UsageError` for what no other node would read; what it means is that one's to say."""
    if layers is not None and not _is_text(layers, MAX_LAYERS_CHARS):
        raise UsageError("layers are written as the first and the last, like 27:52")


def parse_commission_untrusted(message: Mapping[str, Any]) -> Commission:
    """Raises `BadMessage` and nothing else."""
    source, layers = message.get("source"), message.get("layers")
    if not isinstance(source, str) or not _is_text(source, MAX_REFERENCE_CHARS):
        raise BadMessage("the peer's order to pull names no source")
    if layers is not None and not _is_text(layers, MAX_LAYERS_CHARS):
        raise BadMessage("the peer's order to pull names layers that cannot be")
    try:
        check_no_secrets(source, "that machine")
    except UsageError as error:
        raise BadMessage(f"the peer's order to pull cannot be carried out: {error}") from None
    return Commission(source, layers)


def parse_news_untrusted(message: Mapping[str, Any]) -> News:
    """Raises `BadMessage` and nothing else."""
    match message.get("event"):
        case "progress":
            return Progressed(_count(message, "done_bytes"), _count(message, "total_bytes"))
        case "held":
            return _held(message)
        case "failed":
            reason = message.get("reason")
            if not isinstance(reason, str):
                raise _strange()
            shown = "".join(char if char.isprintable() else "?" for char in reason)
            return Failed(shown[:MAX_REASON_CHARS], max(1, _count(message, "code", _MAX_CODE)))
    raise _strange()


def _held(message: Mapping[str, Any]) -> Held:
    name, identity, proof = (message.get(key) for key in ("name", "id", "proof"))
    if not _is_text(name, MAX_NAME_CHARS) or not _is_text(proof, MAX_NAME_CHARS):
        raise _strange()
    if not isinstance(identity, str) or not is_identity(identity):
        raise _strange()
    complete = message.get("complete")
    if not isinstance(complete, bool):
        raise _strange()
    return Held(
        shown_name(str(name)),
        identity,
        _count(message, "pulled_bytes"),
        _count(message, "held_bytes"),
        _count(message, "weight_bytes"),
        complete,
        str(proof),
    )


def _count(message: Mapping[str, Any], key: str, most: int = _MAX_BYTES) -> int:
    value = message.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise _strange()
    return value


def _is_text(value: Any, most_chars: int) -> bool:
    return isinstance(value, str) and 0 < len(value) <= most_chars and value.isprintable()


def _strange() -> BadMessage:
    return BadMessage("the peer says of a pull what makes no sense")
