"""What the doctor says of the network: each finding in words, with what would help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from discovery.mapping import Mapping as PortMapping
from discovery.mapping import Transport
from discovery.portmap import NO_GATEWAY, PortMapStatus
from discovery.roster import Member, Roster
from meshnode.cli.checks import Check, Verdict
from meshnode.cli.doctor import examine_network
from meshnode.cli.firewall import firewall
from meshnode.cli.network_checks import Sight, look, nat_check, network_checks, relays_known
from tests.lab.nodes import identity
from tunnels import Candidate
from tunnels.binding import Address
from tunnels.demux import SharedSocket
from tunnels.nat import NatFacts
from tunnels.network import HostNetwork
from tunnels.peer import NatKind
from tunnels.stun import Server
from tunnels.stun_port import StunPort

A, B = ("192.0.2.1", 3478), ("192.0.2.2", 3478)
SEEN = ("198.51.100.7", 4433)
RELAY = ("203.0.113.9", 443)
EASY = NatFacts(NatKind.EASY, (SEEN,), True, asked=2, answered=2)
BLOCKED = NatFacts(NatKind.BLOCKED, asked=2)
NOTHING = NatFacts()
SWITCH_ON = "the router 192.168.1.1 maps no ports: switch on UPnP, or forward the port by hand"
UNMAPPED = PortMapStatus("192.168.1.1", problem=SWITCH_ON)
NAMED = (Server("stun.example", 3478), Server("stun.example.org", 3478))


def sight(
    v4: NatFacts = EASY,
    v6: NatFacts = NOTHING,
    answers: Mapping[Address, Address | None] | None = None,
    unresolved: tuple[Server, ...] = (),
    portmap: PortMapStatus | None = None,
    relays: Mapping[Address, list[str]] | None = None,
    own: tuple[str, ...] = ("192.168.1.5",),
    named: tuple[Server, ...] = (Server(*A), Server(*B)),
) -> Sight:
    heard = {A: SEEN, B: SEEN} if answers is None else answers
    return Sight({4: v4, 6: v6}, named, heard, unresolved, portmap, relays or {}, own)


def found(seen: Sight) -> dict[str, Check]:
    return {check.name: check for check in network_checks(seen)}


@pytest.mark.parametrize(
    ("name", "facts", "verdict", "words"),
    [
        ("IPv4", NatFacts(NatKind.NONE, (SEEN,)), "ok", "no NAT"),
        ("IPv4", EASY, "ok", "198.51.100.7:4433, and keeps the port"),
        ("IPv4", NatFacts(NatKind.EASY, (SEEN,), False), "ok", "changes the port"),
        ("IPv4", NatFacts(NatKind.HARD, (SEEN, A)), "note", "or a relay"),
        ("IPv4", BLOCKED, "note", "see UDP"),
        ("IPv4", NatFacts(mapped=(SEEN,), asked=1), "note", "name another with --stun"),
        ("IPv4", NatFacts(asked=1), "note", "the one server that was asked is silent"),
        ("IPv4", NOTHING, "note", "in no IPv4 network"),
        ("IPv6", NOTHING, "ok", "none here"),
    ],
)
def test_the_nat_is_told_with_what_would_help(
    name: str, facts: NatFacts, verdict: str, words: str
) -> None:
    check = nat_check(name, facts, ())
    assert (check.name, check.verdict) == (name, verdict)
    assert words in check.text


def test_a_network_that_is_well_is_so_in_every_line() -> None:
    checks = found(sight(portmap=PortMapStatus("192.168.1.1", "PCP")))
    assert {check.verdict for check in checks.values()} == {Verdict.OK}
    assert "2 of 2" in checks["STUN servers"].text


def test_where_udp_is_blocked_a_relay_is_named() -> None:
    checks = found(sight(BLOCKED, answers={A: None, B: None}))
    assert checks["UDP"].verdict is Verdict.NOTE
    assert "relay on port 443" in checks["UDP"].text
    assert "192.0.2.1:3478, 192.0.2.2:3478" in checks["STUN servers"].text


def test_where_no_name_is_known_nothing_was_asked_and_that_is_bad() -> None:
    here = ("192.168.1.5", "fd00::2")
    checks = found(sight(NOTHING, answers={}, unresolved=NAMED, own=here, named=NAMED))
    for version, address in zip(("IPv4", "IPv6"), here, strict=True):
        assert checks[version].verdict is Verdict.NOTE
        assert "not asked" in checks[version].text
        assert address in checks[version].text
    assert "nobody was asked" in checks["UDP"].text
    assert checks["STUN servers"].verdict is Verdict.BAD, "and so the exit code is 1"
    text = checks["STUN servers"].text
    assert "stun.example:3478, stun.example.org:3478" in text
    assert "0 of 0" not in text
    assert text.count("--stun") == 1


def test_where_no_network_leads_to_the_servers_that_is_bad_too() -> None:
    check = found(sight(NOTHING, answers={}, own=()))["STUN servers"]
    assert check.verdict is Verdict.BAD
    assert "no network of this machine" in check.text


def test_none_to_ask_is_what_the_user_may_have_wished() -> None:
    check = found(sight(NOTHING, answers={}, named=()))["STUN servers"]
    assert check.verdict is Verdict.NOTE
    assert "not asked" in check.text


def test_names_that_are_not_known_are_named() -> None:
    check = found(sight(answers={A: SEEN}, unresolved=(Server("stun.example", 3478),)))
    assert check["STUN servers"].verdict is Verdict.NOTE
    assert "stun.example:3478 (is there a name server?)" in check["STUN servers"].text
    assert "--stun" in check["STUN servers"].text


@pytest.mark.parametrize(
    ("status", "facts", "verdict", "words"),
    [
        (UNMAPPED, EASY, "note", "switch on UPnP"),
        (UNMAPPED, NatFacts(NatKind.NONE, (SEEN,)), "ok", "none is needed"),
        (PortMapStatus(problem=NO_GATEWAY), EASY, "note", "no IPv4 router"),
        (PortMapStatus("192.168.1.1", "UPnP"), EASY, "ok", "UPnP"),
        (
            PortMapStatus("r", "PCP", (PortMapping(Transport.UDP, 1, "11.0.0.1", 4433, 60),)),
            EASY,
            "ok",
            "11.0.0.1:4433",
        ),
    ],
)
def test_what_the_router_forwards(
    status: PortMapStatus, facts: NatFacts, verdict: str, words: str
) -> None:
    check = found(sight(facts, portmap=status))["port mapping"]
    assert check.verdict == verdict
    assert words in check.text
    assert check.text.count("by hand") <= 1


def test_relays_are_told_one_by_one() -> None:
    checks = list(network_checks(sight(relays={RELAY: ["UDP", "TCP"], A: []})))
    texts = {check.text: check.verdict for check in checks if check.name == "relay"}
    assert texts["203.0.113.9:443 is reached over UDP and TCP"] is Verdict.OK
    (dead,) = (text for text in texts if text.startswith("192.0.2.1:3478 does not answer"))
    assert texts[dead] is Verdict.NOTE
    stun = next(check for check in checks if check.name == "STUN servers")
    assert "1 of 1" in stun.text, "a relay that answers is no server that was named"


def test_the_relays_are_those_that_members_name(tmp_path: Path) -> None:
    relay, member = identity("relay").peer, identity("member").peer
    places = (
        Candidate("relay", *RELAY, via=relay),
        Candidate("quic", "192.0.2.7", 4433),
        Candidate("relay", "169.254.169.254", 80, via=relay),
    )
    roster = Roster()
    roster.merge(Member(member, "member", places))
    file = tmp_path / "membership.json"
    file.write_text(json.dumps({"roster": roster.to_state()}))
    assert relays_known(tmp_path) == [RELAY], "and only those that may be dialled"
    for damage in ("", "[]", "{}", '{"roster": {"format": 1, "members": [7]}}'):
        file.write_text(damage)
        assert relays_known(tmp_path) == []


# --- for real, on loopback -----------------------------------------------------------------------


@asynccontextmanager
async def responders() -> AsyncIterator[list[Address]]:
    """Two servers on two hosts."""
    network = HostNetwork()
    opened = [SharedSocket(network.bind(host, 0)) for host in ("127.0.0.1", "127.0.0.2")]
    async with trio.open_nursery() as nursery:
        for socket in opened:
            StunPort(socket)
            nursery.start_soon(socket.run)
        yield [socket.local for socket in opened]
        nursery.cancel_scope.cancel()
    for socket in opened:
        socket.close()


async def test_a_look_asks_real_servers_and_dials_real_relays() -> None:
    listener = HostNetwork().listen("127.0.0.1", 0)
    relay = listener.local
    dead = ("127.0.0.3", relay[1])
    with trio.fail_after(60):
        async with responders() as servers:
            asked = [Server(*one) for one in servers]
            seen = await look(asked, [relay, dead], portmap=False)
    listener.close()
    assert seen.facts[4].kind is NatKind.NONE
    assert seen.facts[4].answered == 2
    assert seen.relays == {relay: ["TCP"], dead: []}
    assert seen.portmap is None


async def test_a_look_sees_the_addresses_that_nobody_was_asked_about() -> None:
    with trio.fail_after(60):
        seen = await look([], [], portmap=False)
    own = HostNetwork().interface_addresses()
    assert set(seen.own) == {one for one in own if one not in ("127.0.0.1", "::1")}


async def test_the_command_says_it_all_and_fails_only_for_what_is_bad(tmp_path: Path) -> None:
    async with responders() as servers:
        named = ",".join(f"{host}:{port}" for host, port in servers)
        command = [sys.executable, "-m", "meshnode.cli.main", "doctor", "--json", "--stun", named]
        done = await trio.run_process(
            [*command, "--no-offline", "--no-portmap", "--home", str(tmp_path)],
            capture_stdout=True,
            check=False,
            env={**os.environ, "MESH_CACHE": str(tmp_path / "cache")},
        )
    checks = {one["name"]: one for one in json.loads(done.stdout)["checks"]}
    assert "no NAT: seen from outside as 127.0.0.1:" in checks["IPv4"]["text"]
    assert {"IPv6", "UDP", "STUN servers", "relay", "firewall", "engine"} <= set(checks)
    bad = any(check["verdict"] == "bad" for check in checks.values())
    assert done.returncode == (1 if bad else 0)


def test_offline_the_doctor_asks_nobody(tmp_path: Path) -> None:
    checks = list(examine_network(tmp_path, (), portmap=True, offline=True))
    assert [check.name for check in checks] == ["network", "firewall"]
    assert "--offline" in checks[0].text


# --- firewalls -----------------------------------------------------------------------------------


def tool(folder: Path, name: str, says: str) -> str:
    """A folder of tools with this one in it."""
    script = folder / name
    script.write_text(f"#!/bin/sh\ncat <<'END'\n{says}\nEND\n")
    script.chmod(0o755)
    return str(folder)


def test_ufw_is_told_how_to_let_peers_in(tmp_path: Path) -> None:
    (tmp_path / "ufw.conf").write_text("# ufw\nENABLED=yes\n")
    check = firewall(4433, "linux", tmp_path / "ufw.conf", "")
    assert check.verdict is Verdict.NOTE
    assert "sudo ufw allow 4433." in check.text
    assert "--listen" in firewall(None, "linux", tmp_path / "ufw.conf", "").text


@pytest.mark.parametrize(
    ("name", "says", "verdict", "words"),
    [
        ("firewall-cmd", "running", "note", "--add-port=4433/udp --add-port=4433/tcp"),
        ("firewall-cmd", "not running", "ok", "neither"),
        ("nft", "chain input { type filter hook input priority 0; policy drop; }", "note", "4433"),
        ("nft", "chain input { type filter hook input priority 0; policy accept; }", "ok", ""),
    ],
)
def test_other_firewalls_are_seen_by_their_own_tools(
    tmp_path: Path, name: str, says: str, verdict: str, words: str
) -> None:
    check = firewall(4433, "linux", tmp_path / "none", tool(tmp_path, name, says))
    assert check.verdict == verdict
    assert words in check.text


def test_a_tool_that_does_not_work_says_nothing(tmp_path: Path) -> None:
    broken = tmp_path / "nft"
    broken.write_text("#!/no/such/shell\n")
    broken.chmod(0o755)
    assert firewall(4433, "linux", tmp_path / "none", str(tmp_path)).verdict is Verdict.OK


def test_other_systems_have_their_own_words() -> None:
    assert "netsh advfirewall" in firewall(4433, "win32").text
    assert "application firewall" in firewall(4433, "darwin").text


def test_a_mac_whose_firewall_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def says(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 0, "Firewall is enabled. (State = 1)", "")

    monkeypatch.setattr(subprocess, "run", says)
    check = firewall(4433, "darwin")
    assert check.verdict is Verdict.NOTE
    assert "--add" in check.text
