"""What two nodes say to each other when one has the other pull: whole, or refused."""

from __future__ import annotations

from typing import Any

import cbor2
import pytest

from meshnode.errors import BadMessage, UsageError
from meshnode.pipeline.commission import (
    MAX_REASON_CHARS,
    Commission,
    Failed,
    Held,
    Progressed,
    check_layers_text,
    check_no_secrets,
    parse_commission_untrusted,
    parse_news_untrusted,
)

ORDER = Commission("https://example.org/glm.gguf", "27:52")
HELD = Held("glm", "1a" * 32, 5, 10, 20, False, "digests")
SECRET = "geheim"


def over_the_wire(message: dict[str, Any]) -> dict[str, Any]:
    arrived: dict[str, Any] = cbor2.loads(cbor2.dumps(message))
    return arrived


def test_every_message_survives_the_wire() -> None:
    for order in (ORDER, Commission("mesh:glm")):
        assert parse_commission_untrusted(over_the_wire(order.to_message())) == order
    for news in (Progressed(1, 2), HELD, Failed("the disk is full", 7)):
        assert parse_news_untrusted(over_the_wire(news.to_message())) == news


def test_what_a_later_version_says_besides_is_passed_over() -> None:
    assert parse_commission_untrusted(ORDER.to_message() | {"more": [1]}) == ORDER
    assert parse_news_untrusted(HELD.to_message() | {"more": [1]}) == HELD


def test_a_sentence_is_short_harmless_and_never_of_success() -> None:
    told = parse_news_untrusted({"event": "failed", "reason": "a\x1b[2J" + "b" * 9999, "code": 0})
    assert isinstance(told, Failed)
    assert told.reason.startswith("a?[2J")
    assert (len(told.reason), told.code) == (MAX_REASON_CHARS, 1)
    assert len(Failed("x" * 9999).to_message()["reason"]) == MAX_REASON_CHARS


@pytest.mark.parametrize(
    "change",
    [
        {"source": None},
        {"source": ""},
        {"source": "x" * 2049},
        {"source": "mesh:a\nb"},
        {"source": "ftp://example.org/x"},
        {"source": "https://example.org/m.gguf?x=1"},
        {"source": "https://a:b@example.org/m.gguf"},
        {"layers": 5},
        {"layers": ""},
        {"layers": "1" * 41},
    ],
)
def test_an_order_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BadMessage):
        parse_commission_untrusted(ORDER.to_message() | change)


@pytest.mark.parametrize(
    "change",
    [
        {"event": "other"},
        {"event": None},
        {"name": ""},
        {"name": "x" * 256},
        {"id": 5},
        {"id": "1A" * 32},
        {"id": "1a" * 31},
        {"proof": None},
        {"complete": 1},
        {"pulled_bytes": -1},
        {"held_bytes": True},
        {"weight_bytes": 2**63},
        {"event": "failed"},
        {"event": "failed", "reason": "x", "code": 126},
        {"event": "failed", "reason": "x"},
        {"event": "progress"},
    ],
)
def test_news_that_cannot_be_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BadMessage):
        parse_news_untrusted(HELD.to_message() | change)


@pytest.mark.parametrize(
    "address",
    [
        f"https://ann:{SECRET}@example.org/m.gguf",
        f"https://{SECRET}@example.org/m.gguf",
        f"https://example.org/m.gguf?token={SECRET}",
        f"https://example.org/m-00001-of-00002.gguf?token={SECRET}",
    ],
)
def test_a_secret_does_not_travel_and_is_not_repeated(address: str) -> None:
    with pytest.raises(UsageError, match="run `mesh pull` with it on attic") as error:
        check_no_secrets(address, "attic")
    assert SECRET not in str(error.value)
    with pytest.raises(BadMessage) as refusal:
        parse_commission_untrusted({"source": address})
    assert SECRET not in str(refusal.value)


def test_what_holds_no_secret_travels_as_it_is_kept() -> None:
    for text in ("hf:org/repo/m.gguf@main", "ollama:glm4:latest", "mesh:glm", ORDER.source):
        assert check_no_secrets(text, "attic") == text
    with pytest.raises(UsageError, match="longer than"):
        check_no_secrets(f"https://example.org/{'m' * 2048}.gguf", "attic")


def test_layers_that_nobody_would_read_are_told_at_once() -> None:
    for layers in (None, "27:52", "output"):
        check_layers_text(layers)
    for bad in ("", "1\n2", "1" * 41):
        with pytest.raises(UsageError, match="like 27:52"):
            check_layers_text(bad)
