"""Texts a user types become values, or a sentence that shows the right form."""

from __future__ import annotations

import pytest

from meshnode.config import (
    DEFAULT_STUN,
    Address,
    PullSource,
    human_bytes,
    parse_address,
    parse_duration,
    parse_pull_sources,
    parse_servers,
    parse_size,
    parse_transports,
)
from meshnode.errors import UsageError


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("12G", 12 * 2**30), ("800M", 800 * 2**20), ("1.5GiB", 3 * 2**29), ("64 kb", 65536), ("7", 7)],
)
def test_a_size_reads_as_people_write_it(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "G", "12Q", "-1G", "0", "0.0001K", "1e9", "12 G B"])
def test_what_is_no_size_is_refused_with_the_form(text: str) -> None:
    with pytest.raises(UsageError, match="like 12G"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "duration_s"), [("90s", 90), ("30m", 1800), ("2H", 7200), ("7d", 604800)]
)
def test_a_duration_reads_as_people_write_it(text: str, duration_s: int) -> None:
    assert parse_duration(text) == duration_s


@pytest.mark.parametrize("text", ["", "2", "0h", "-1h", "2w", "1.5h"])
def test_what_is_no_duration_is_refused_with_the_form(text: str) -> None:
    with pytest.raises(UsageError, match="like 30m"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["99999999d", "3651d", "999999999999999999s"])
def test_a_duration_of_more_than_ten_years_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="ten years"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8090", Address("127.0.0.1", 8090)),
        ("[::1]:8090", Address("::1", 8090)),
        (":4433", Address(None, 4433)),
        ("*:4433", Address(None, 4433)),
        ("4433", Address(None, 4433)),
        ("tower.lan:0", Address("tower.lan", 0)),
    ],
)
def test_an_address_reads_as_people_write_it(text: str, address: Address) -> None:
    assert parse_address(text, what="--listen") == address


@pytest.mark.parametrize("text", ["", "host", "host:", "host:x", "host:65536", "::1:80", "h:-1"])
def test_what_is_no_address_is_refused_by_name(text: str) -> None:
    with pytest.raises(UsageError, match="--listen"):
        parse_address(text, what="--listen")


def test_addresses_print_as_they_are_typed() -> None:
    assert str(Address("::1", 80)) == "[::1]:80"
    assert str(Address(None, 80)) == "*:80"
    assert str(Address("10.0.0.5", 80)) == "10.0.0.5:80"


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(12, "12 B"), (2048, "2.0 KiB"), (3 * 2**29, "1.5 GiB"), (5 * 2**40, "5.0 TiB")],
)
def test_bytes_print_in_units_people_know(size_bytes: int, text: str) -> None:
    assert human_bytes(size_bytes) == text


@pytest.mark.parametrize(
    ("text", "names"),
    [("auto", ()), ("tcp", ("tcp",)), (" QUIC,tcp,quic", ("quic", "tcp"))],
)
def test_transports_are_names_with_commas_between(text: str, names: tuple[str, ...]) -> None:
    assert parse_transports(text, ("tcp", "quic", "relay")) == names


@pytest.mark.parametrize(
    ("text", "sources"),
    [
        ("none", set()),
        ("url", {PullSource.URL}),
        (" Hub, peers ", {PullSource.HUB, PullSource.PEERS}),
    ],
)
def test_sources_to_pull_from_are_named(text: str, sources: set[PullSource]) -> None:
    assert parse_pull_sources(text) == sources


@pytest.mark.parametrize("text", ["", "hub,", "everywhere", "none,hub"])
def test_sources_that_are_none_are_told_so(text: str) -> None:
    with pytest.raises(UsageError, match="some of hub, url, peers"):
        parse_pull_sources(text)


@pytest.mark.parametrize("text", ["", "tcp,", "pigeon", "auto,tcp"])
def test_transports_that_are_none_are_told_so(text: str) -> None:
    with pytest.raises(UsageError, match="of tcp, quic, relay; or auto"):
        parse_transports(text, ("tcp", "quic", "relay"))


@pytest.mark.parametrize(
    ("text", "servers"),
    [
        ("none", []),
        (" None ", []),
        (
            "stun.example:19302, 192.0.2.1,stun.example:19302",
            [("stun.example", 19302), ("192.0.2.1", 3478)],
        ),
        ("[2001:db8::1]:3478", [("2001:db8::1", 3478)]),
    ],
)
def test_stun_servers_are_names_or_addresses(text: str, servers: list[tuple[str, int]]) -> None:
    assert [(one.host, one.port) for one in parse_servers(text)] == servers


def test_the_servers_asked_by_default_are_apart_from_each_other() -> None:
    assert len({one.host for one in parse_servers(DEFAULT_STUN)}) == 3


@pytest.mark.parametrize("text", ["", ",", "stun.example:0", ":3478", "a b:1", "none,x:1x"])
def test_what_is_no_stun_server_is_refused_with_the_form(text: str) -> None:
    with pytest.raises(UsageError, match="HOST:PORT"):
        parse_servers(text)
