"""A web page in the user's browser must not be able to drive the gateway."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.gateway.rules import HostRule, is_json, is_own_origin

LOOPBACK = ["localhost", "LOCALHOST:8090", "127.0.0.1:8090", "127.8.9.1", "[::1]:8090", "[::1]"]
FOREIGN = [
    "evil.example",
    "evil.example:8090",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "192.168.1.5:8090",
    "[fe80::1]",
    "localhost:8090:1",
    "localhost:",
    "localhost:999999",
    "user@localhost",
    "localhost/",
    "[::1",
    "::1",
    "[1]",
    "",
    " localhost",
    "localhost\n",
    "\u0661\u0662\u0667.0.0.1",
]


@pytest.mark.parametrize("name", LOOPBACK)
@pytest.mark.parametrize("bound", ["127.0.0.1", "localhost", "192.168.1.5", "0.0.0.0"])
def test_this_machines_own_names_are_always_let_in(bound: str, name: str) -> None:
    assert HostRule.for_bound(bound).allows(name)


@pytest.mark.parametrize("name", FOREIGN)
def test_a_loopback_gateway_answers_to_no_other_name(name: str) -> None:
    assert not HostRule.for_bound("127.0.0.1").allows(name)


def test_a_name_or_address_that_was_bound_is_let_in() -> None:
    assert HostRule.for_bound("Tower.lan").allows("tower.LAN:8090")
    assert HostRule.for_bound("192.168.1.5").allows("192.168.1.5:8090")
    assert HostRule.for_bound("fd00::7").allows("[fd00::7]:8090")
    assert not HostRule.for_bound("192.168.1.5").allows("192.168.1.6")


@pytest.mark.parametrize("bound", ["", "*", "0.0.0.0", "::"])
def test_bound_everywhere_any_address_will_do_but_no_name(bound: str) -> None:
    rule = HostRule.for_bound(bound)
    assert rule.allows("192.168.1.5:8090")
    assert rule.allows("[2001:db8::7]")
    assert not rule.allows("rebound.example:8090")


@given(st.text(max_size=40), st.sampled_from(["127.0.0.1", "0.0.0.0"]))
def test_no_host_header_whatever_makes_the_rule_fail(header: str, bound: str) -> None:
    assert HostRule.for_bound(bound).allows(header) in (True, False)


def test_only_the_very_host_and_port_of_the_request_is_our_own_origin() -> None:
    assert is_own_origin("http://localhost:8090", "localhost:8090")
    assert is_own_origin("HTTP://LOCALHOST:8090", "localhost:8090")
    assert not is_own_origin("http://localhost:3000", "localhost:8090")
    assert not is_own_origin("https://localhost:8090", "localhost:8090")
    assert not is_own_origin("null", "localhost:8090")
    assert not is_own_origin("", "localhost:8090")


def test_only_json_is_json() -> None:
    assert is_json("application/json")
    assert is_json("Application/JSON; charset=utf-8")
    for other in ("", "text/plain", "application/jsonp", "text/plain; application/json"):
        assert not is_json(other)
