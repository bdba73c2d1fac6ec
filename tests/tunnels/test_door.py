"""Who is heard when many knock."""

from __future__ import annotations

import pytest

from tunnels import door
from tunnels.door import Door, Verdict, network_of


def address(number: int) -> str:
    return f"11.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"


def test_the_first_few_are_taken_at_their_word_and_the_next_must_prove_their_address() -> None:
    gate = Door(0.0)
    few = [gate.knock(address(n), 0.0, address_checked=False) for n in range(30)]
    assert few.count(Verdict.HEAR) == door.UNCHECKED_HALF_OPEN
    assert set(few[door.UNCHECKED_HALF_OPEN :]) == {Verdict.RETRY}
    assert gate.knock(address(99), 0.0, address_checked=True) is Verdict.HEAR


def test_strangers_that_come_and_go_fast_must_prove_their_address_too() -> None:
    gate = Door(0.0)
    verdicts = []
    for number in range(30):
        verdicts.append(gate.knock(address(number), 0.0, address_checked=False))
        if verdicts[-1] is Verdict.HEAR:
            gate.leave(address(number))
    assert verdicts.count(Verdict.HEAR) == int(door.UNCHECKED.burst)
    assert gate.half_open == 0


def test_forged_senders_get_a_bounded_number_of_answers() -> None:
    gate = Door(0.0)
    verdicts = [gate.knock(address(n), 0.0, address_checked=False) for n in range(5000)]
    assert verdicts.count(Verdict.RETRY) == int(door.RETRIES.burst)
    assert verdicts[-1] is Verdict.DROP


def test_the_room_is_bounded_even_for_true_addresses() -> None:
    gate = Door(0.0)
    verdicts = [gate.knock(address(n), 0.0, address_checked=True) for n in range(500)]
    assert verdicts.count(Verdict.HEAR) == gate.half_open == door.MAX_HALF_OPEN
    gate.leave(address(0))
    assert gate.knock(address(700), 1.0, address_checked=True) is Verdict.HEAR


@pytest.mark.parametrize("hosts", [["11.0.0.1"] * 40, [f"2001:db8::{n:x}" for n in range(1, 41)]])
def test_one_network_never_has_all_the_room(hosts: list[str]) -> None:
    gate = Door(0.0)
    heard = [gate.knock(host, 0.0, address_checked=True) for host in hosts]
    assert heard.count(Verdict.HEAR) == door.MAX_HALF_OPEN_PER_NETWORK
    assert gate.half_open_from(hosts[0]) == door.MAX_HALF_OPEN_PER_NETWORK
    gate.leave(hosts[0])
    assert gate.half_open_from(hosts[-1]) == door.MAX_HALF_OPEN_PER_NETWORK - 1
    assert gate.knock("11.0.0.2", 0.0, address_checked=True) is Verdict.HEAR


def test_one_network_and_all_together_come_at_a_bounded_rate() -> None:
    gate = Door(0.0)

    def comes_and_goes(host: str, now: float) -> bool:
        heard = gate.knock(host, now, address_checked=True) is Verdict.HEAR
        if heard:
            gate.leave(host)
        return heard

    one = sum(comes_and_goes("11.0.0.1", 0.0) for _ in range(200))
    assert one == int(door.PER_NETWORK.burst)
    many = sum(comes_and_goes(address(n), 100.0) for n in range(200))
    assert many == int(door.IN_ALL.burst)


def test_an_ipv6_customer_has_64_bits_to_itself() -> None:
    assert network_of("2001:db8:0:1::5") == network_of("2001:db8:0:1:ffff::6")
    assert network_of("2001:db8:0:1::5") != network_of("2001:db8:0:2::5")
    assert network_of("11.0.0.1") != network_of("11.0.0.2")
