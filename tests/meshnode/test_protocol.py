"""Messages between orchestrator and worker: round trips, and nothing but BadMessage for junk."""

from __future__ import annotations

from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.errors import BadMessage
from meshnode.pipeline import protocol
from meshnode.pipeline.protocol import (
    DeviceFacts,
    End,
    Granted,
    LeaseRequest,
    PushFrom,
    PushNews,
    PushTo,
    WorkerFacts,
)
from tunnels import PeerId

FACTS = WorkerFacts(
    name="tower",
    engine_key="abc123",
    backend="cpu",
    usable_bytes=7 * 2**30,
    devices=(DeviceFacts("CPU", "a processor", False, 8 * 2**30, 7 * 2**30),),
    models=("glm", "demo"),
)
REQUEST = LeaseRequest(engine_key="abc123", model="glm", memory_bytes=2**30, wanted=b"packed")
GRANTED = Granted(
    lease="00ff00ff", usable_count=9, missing_count=1, differing_count=1, differing=("blk.0.x",)
)
NEIGHBOUR = PeerId(bytes(range(32)))


def over_the_wire(message: dict[str, Any]) -> dict[str, Any]:
    arrived: dict[str, Any] = cbor2.loads(cbor2.dumps(message))
    return arrived


def test_every_message_survives_the_wire() -> None:
    assert protocol.parse_worker_facts_untrusted(over_the_wire(FACTS.to_message())) == FACTS
    assert protocol.parse_lease_request_untrusted(over_the_wire(REQUEST.to_message())) == REQUEST
    assert protocol.parse_granted_untrusted(over_the_wire(GRANTED.to_message())) == GRANTED
    for order in (PushFrom(NEIGHBOUR), PushTo(NEIGHBOUR, "00ff00ff")):
        arrived = over_the_wire(order.to_message())
        assert protocol.parse_push_order_untrusted(arrived) == order
    for news in (PushNews(End.FROM, True), PushNews(End.TO, True, silent=True)):
        assert protocol.parse_push_news_untrusted(over_the_wire(news.to_message())) == news
    assert protocol.parse_reason_untrusted({"reason": "no"}) == "no"
    assert protocol.parse_progress_untrusted({"done_bytes": 1, "total_bytes": 2}) == (1, 2)


@pytest.mark.parametrize(
    "change",
    [
        {"devices": []},
        {"devices": "CPU"},
        {"devices": [["CPU"]]},
        {"devices": ["short"]},
        {"devices": [["CPU", "x", 1, 2, 3]]},
        {"devices": [["CPU", "x", False, -2, 3]]},
        {"devices": [[7, "x", False, 2, 3]]},
        {"devices": [["CPU", "x", False, 1, 1]] * (protocol.MAX_DEVICES + 1)},
        {"usable_bytes": True},
        {"usable_bytes": 2**63},
        {"name": "x" * 513},
        {"name": None},
        {"models": [1]},
    ],
)
def test_facts_of_a_wrong_shape_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BadMessage):
        protocol.parse_worker_facts_untrusted(FACTS.to_message() | change)


def test_a_lease_id_must_be_fit_for_a_service_name() -> None:
    for lease in ("", "../x", "a/b", "ä"):
        with pytest.raises(BadMessage):
            protocol.parse_granted_untrusted(GRANTED.to_message() | {"lease": lease})


def test_an_older_worker_knows_no_ring() -> None:
    older = GRANTED.to_message()
    del older["ring"]
    assert protocol.parse_granted_untrusted(older).ring == 0
    newer = GRANTED.to_message() | {"ring": 7}
    assert protocol.parse_granted_untrusted(newer).ring == 7
    for odd in (-1, "1", None, True):
        with pytest.raises(BadMessage):
            protocol.parse_granted_untrusted(older | {"ring": odd})


@pytest.mark.parametrize(
    "change",
    [
        {"op": "lease"},
        {"op": None},
        {"peer": "text"},
        {"peer": bytes(31)},
        {"peer": bytes(33)},
        {"lease": "../x"},
        {"lease": 7},
    ],
)
def test_an_order_to_push_names_a_peer_and_a_lease_or_is_none(change: dict[str, Any]) -> None:
    with pytest.raises(BadMessage):
        protocol.parse_push_order_untrusted(PushTo(NEIGHBOUR, "1").to_message() | change)


@pytest.mark.parametrize(
    "change",
    [
        {"end": "middle"},
        {"end": []},
        {"stands": 1},
        {"silent": None},
        {"reason": None},
        {"reason": "x" * 513},
    ],
)
def test_news_of_a_push_of_a_wrong_shape_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BadMessage):
        protocol.parse_push_news_untrusted(PushNews(End.TO, True).to_message() | change)


def test_a_request_without_tensors_is_refused() -> None:
    with pytest.raises(BadMessage):
        protocol.parse_lease_request_untrusted(REQUEST.to_message() | {"wanted": "text"})


def test_a_peers_sentence_cannot_move_the_cursor() -> None:
    assert protocol.parse_reason_untrusted({"reason": "a\x1b[2Jb\n"}) == "a?[2Jb?"


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
keys = st.sampled_from(
    [
        *("name", "devices", "models", "usable_bytes", "lease", "reason", "wanted"),
        *("memory_bytes", "op", "peer", "end", "stands", "silent", "ring"),
    ]
)


@given(st.dictionaries(keys, junk))
def test_junk_raises_nothing_else(message: dict[str, Any]) -> None:
    for parse in (
        protocol.parse_worker_facts_untrusted,
        protocol.parse_lease_request_untrusted,
        protocol.parse_granted_untrusted,
        protocol.parse_reason_untrusted,
        protocol.parse_progress_untrusted,
        protocol.parse_push_order_untrusted,
        protocol.parse_push_news_untrusted,
    ):
        try:
            parse(message)
        except BadMessage:
            continue
