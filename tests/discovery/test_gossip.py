"""Who tells whom of whom: at once, once, and no more than is bounded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from discovery import gossip as gossip_module
from discovery.digest import pack_bits, pack_entries, pack_keys
from discovery.gossip import (
    ASKED_S,
    COMPARE_AGAIN_S,
    COMPARE_S,
    FANOUT,
    MAX_NEWS,
    MAX_REMEMBERED,
    MAX_SENT,
    NEWS_PAUSE_S,
    RECORDS,
    REFUSED_S,
    RETRY_S,
    SENDS,
    Gossip,
    Talk,
)
from tests.lab.crowd import Crowd
from tunnels.errors import BadFrame
from tunnels.peer import PeerId

LONG_S = 100_000.0


def named(number: int) -> PeerId:
    """Ordered by number."""
    return PeerId(number.to_bytes(32, "big"))


ME, BEN, CARL = named(1000), named(2000), named(500)


def first(_below: int) -> int:
    """The dice, when they show the lowest number always."""
    return 0


def knowing(*peers: PeerId, now: float = 0.0) -> Gossip:
    """ME, that has number 1 of each of these."""
    gossip = Gossip(ME, first, now)
    for peer in (ME, *peers):
        gossip.put(peer, 1, now)
    return gossip


def with_neighbour(*peers: PeerId) -> Gossip:
    """The same with BEN for a neighbour, who has been compared with."""
    gossip = knowing(BEN, *peers)
    gossip.meet(BEN)
    for talk in gossip.due(0):
        gossip.over(talk, 0)
    return gossip


def asked_for(gossip: Gossip, number: int, now: float, source: PeerId = BEN) -> bool:
    """Whether CARL's record of this number is asked for, when somebody tells of it."""
    answer = gossip.hear_untrusted(source, {"news": pack_entries({CARL: number})}, now)
    return answer == {"want": pack_keys([CARL])}


# -- when -------------------------------------------------------------------------------------


def test_without_a_neighbour_there_is_nothing_to_do() -> None:
    gossip = knowing(BEN)
    assert gossip.next_deadline() == float("inf")
    assert gossip.due(LONG_S) == []


def test_as_a_session_begins_the_lower_id_compares() -> None:
    gossip = knowing(BEN, CARL, now=LONG_S)
    gossip.meet(BEN)
    assert gossip.next_deadline() <= 0
    gossip.meet(CARL)
    assert gossip.neighbours() == {BEN, CARL}
    assert gossip.due(0) == [Talk(BEN, {})]
    assert gossip.due(0) == [], "one conversation at a time"
    assert gossip.next_deadline() == LONG_S, "then only what is due by the clock"


def test_now_and_then_one_neighbour_is_compared_with() -> None:
    gossip = with_neighbour()
    compared_at = []
    now = 0.0
    while now < 10 * COMPARE_S:
        now = max(now, gossip.next_deadline())
        for talk in gossip.due(now):
            assert talk == Talk(BEN, {})
            compared_at.append(now)
            gossip.over(talk, now)
    assert 8 <= len(compared_at) <= 24


def test_what_differed_is_soon_compared_again() -> None:
    gossip = with_neighbour()
    (talk,) = gossip.due(COMPARE_S)
    gossip.over(talk, COMPARE_S, differed=True)
    assert gossip.next_deadline() == COMPARE_S + COMPARE_AGAIN_S


def test_news_goes_out_at_once_and_then_together() -> None:
    gossip = with_neighbour(CARL)
    gossip.put(CARL, 2, 5.0)
    assert gossip.next_deadline() <= 5
    (talk,) = gossip.due(5.0)
    assert talk == Talk(BEN, {CARL: 2})
    assert gossip.opening(talk) == {"news": pack_entries({CARL: 2})}
    gossip.put(CARL, 3, 5.1)
    gossip.put(ME, 2, 5.1)
    gossip.over(talk, 5.2)
    assert gossip.due(5.2) == []
    assert gossip.next_deadline() == 5.2 + NEWS_PAUSE_S
    assert gossip.due(5.2 + NEWS_PAUSE_S) == [Talk(BEN, {ME: 2, CARL: 3})]


def test_a_conversation_that_failed_is_had_again_later_with_what_is_news_then() -> None:
    gossip = with_neighbour(CARL)
    gossip.put(CARL, 2, 5.0)
    gossip.put(ME, 2, 5.0)
    (talk,) = gossip.due(5.0)
    gossip.put(CARL, 3, 5.5)
    gossip.drop(ME)
    gossip.over(talk, 6.0, failed=True)
    assert gossip.next_deadline() == 6 + RETRY_S
    assert gossip.due(6 + RETRY_S) == [Talk(BEN, {CARL: 3})]


def test_a_comparison_that_failed_is_had_again() -> None:
    gossip = knowing(BEN)
    gossip.meet(BEN)
    (talk,) = gossip.due(0)
    gossip.over(talk, 0, failed=True)
    assert gossip.due(RETRY_S) == [Talk(BEN, {})]


def test_who_has_gone_is_told_nothing() -> None:
    gossip = with_neighbour(CARL)
    gossip.put(CARL, 2, 5.0)
    (talk,) = gossip.due(5.0)
    gossip.part(BEN)
    gossip.part(BEN)
    gossip.over(talk, 5.0)
    gossip.put(CARL, 3, 6.0)
    assert gossip.next_deadline() == float("inf")


# -- to whom ----------------------------------------------------------------------------------


def test_news_goes_to_some_and_neither_to_its_source_nor_to_whom_it_is_about() -> None:
    gossip = knowing()
    crowd = [named(n) for n in range(2000, 2030)]
    for peer in crowd:
        gossip.meet(peer)
    gossip.put(crowd[0], 1, 0.0, source=crowd[1])
    told = [talk.to for talk in gossip.due(0.0) if talk.news]
    assert len(told) == FANOUT
    assert not {crowd[0], crowd[1]} & set(told)


def test_who_is_known_to_have_it_is_not_told() -> None:
    gossip = with_neighbour(CARL)
    assert asked_for(gossip, 2, now=5.0)
    gossip.put(CARL, 2, 5.0, source=BEN)
    gossip.put(ME, 2, 5.0)
    gossip.hear_untrusted(BEN, {"news": pack_entries({ME: 2})}, 5.0)
    gossip.put(CARL, 2, 6.0)
    assert gossip.due(6.0) == []


def test_who_is_no_member_any_more_is_told_of_no_more() -> None:
    gossip = with_neighbour(CARL)
    gossip.put(CARL, 2, 5.0)
    gossip.drop(CARL)
    assert gossip.due(5.0) == []
    assert gossip.number(CARL) is None
    assert len(gossip) == 2


def test_so_much_news_at_once_and_the_rest_next() -> None:
    gossip = with_neighbour()
    for n in range(MAX_NEWS + 1):
        gossip.put(named(n), 1, 5.0)
    (talk,) = gossip.due(5.0)
    assert len(talk.news) == MAX_NEWS
    gossip.over(talk, 5.0)
    (rest,) = gossip.due(5.0 + NEWS_PAUSE_S)
    assert len(rest.news) == 1


# -- what is asked for ------------------------------------------------------------------------


def test_a_record_is_asked_for_if_it_is_newer_and_nobody_was_asked_just_now() -> None:
    gossip = with_neighbour(CARL)
    assert not asked_for(gossip, 1, now=5.0)
    assert asked_for(gossip, 2, now=5.0)
    assert not asked_for(gossip, 2, now=5.0)
    assert asked_for(gossip, 3, now=5.0)
    assert asked_for(gossip, 3, now=5.0 + ASKED_S)


def test_what_was_refused_is_not_asked_for_again_but_what_is_newer_is() -> None:
    gossip = with_neighbour()
    gossip.refuse(CARL, 7, 5.0)
    assert not asked_for(gossip, 7, now=6.0)
    assert asked_for(gossip, 8, now=6.0)
    assert asked_for(gossip, 7, now=5.0 + REFUSED_S)


def test_a_member_that_changes_all_the_time_is_asked_for_now_and_then() -> None:
    gossip = with_neighbour(CARL)
    taken = 0
    for second in range(600):
        if asked_for(gossip, second + 2, now=float(second)):
            gossip.put(CARL, second + 2, float(second), source=BEN)
            taken += 1
    assert RECORDS.burst <= taken <= RECORDS.burst + 600 * RECORDS.per_s


def test_offers_alone_use_nothing_up() -> None:
    """A neighbour that tells of records and never sends one keeps no other from doing so."""
    gossip = with_neighbour(CARL)
    for n in range(1000):
        asked_for(gossip, 1000 + n, now=0.0)
    assert asked_for(gossip, 2, now=ASKED_S)


def test_what_is_remembered_of_offers_is_bounded() -> None:
    gossip = with_neighbour()
    for start in range(0, 2 * MAX_REMEMBERED, MAX_NEWS):
        bogus = {named(start + n): 1 for n in range(MAX_NEWS)}
        gossip.hear_untrusted(BEN, {"news": pack_entries(bogus)}, 0.0)
    assert len(gossip._asked) == MAX_REMEMBERED
    assert len(gossip._neighbours[BEN].knows) <= 2, "of whom there are records here"


def test_our_own_record_is_asked_for_where_a_newer_one_goes_round() -> None:
    """From before our disk was set back."""
    gossip = with_neighbour()
    answer = gossip.hear_untrusted(BEN, {"news": pack_entries({ME: 9})}, 0.0)
    assert answer == {"want": pack_keys([ME])}


# -- comparing --------------------------------------------------------------------------------


def compare(asker: Gossip, listener: Gossip, now: float = 0.0) -> tuple[set[PeerId], set[PeerId]]:
    """What each sends the other, when `asker` compares."""
    asker.meet(BEN)
    (talk,) = asker.due(now)
    cells = listener.hear_untrusted(ME, asker.opening(talk), now)
    narrowed = asker.narrow_untrusted(cells)
    if narrowed is None:
        return set(), set()
    wanted, sent = listener.compare_untrusted(ME, narrowed, now)
    answer = {"want": pack_keys(wanted), "pages": 1}
    asked, pages = asker.compared_untrusted(talk, answer, now)
    assert pages == 1
    return set(asked), set(sent)


def ben_knowing(*entries: tuple[PeerId, int]) -> Gossip:
    gossip = Gossip(BEN, first, 0.0)
    for peer, number in entries:
        gossip.put(peer, number, 0.0)
    gossip.meet(ME)
    return gossip


def test_two_that_know_the_same_find_out_with_a_root() -> None:
    assert compare(knowing(BEN), ben_knowing((ME, 1), (BEN, 1))) == (set(), set())


def test_each_sends_what_the_other_lacks_or_has_older() -> None:
    ours = knowing(BEN, CARL, named(7))
    theirs = ben_knowing((BEN, 1), (CARL, 2), (named(7), 1), (named(8), 1))
    assert compare(ours, theirs) == ({ME}, {CARL, named(8)})


@given(st.dictionaries(st.integers(0, 99), st.integers(1, 3)), st.data())
def test_after_a_comparison_and_its_records_both_know_the_newest(
    ours: dict[int, int], data: st.DataObject
) -> None:
    theirs = data.draw(st.dictionaries(st.integers(0, 99), st.integers(1, 3)))
    left = Gossip(ME, first, 0.0)
    right = ben_knowing(*((named(n), number) for n, number in theirs.items()))
    for n, number in ours.items():
        left.put(named(n), number, 0.0)
    sent, got = compare(left, right)
    for peer in sent:
        right.put(peer, left.number(peer) or 0, 0.0, ME)
    for peer in got:
        left.put(peer, right.number(peer) or 0, 0.0, BEN)
    assert left.root() == right.root()


def test_more_than_fits_is_left_for_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gossip_module, "MAX_ENTRIES", 3)
    crowd = [PeerId(bytes([n]) * 32) for n in range(12)]
    ours, theirs = knowing(*crowd), ben_knowing()
    asked, _ = compare(ours, theirs)
    assert len(asked) == 3


def test_a_joiner_is_sent_a_large_mesh_in_parts() -> None:
    crowd = [named(n) for n in range(3 * MAX_SENT)]
    listener = ben_knowing(*((peer, 1) for peer in crowd))
    _, sent = compare(knowing(), listener)
    assert len(sent) == MAX_SENT


def test_who_asks_for_everything_again_and_again_is_sent_so_much_and_no_more() -> None:
    crowd = [named(n) for n in range(2 * MAX_SENT)]
    listener = ben_knowing(*((peer, 1) for peer in crowd))
    message = {"of": pack_bits(range(64)), "entries": b""}
    sent = sum(len(listener.compare_untrusted(ME, message, 0.0)[1]) for _ in range(100))
    assert sent == SENDS.burst
    assert len(listener.compare_untrusted(ME, message, 1.0)[1]) == SENDS.per_s


def test_who_is_not_told_of_as_a_neighbour_is_answered_all_the_same() -> None:
    """Its session has just ended, or just begun."""
    gossip = knowing(CARL)
    assert asked_for(gossip, 2, now=0.0)
    message = {"of": pack_bits(range(64)), "entries": b""}
    wanted, sent = gossip.compare_untrusted(BEN, message, 0.0)
    assert (wanted, set(sent)) == ([], {CARL, ME})


# -- what is no message -----------------------------------------------------------------------


def hostile() -> Iterator[dict[str, object]]:
    yield {}
    yield {"news": [1]}
    yield {"root": 7}
    yield {"news": pack_entries({named(n): 1 for n in range(MAX_NEWS + 1)})}


@pytest.mark.parametrize("message", [*hostile()])
def test_an_opening_of_another_shape_is_refused(message: dict[str, object]) -> None:
    with pytest.raises(BadFrame):
        knowing().hear_untrusted(BEN, message, 0.0)


@pytest.mark.parametrize(
    "answer",
    [{}, {"want": b"", "pages": "1"}, {"want": b"", "pages": -1}, {"want": b"", "pages": 10**9}],
)
def test_an_answer_of_another_shape_is_refused(answer: dict[str, object]) -> None:
    with pytest.raises(BadFrame):
        knowing().compared_untrusted(Talk(BEN, {}), answer, 0.0)


def test_only_what_was_told_of_is_sent() -> None:
    gossip = with_neighbour(CARL)
    gossip.put(CARL, 2, 5.0)
    (talk,) = gossip.due(5.0)
    answer = {"want": pack_keys([CARL, ME, named(7)])}
    assert gossip.wanted_untrusted(talk, answer, 5.0) == [CARL]


# -- many -------------------------------------------------------------------------------------


def test_news_reaches_a_mesh_in_a_moment() -> None:
    crowd = Crowd(60)
    crowd.all_know_all()
    crowd.connect_all()
    crowd.run(60)
    node = crowd.up()[7]
    number = crowd.change(node)
    crowd.run(1.0)
    assert crowd.all_have(node.peer, number)


def test_what_a_cut_kept_apart_is_told_when_it_heals() -> None:
    """Two halves that each had news of their own."""
    crowd = Crowd(20, seed=1)
    crowd.all_know_all()
    nodes = crowd.up()
    for half in (nodes[:10], nodes[10:]):
        for one in half[1:]:
            crowd.link(half[0], one)
    crowd.run(60)
    numbers = {node.peer: crowd.change(node) for node in (nodes[3], nodes[13])}
    crowd.run(60)
    assert not crowd.all_have(nodes[3].peer, numbers[nodes[3].peer])
    crowd.link(nodes[0], nodes[10])
    crowd.run(2 * COMPARE_S)  # a hub tells most of them at once, the rest at a comparison
    assert all(crowd.all_have(peer, number) for peer, number in numbers.items())


def test_a_node_that_knew_one_finds_the_rest_and_outlives_it() -> None:
    crowd = Crowd(30, seed=2)
    crowd.all_know_all()
    crowd.connect_all()
    crowd.run(60)
    inviter, other = crowd.up()[:2]
    late = crowd.add("late")
    late.gossip.put(inviter.peer, 1, crowd.now)
    crowd.link(late, inviter)
    crowd.run(5)
    crowd.stop(inviter)
    crowd.settle(late)
    crowd.run(60)
    assert crowd.sessions(late) > 0
    number = crowd.change(other)
    crowd.run(1)
    assert late.gossip.number(other.peer) == number


def test_news_that_was_not_heard_is_told_again() -> None:
    gossip = with_neighbour(CARL)
    gossip.put(CARL, 2, 5.0)
    (talk,) = gossip.due(5.0)
    gossip.over(talk, 5.0, failed=True)
    assert gossip.due(5.0 + RETRY_S) == [talk]
