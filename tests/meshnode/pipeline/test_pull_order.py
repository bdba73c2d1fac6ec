"""What a worker is told to pull, on its way: whole, or refused."""

from __future__ import annotations

from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.errors import BadMessage
from meshnode.pipeline.pull_order import (
    MAX_REFERENCE_CHARS,
    PullOrder,
    from_wire_untrusted,
    pack_digests,
    to_wire,
    unpack_digests_untrusted,
)

ORDER = PullOrder("https://example.org/model.gguf", "0f" * 32, (0, 3, 4))
ROW = [1, ORDER.reference, bytes.fromhex(ORDER.provisional), b"\0\0\0\0\3\0\0\0\4\0\0\0"]


def test_an_order_survives_the_wire() -> None:
    assert cbor2.loads(to_wire(ORDER)) == ROW
    assert from_wire_untrusted(to_wire(ORDER), 5) == ORDER
    nothing = PullOrder(ORDER.reference, ORDER.provisional, ())
    assert from_wire_untrusted(to_wire(nothing), 0) == nothing


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, 2),
        (1, 7),
        (1, ""),
        (1, "https://a\nb"),
        (1, "x" * (MAX_REFERENCE_CHARS + 1)),
        (2, "0f" * 32),
        (2, bytes(31)),
        (3, [0]),
        (3, b"\0\0\0"),
        (3, b"\5\0\0\0"),  # one past the last
        (3, b"\1\0\0\0\1\0\0\0"),  # twice
        (3, b"\1\0\0\0\0\0\0\0"),  # falling
        (3, bytes(4 * 6)),
    ],
)
def test_an_order_that_makes_no_sense_is_refused(place: int, value: Any) -> None:
    with pytest.raises(BadMessage):
        from_wire_untrusted(cbor2.dumps([*ROW[:place], value, *ROW[place + 1 :]]), 5)


@pytest.mark.parametrize("data", [b"", b"\xff", cbor2.dumps(7), cbor2.dumps([1, 2])])
def test_what_is_no_order_is_refused(data: bytes) -> None:
    with pytest.raises(BadMessage):
        from_wire_untrusted(data, 5)


@given(st.binary(max_size=80))
def test_no_bytes_upset_the_parser(data: bytes) -> None:
    try:
        from_wire_untrusted(data, 5)
    except BadMessage:
        return


def test_digests_come_for_every_ordered_tensor_or_for_none() -> None:
    digests = (bytes(32), b"1" * 32)
    assert unpack_digests_untrusted(pack_digests(digests), 2) == digests
    assert unpack_digests_untrusted(b"", 2) == ()
    for data in (bytes(32), bytes(63), bytes(96)):
        with pytest.raises(BadMessage):
            unpack_digests_untrusted(data, 2)
