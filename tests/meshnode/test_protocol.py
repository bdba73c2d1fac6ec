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
    Progress,
    PushFrom,
    PushNews,
    PushTo,
    WorkerFacts,
)
from meshnode.pipeline.speeds import Speed, speed_of
from tunnels import PeerId

FACTS = WorkerFacts(
    name="tower",
    engine_key="abc123",
    backend="cpu",
    usable_bytes=7 * 2**30,
    devices=(
        DeviceFacts("CUDA0", "a card", True, 2**34, 2**34, Speed(7e11, 9e13)),
        DeviceFacts("CPU", "a processor", False, 8 * 2**30, 7 * 2**30),
    ),
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
    for progress in (Progress(1, 2), Progress(1, 2, pulls=True)):
        assert protocol.parse_progress_untrusted(over_the_wire(progress.to_message())) == progress


def test_a_worker_of_before_says_nothing_of_speeds_and_ours_nothing_that_it_trips_over() -> None:
    message = FACTS.to_message()
    assert all(len(row) == 5 for row in message["devices"]), "older nodes take five values"
    del message["speeds"]
    found = protocol.parse_worker_facts_untrusted(over_the_wire(message))
    assert [device.speed for device in found.devices] == [None, None]


INF, NAN = float("inf"), float("nan")
IMPOSSIBLE = (0, -1, 1, 1e300, 1e12, NAN, INF, 2**63, 10**15 + 1, True, "fast", None, [5])


def test_a_speed_is_told_whole_or_as_two_rates_and_more_is_for_later_versions() -> None:
    speed = Speed(26e9, 140e9, layer_s=4e-6, number_s=4.25e-9, attention_s=6e-11)
    assert speed_of(speed.to_row()) == speed
    assert speed_of([*speed.to_row(), "later"]) == speed
    assert speed_of(speed.to_row()[:2]) == Speed(26e9, 140e9)


@pytest.mark.parametrize("time", [-1, 10**18 + 1, 0.5, NAN, True, None, "quick"], ids=repr)
def test_a_time_that_cannot_be_makes_the_speed_unknown(time: Any) -> None:
    for place in (2, 3, 4):
        row: list[Any] = [10**12, 10**12, 1, 1, 1]
        row[place] = time
        assert speed_of(row) is None
    assert speed_of([10**12] * 65) is None


@pytest.mark.parametrize("rate", IMPOSSIBLE, ids=repr)
def test_a_speed_that_cannot_be_is_not_known(rate: Any) -> None:
    for row in ([rate, 10**12], [10**12, rate], [10**12, 10**12, rate], [rate], rate):
        message = {**FACTS.to_message(), "speeds": [row]}
        found = protocol.parse_worker_facts_untrusted(over_the_wire(message))
        assert [device.speed for device in found.devices] == [None, None]


def test_speeds_of_devices_that_are_not_there_are_nobodys() -> None:
    message = {**FACTS.to_message(), "speeds": [[10**12, 10**12]] * 9}
    assert len(protocol.parse_worker_facts_untrusted(over_the_wire(message)).devices) == 2
    with pytest.raises(BadMessage):
        protocol.parse_worker_facts_untrusted({**FACTS.to_message(), "speeds": "fast"})


def test_a_worker_of_an_older_version_only_digests() -> None:
    words = {"event": "progress", "done_bytes": 1, "total_bytes": 2}
    assert protocol.parse_progress_untrusted(words) == Progress(1, 2, pulls=False)
    granted = GRANTED.to_message()
    del granted["digests"]
    assert protocol.parse_granted_untrusted(granted).digests == b""
    request = REQUEST.to_message()
    del request["order"]
    assert protocol.parse_lease_request_untrusted(request).order == b""


@pytest.mark.parametrize("change", [{"done_bytes": -1}, {"total_bytes": None}, {"pulls": 1}])
def test_progress_of_a_wrong_shape_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BadMessage):
        protocol.parse_progress_untrusted(Progress(1, 2).to_message() | change)


def test_digests_and_orders_are_bytes() -> None:
    with pytest.raises(BadMessage):
        protocol.parse_granted_untrusted(GRANTED.to_message() | {"digests": "text"})
    with pytest.raises(BadMessage):
        protocol.parse_lease_request_untrusted(REQUEST.to_message() | {"order": ["text"]})


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
