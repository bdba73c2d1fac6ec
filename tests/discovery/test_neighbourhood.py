"""With whom a node keeps a session: with all of a few, with a few of many, and never nobody."""

from __future__ import annotations

import hashlib

from discovery.neighbourhood import ALL_UP_TO, DRAWN, SPARE, draw, neighbourhood
from tunnels.peer import PeerId


def peers(count: int) -> list[PeerId]:
    return [PeerId(hashlib.sha256(b"%d" % number).digest()) for number in range(count)]


def secret(number: int) -> bytes:
    return hashlib.sha256(b"secret %d" % number).digest()


def choose(
    others: list[PeerId], needed: tuple[PeerId, ...] = (), failed: dict[PeerId, float] | None = None
) -> frozenset[PeerId]:
    return neighbourhood(others, needed=needed, failed=failed or {}, secret=secret(0))


def test_a_few_all_know_each_other_whoever_answers() -> None:
    few = peers(ALL_UP_TO)
    assert choose(few, failed=dict.fromkeys(few, 1.0)) == frozenset(few)
    assert choose([]) == frozenset()


def test_of_many_some_are_drawn_and_the_same_again() -> None:
    many = peers(200)
    drawn = choose(many)
    assert len(drawn) == DRAWN
    assert choose(many[::-1]) == drawn


def test_one_more_member_changes_little() -> None:
    many = peers(200)
    assert len(choose(many) & choose([*many, PeerId(bytes(32))])) >= DRAWN - 1


def test_who_is_needed_is_added_if_it_is_a_member() -> None:
    many = peers(200)
    stranger = PeerId(bytes(32))
    assert choose(many, needed=(many[7], stranger)) == choose(many) | {many[7]}


def test_for_one_that_does_not_answer_another_is_drawn_and_it_is_tried_again() -> None:
    many = peers(200)
    gone = draw(many, secret(0))[0]
    chosen = choose(many, failed={gone: 1.0})
    assert gone in chosen
    assert len(chosen - choose(many)) == 1


def test_of_many_that_do_not_answer_those_not_tried_for_longest_are() -> None:
    many = peers(200)
    failed = {peer: float(moment) for moment, peer in enumerate(many[:150])}
    chosen = choose(many, failed=failed)
    assert len(chosen) == DRAWN + SPARE
    assert frozenset(many[:SPARE]) < chosen


def test_nobody_knows_whom_another_draws() -> None:
    many = peers(200)
    orders = {tuple(draw(many, secret(number))[:DRAWN]) for number in range(50)}
    assert len(orders) == 50


def test_a_mesh_in_which_all_draw_is_one_piece() -> None:
    """Also after a fifth of it has gone, each with all of its sessions."""
    many = peers(300)
    links: dict[PeerId, set[PeerId]] = {peer: set() for peer in many}
    for number, peer in enumerate(many):
        others = [one for one in many if one != peer]
        for other in neighbourhood(others, needed=(), failed={}, secret=secret(number)):
            links[peer].add(other)
            links[other].add(peer)
    gone = set(many[::5])
    reached, edge = {many[1]}, [many[1]]
    while edge:
        for other in links[edge.pop()] - reached - gone:
            reached.add(other)
            edge.append(other)
    assert len(reached) == len(many) - len(gone)
