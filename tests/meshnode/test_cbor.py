"""What CBOR may say to us, and what it may not."""

from __future__ import annotations

import tracemalloc

import cbor2
import pytest

from meshnode.cbor import MAX_VALUES, BadCbor, loads_untrusted


def test_plain_values_are_read() -> None:
    value = {"a": [1, -5, 2**64 - 1, 2.5, b"x", None, True, "é"], "b": {"c": []}}
    assert loads_untrusted(cbor2.dumps(value)) == value


@pytest.mark.parametrize("tag", [0, 1, 2, 3, 4, 5, 25, 28, 29, 30, 35, 36, 256, 258, 261, 2**40])
def test_no_tag_is_read(tag: int) -> None:
    with pytest.raises(BadCbor):
        loads_untrusted(cbor2.dumps({"a": cbor2.CBORTag(tag, 1)}))


def test_a_number_of_half_a_megabyte_is_refused_at_once() -> None:
    """Read as a decimal it keeps a core busy for more than a minute."""
    digits = b"\xc2\x5a" + (1 << 19).to_bytes(4, "big") + b"\x9d" * (1 << 19)
    with pytest.raises(BadCbor):
        loads_untrusted(b"\xa1\x61a\xc4\x82\x01" + digits)


@pytest.mark.parametrize(
    "data",
    [
        b"\xa1\x01\x02",  # a key that is a number
        b"\xa2\x61a\x01\x61a\x02",  # a key twice
        b"\x9f\x01\xff",  # a list of unknown length
        b"\x81" * 1000,
        b"\x61\xff",
        b"",
    ],
)
def test_odd_shapes_are_refused(data: bytes) -> None:
    with pytest.raises(BadCbor):
        loads_untrusted(data)


@pytest.mark.parametrize("item", [b"\xa0", b"\x80", b"\x60", b"\x18\x18", b"\xf9\x00\x00"])
def test_a_message_of_very_many_values_is_refused_before_they_are_made(item: bytes) -> None:
    """16 MiB of empty maps become 1.2 GiB of them, and keep a core busy for a second."""
    count = MAX_VALUES + 1
    data = b"\x9a" + count.to_bytes(4, "big") + item * count
    tracemalloc.start()
    try:
        with pytest.raises(BadCbor, match="too many values"):
            loads_untrusted(data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_what_a_model_of_twenty_thousand_tensors_needs_is_read() -> None:
    row = ["blk.100.ffn_gate_exps.weight", 12, 2**40, 1, 1, 1, 2**40, bytes(32)]
    rows = [row] * 20_000
    assert loads_untrusted(cbor2.dumps(rows)) == rows
    assert loads_untrusted(cbor2.dumps({"wanted": b"\xa0" * (4 * MAX_VALUES)}))
