"""Two nodes find out where they differ; bytes of any shape upset neither."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from discovery.digest import (
    CELL_BYTES,
    CELLS,
    MAX_NUMBER,
    ROOT_BYTES,
    Digest,
    cell_of,
    pack_bits,
    pack_cells,
    pack_entries,
    pack_keys,
    parse_bits_untrusted,
    parse_cells_untrusted,
    parse_entries_untrusted,
    parse_keys_untrusted,
)
from tunnels.errors import BadFrame
from tunnels.peer import PeerId

ENTRIES = st.dictionaries(
    st.binary(min_size=32, max_size=32).map(PeerId), st.integers(0, MAX_NUMBER), max_size=40
)
ANN, BEN = PeerId(b"a" * 32), PeerId(b"b" * 32)


def of(entries: dict[PeerId, int]) -> Digest:
    digest = Digest()
    for peer, number in entries.items():
        digest.put(peer, number)
    return digest


@given(ENTRIES)
def test_the_same_entries_have_one_root_in_whatever_order_they_came(
    entries: dict[PeerId, int],
) -> None:
    backwards = dict(reversed(entries.items()))
    assert of(entries).root() == of(backwards).root()
    assert len(of(entries).root()) == ROOT_BYTES
    assert of(entries).entries(range(CELLS)) == entries
    assert len(of(entries)) == len(entries)


@given(ENTRIES, ENTRIES)
def test_other_entries_differ_in_the_cells_where_they_are(
    ours: dict[PeerId, int], theirs: dict[PeerId, int]
) -> None:
    pairs = zip(of(ours).cells(), of(theirs).cells(), strict=True)
    differing = [cell for cell, (our, their) in enumerate(pairs) if our != their]
    changed = {peer for peer in ours | theirs if ours.get(peer) != theirs.get(peer)}
    assert set(differing) == {cell_of(peer) for peer in changed}
    assert (of(ours).root() == of(theirs).root()) == (ours == theirs)


def test_what_changes_and_what_goes_is_seen() -> None:
    digest = of({ANN: 1, BEN: 1})
    before = digest.root()
    digest.put(ANN, 2)
    assert digest.root() != before
    assert digest.get(ANN) == 2
    assert digest.size(cell_of(ANN)) == 1
    digest.drop(ANN)
    digest.drop(ANN)
    assert digest.root() == of({BEN: 1}).root()
    assert digest.get(ANN) is None


@given(ENTRIES)
def test_what_is_packed_reads_back(entries: dict[PeerId, int]) -> None:
    assert parse_entries_untrusted(pack_entries(entries), 40) == entries
    assert parse_keys_untrusted(pack_keys(entries), 40) == list(entries)
    cells = of(entries).cells()
    assert parse_cells_untrusted(pack_cells(cells)) == cells


@given(st.sets(st.integers(0, CELLS - 1)))
def test_a_choice_of_cells_reads_back(cells: set[int]) -> None:
    assert parse_bits_untrusted(pack_bits(cells)) == sorted(cells)


def test_nothing_stands_for_cells_that_are_the_same() -> None:
    assert parse_cells_untrusted(b"") == ()


@pytest.mark.parametrize(
    "data",
    [None, "text", 7, b"x", bytes(39), bytes(41 * 40), (2**62 + 1).to_bytes(40, "big")],
)
def test_entries_of_another_shape_are_refused(data: object) -> None:
    with pytest.raises(BadFrame):
        parse_entries_untrusted(data, 40)


@pytest.mark.parametrize("data", [None, [], b"x", bytes(41 * 32)])
def test_keys_of_another_shape_are_refused(data: object) -> None:
    with pytest.raises(BadFrame):
        parse_keys_untrusted(data, 40)


@pytest.mark.parametrize("data", [None, b"x", bytes(CELLS * CELL_BYTES + 1)])
def test_cells_of_another_shape_are_refused(data: object) -> None:
    with pytest.raises(BadFrame):
        parse_cells_untrusted(data)


@pytest.mark.parametrize("data", [None, b"", bytes(7), bytes(9)])
def test_choices_of_another_shape_are_refused(data: object) -> None:
    with pytest.raises(BadFrame):
        parse_bits_untrusted(data)
