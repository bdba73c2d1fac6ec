"""What nodes tell of their links, and what comes of all their words together."""

from __future__ import annotations

from typing import Any

import cbor2
import pytest

from meshnode.errors import BadMessage
from meshnode.pipeline.sounding import LINK_BYTES_PER_S
from meshnode.pipeline.speeds import ASSUMED_LINK, Link
from meshnode.pipeline.ways import MAX_RTT_US, MAX_WAYS, Way, links_of_ways, read_ways
from tunnels import PeerId

ANNA, BEN, CARL, EVE = (PeerId(bytes([n]) * 32) for n in range(4))
NAMES = {ANNA: "local", BEN: "ben", CARL: "carl"}
INF, NAN = float("inf"), float("nan")


def over_the_wire(*ways: Way) -> tuple[Way, ...]:
    return read_ways(cbor2.loads(cbor2.dumps([way.to_row() for way in ways])))


def test_ways_survive_the_wire() -> None:
    ways = (Way(BEN, 0.004, 5e6, 12.0), Way(CARL), Way(EVE, None, 1e6), Way(ANNA, 0.25))
    assert over_the_wire(*ways) == ways
    assert over_the_wire(Way(BEN, 1e9)) == (Way(BEN, MAX_RTT_US / 1e6),)


@pytest.mark.parametrize(
    "odd", [-1, 0.5, 1e300, NAN, INF, 2**80, True, "fast", None, [1]], ids=repr
)
def test_a_figure_that_cannot_be_is_not_known(odd: Any) -> None:
    rows = cbor2.loads(cbor2.dumps([[BEN.key, odd, odd, odd]]))
    assert read_ways(rows) == (Way(BEN),)


def test_rates_have_bounds() -> None:
    least, most = LINK_BYTES_PER_S
    for rate in (0, int(least) - 1, int(most) + 1):
        assert read_ways([[BEN.key, 5, rate, 0]])[0].bytes_per_s is None
    assert read_ways([[BEN.key, 5, int(most), 0, "of a later version"]])[0].bytes_per_s == most


@pytest.mark.parametrize(
    "rows",
    ["x", None, {}, [3], [[]], [[b"short", 1, 1, 1]], [["k" * 32, 1, 1, 1]], [[bytes(32), 1, 1]]],
    ids=repr,
)
def test_rows_of_another_shape_are_refused(rows: Any) -> None:
    with pytest.raises(BadMessage):
        read_ways(rows)


def test_more_links_than_a_node_has_are_refused() -> None:
    with pytest.raises(BadMessage):
        read_ways([[bytes(32), 1, 1, 1]] * (MAX_WAYS + 1))


def test_each_says_what_comes_in_and_together_both_directions_are_known() -> None:
    links = links_of_ways(
        NAMES,
        [
            ("local", [Way(BEN, 0.010, 5e6, 3.0)]),
            ("ben", [Way(ANNA, 0.001, 2e6), Way(CARL, 0.020, 8e6), Way(EVE, 0.001, 1e9)]),
            ("carl", [Way(BEN, 0.022)]),
        ],
        "local",
    )
    assert links["ben", "local"] == Link(0.010, 5e6, age_s=3.0)
    assert links["local", "ben"] == Link(0.010, 2e6), "of round trips, home believes itself"
    assert links["carl", "ben"] == Link(0.020, 8e6)
    assert links["ben", "carl"] == Link(0.020, ASSUMED_LINK.bytes_per_s, is_measured=False)
    assert len(links) == 4, "who is not planned with has no link"


def test_a_link_of_which_no_delay_is_known_is_none() -> None:
    assert links_of_ways(NAMES, [("ben", [Way(CARL, None, 1e6)])], "local") == {}
    assert links_of_ways(NAMES, [("ben", [Way(BEN, 0.1, 1e6)])], "local") == {}
