"""Members on one switch find each other without a token, whatever else is said there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio

from discovery.announcement import ENTROPY_BYTES, encode_announcement
from meshnode.control import ask_node
from meshnode.demo.nodes import NodeProcess, invite_token, open_node, write_token
from tests.conftest import require
from tests.lab.nodes import identity
from tests.netlab.lan import NETWORK, LanHost, lan
from tunnels import Candidate, Identity

pytestmark = [pytest.mark.engine, pytest.mark.netlab]

ROOT = Path(__file__).parent.parent.parent
FOUND_WITHIN_S = 2.0
MDNS_PORT = 5353
ANNOUNCES = "announces itself"


@pytest.fixture(autouse=True)
def _engine(engine_bin: Path) -> None:
    """A worker needs one to start."""


@pytest.fixture
def hosts() -> Iterator[list[LanHost]]:
    with lan(3) as machines:
        yield machines


def node(
    folder: Path, host: LanHost, name: str, *arguments: str, command: str = "worker"
) -> AbstractAsyncContextManager[NodeProcess]:
    return open_node(
        *(command, "--threads", "1", *arguments),
        name=name,
        home=folder / name,
        log_folder=folder,
        prefix=host.prefix,
    )


def log_of(folder: Path, name: str) -> str:
    return (folder / name / "logs" / "mesh.log").read_text()


async def become_members(folder: Path, alice_host: LanHost, bob_host: LanHost) -> None:
    """bob joins the mesh of alice; then both stop."""
    async with node(folder, alice_host, "alice") as alice:
        token = write_token(folder / "token", invite_token(await alice.wait_event("invite")))
        async with node(folder, bob_host, "bob", "--join-file", str(token)) as bob:
            await bob.wait_event("peer", containing="connected to alice")
            await alice.wait_event("peer", containing="connected to bob")


@asynccontextmanager
async def both(
    folder: Path, alice_host: LanHost, bob_host: LanHost
) -> AsyncIterator[tuple[NodeProcess, NodeProcess]]:
    async with node(folder, alice_host, "alice") as alice, node(folder, bob_host, "bob") as bob:
        yield alice, bob


async def seconds_to_find(one: NodeProcess, other: NodeProcess) -> float:
    """From the moment when both listen to that when both are connected."""
    up = [await each.wait_event("node", containing="listens") for each in (one, other)]
    found = [await each.wait_event("peer", containing="connected") for each in (one, other)]
    return float(max(event["time"] for event in found) - max(event["time"] for event in up))


def discover(host: LanHost, home: Path) -> dict[str, dict[str, Any]]:
    """What `mesh discover --json` lists, by name."""
    command = [*host.prefix, sys.executable, "-m", "meshnode.cli.main", "discover", "--json"]
    done = subprocess.run(
        [*command, "--home", str(home)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return {row["name"]: row for row in json.loads(done.stdout)["nodes"]}


async def test_members_that_both_moved_find_each_other_without_a_token(
    hosts: list[LanHost], tmp_path: Path
) -> None:
    alice_host, bob_host, _ = hosts
    await become_members(tmp_path, alice_host, bob_host)
    alice_host.move_to(f"{NETWORK}.101")
    bob_host.move_to(f"{NETWORK}.102")
    async with both(tmp_path, alice_host, bob_host) as (alice, bob):
        took_s = await seconds_to_find(alice, bob)
        print(f"found after {took_s:.2f} s")  # pytest -s shows it
        assert took_s <= FOUND_WITHIN_S


async def test_a_network_of_ipv6_alone_will_do(hosts: list[LanHost], tmp_path: Path) -> None:
    alice_host, bob_host, _ = hosts
    await become_members(tmp_path, alice_host, bob_host)
    alice_host.move_to("fd00:78::101")
    bob_host.move_to("fd00:78::102")
    async with both(tmp_path, alice_host, bob_host) as (alice, bob):
        assert await seconds_to_find(alice, bob) <= FOUND_WITHIN_S


async def test_serving_without_an_invite_uses_the_members_in_sight(
    hosts: list[LanHost], tmp_path: Path
) -> None:
    alice_host, bob_host, other_host = hosts
    await become_members(tmp_path, alice_host, bob_host)
    # Where she was, a machine refuses at once: what bob knew of her is soon tried out.
    old_address = alice_host.addresses[0]
    alice_host.move_to(f"{NETWORK}.101")
    other_host.add_address(old_address)
    async with node(tmp_path, alice_host, "alice") as alice:
        await alice.wait_event("node", containing=ANNOUNCES)
        serving = node(
            tmp_path, bob_host, "bob", "--http", "127.0.0.1:0", "--ctx", "256", command="serve"
        )
        async with serving as bob:
            await bob.wait_event("ready")
            plans = [event["text"] for event in bob.events if event["event"] == "plan"]
            shares = [text for text in plans if "computes layers" in text]
            assert len(shares) == 2, "one plan, for both: nothing was planned without alice"
            assert "alice" in shares[1]


async def test_who_is_there_is_listed(hosts: list[LanHost], tmp_path: Path) -> None:
    alice_host, bob_host, stranger_host = hosts
    await become_members(tmp_path, alice_host, bob_host)
    async with (
        both(tmp_path, alice_host, bob_host) as (alice, bob),
        node(tmp_path, stranger_host, "stranger") as stranger,
    ):
        for each in (alice, bob, stranger):
            await each.wait_event("node", containing=ANNOUNCES)
        seen = await trio.to_thread.run_sync(discover, alice_host, tmp_path / "alice")
        theirs = await trio.to_thread.run_sync(discover, stranger_host, tmp_path / "nobody")
    assert {name: row["member"] for name, row in seen.items()} == {
        "alice": True,
        "bob": True,
        "stranger": False,
    }
    assert [name for name, row in seen.items() if row["this_node"]] == ["alice"]
    port = bob_port(tmp_path)
    assert seen["bob"]["addresses"] == [f"{kind} {NETWORK}.2:{port}" for kind in ("tcp", "quic")]
    assert seen["bob"]["peer"] == str(Identity.load(tmp_path / "bob" / "node.key").peer)
    assert seen["bob"]["version"]
    assert {name: row["member"] for name, row in theirs.items()} == dict.fromkeys(seen, False)


def bob_port(folder: Path) -> int:
    return int(json.loads((folder / "bob" / "port.json").read_text())["port"])


async def test_cables_and_addresses_that_come_and_go_are_followed(
    hosts: list[LanHost], tmp_path: Path
) -> None:
    alice_host, bob_host, _ = hosts
    await become_members(tmp_path, alice_host, bob_host)
    alice_host.move_to(f"{NETWORK}.101")
    bob_host.unplug()
    async with both(tmp_path, alice_host, bob_host) as (alice, bob):
        for each in (alice, bob):
            await each.wait_event("node", containing="listens")
        plugged_at = time.time()
        bob_host.plug_in(f"{NETWORK}.102")
        found = await bob.wait_event("peer", containing="connected")
        print(f"found {found['time'] - plugged_at:.2f} s after the cable")  # pytest -s shows it
        assert found["time"] - plugged_at <= FOUND_WITHIN_S
        await alice.wait_event("peer", containing=f"{NETWORK}.102")
        for address in (f"{NETWORK}.103", f"{NETWORK}.104"):
            bob_host.unplug()
            bob_host.plug_in(address)
            with trio.fail_after(60):
                await until_reached_at(tmp_path / "alice", address)


async def until_reached_at(home: Path, address: str) -> None:
    """The node's only peer is at `address`: connected anew, or its connection has moved with it,
    which is an event to nobody."""
    while True:
        status = await trio.to_thread.run_sync(ask_node, home, {"op": "status"})
        if any(str(peer["address"]).startswith(address) for peer in status["peers"]):
            return
        await trio.sleep(0.1)


async def test_a_liar_is_refused_bounded_and_told_of_once_and_members_go_on(
    hosts: list[LanHost], tmp_path: Path
) -> None:
    alice_host, bob_host, liar_host = hosts
    await become_members(tmp_path, alice_host, bob_host)
    lies = write_lies(tmp_path, liar_host.addresses[0])
    liar_host.count("input", 4444)
    alice_host.move_to(f"{NETWORK}.101")
    bob_host.move_to(f"{NETWORK}.102")
    seconds = 10.0
    with lying(liar_host, lies, seconds):
        async with both(tmp_path, alice_host, bob_host) as (alice, bob):
            assert await seconds_to_find(alice, bob) <= FOUND_WITHIN_S
            await trio.sleep(seconds)  # the time that the lies take
            assert "lost" not in " ".join(event["text"] for event in alice.events)
    log = log_of(tmp_path, "alice")
    assert log.count("it is not signed by the node that it names") == 1
    assert log.count("it is not in the form") == 1
    assert log.count("it cannot be met") == 1
    assert log.count("too many nodes") == 1
    # Two nodes, each 8 dials at once and one a second; three packets at most in a dial.
    assert liar_host.counted("input")[0] <= 2 * (8 + 3 * seconds) * 3


def write_lies(folder: Path, address: str) -> Path:
    """bob elsewhere, without bob's key; a hundred nodes made up by a former member."""
    mesh = Identity.load(folder / "alice" / "root.key").peer.key
    bob = Identity.load(folder / "bob" / "node.key").peer
    mallory = identity("mallory")
    rest = {
        "version": "0.1.0",
        "places": (Candidate("quic", address, 4444), Candidate("quic", "169.254.169.254", 80)),
        "meshes": (mesh,),
        "entropy": bytes(ENTROPY_BYTES),
        "seq": 2**52,
    }
    lies = [encode_announcement(mallory.sign, peer=bob, name="bob", **rest)]  # type: ignore[arg-type]
    for number in range(100):
        ghost = identity(f"ghost {number}")
        lies.append(encode_announcement(ghost.sign, peer=ghost.peer, name="ghost", **rest))  # type: ignore[arg-type]
    path = folder / "lies"
    path.write_text("\n".join(lie.hex() for lie in lies))
    return path


@contextmanager
def lying(host: LanHost, lies: Path, seconds: float) -> Iterator[None]:
    script = str(Path(__file__).with_name("spoof.py"))
    pause_s = 0.02
    rounds = str(int(3 * seconds / (100 * pause_s)))
    command = [*host.prefix, sys.executable, script, str(lies), host.addresses[0], rounds]
    with subprocess.Popen([*command, str(pause_s)]) as liar:
        try:
            yield
            assert liar.poll() is None, "lied until the end"
        finally:
            liar.kill()


async def test_a_flood_of_questions_costs_little_and_parts_nobody(
    hosts: list[LanHost], tmp_path: Path
) -> None:
    alice_host, bob_host, liar_host = hosts
    await become_members(tmp_path, alice_host, bob_host)
    seconds = 10
    flood = [*liar_host.prefix, sys.executable, "-m", "tests.netlab.flood", liar_host.addresses[0]]
    async with both(tmp_path, alice_host, bob_host) as (alice, bob):
        await seconds_to_find(alice, bob)
        alice_host.count("output", MDNS_PORT)
        before_s = processor_s(alice.pid)
        done = await trio.run_process([*flood, str(seconds)], capture_stdout=True, cwd=ROOT)
        spent_s = processor_s(alice.pid) - before_s
        packets, _ = alice_host.counted("output")
        print(f"{int(done.stdout) / seconds:.0f}/s: {spent_s / seconds:.1%}, {packets} answers")
        assert int(done.stdout) / seconds > 2000
        assert spent_s / seconds <= 0.15, "of one core; without a brake a quarter and more"
        assert packets <= 6 * seconds, "on IPv4 and IPv6, a few a second whatever is asked"
        assert "lost" not in " ".join(event["text"] for event in alice.events)


def processor_s(pid: int) -> float:
    spent = psutil.Process(pid).cpu_times()
    return spent.user + spent.system


async def test_beside_avahi_both_are_heard(hosts: list[LanHost], tmp_path: Path) -> None:
    alice_host, bob_host, _ = hosts
    await become_members(tmp_path, alice_host, bob_host)
    alice_host.move_to(f"{NETWORK}.101")
    bob_host.move_to(f"{NETWORK}.102")
    alice = Identity.load(tmp_path / "alice" / "node.key").peer
    with avahi(alice_host, tmp_path / "a"), avahi(bob_host, tmp_path / "b"):
        async with both(tmp_path, alice_host, bob_host) as nodes:
            assert await seconds_to_find(*nodes) <= FOUND_WITHIN_S
            await nodes[0].wait_event("node", containing=ANNOUNCES)
            for where, folder in ((alice_host, tmp_path / "a"), (bob_host, tmp_path / "b")):
                answer = await trio.to_thread.run_sync(resolve, where, folder, f"{alice}.local")
                assert answer.endswith(f"{NETWORK}.101"), "avahi hears the node, here and there"


@contextmanager
def avahi(host: LanHost, folder: Path) -> Iterator[None]:
    """A real avahi-daemon on this host, with a socket of its own below `folder`."""
    daemon = shutil.which("avahi-daemon") or "/usr/sbin/avahi-daemon"
    require("avahi", Path(daemon).exists(), "needs avahi-daemon (./just setup)")
    (folder / "run").mkdir(parents=True)
    (folder / "services").mkdir()
    config = folder / "avahi.conf"
    config.write_text(
        f"[server]\nhost-name={folder.name}-avahi\nuse-ipv6=no\nenable-dbus=no\n[wide-area]\n"
        "enable-wide-area=no\n"
    )
    options = "--no-drop-root --no-chroot --no-proc-title --no-rlimits"
    script = (
        f"mount --bind {folder}/services /etc/avahi/services && mkdir -p /run/avahi-daemon && "
        f"mount --bind {folder}/run /run/avahi-daemon && exec {daemon} -f {config} {options}"
    )
    command = [*host.prefix, "unshare", "-m", "sh", "-c", script]
    with (
        open(folder / "log", "w") as log,
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as process,
    ):
        try:
            wait_for_socket(folder / "run" / "socket", process, folder / "log")
            yield
        finally:
            process.terminate()


def wait_for_socket(path: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(200):
        if path.exists():
            return
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    raise AssertionError(log.read_text())


def resolve(host: LanHost, folder: Path, name: str) -> str:
    """avahi's answer to a question on its socket."""
    script = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.settimeout(20); "
        "s.connect(sys.argv[1]); s.sendall(f'RESOLVE-HOSTNAME-IPV4 {sys.argv[2]}\\n'.encode()); "
        "print(s.makefile().readline())"
    )
    command = [*host.prefix, sys.executable, "-c", script, str(folder / "run" / "socket"), name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


async def test_nodes_that_have_found_each_other_say_next_to_nothing(
    hosts: list[LanHost], tmp_path: Path
) -> None:
    alice_host, bob_host, _ = hosts
    await become_members(tmp_path, alice_host, bob_host)
    alice_host.count("output", MDNS_PORT)
    async with both(tmp_path, alice_host, bob_host) as (alice, bob):
        await seconds_to_find(alice, bob)
        await trio.sleep(10)
        packets, size_bytes = alice_host.counted("output")
        print(f"the first ten seconds: {packets} packets, {size_bytes} bytes")
        assert packets <= 40
        await trio.sleep(20)
        more, more_bytes = alice_host.counted("output")
        print(f"the next twenty: {more - packets} packets, {more_bytes - size_bytes} bytes")
        assert more - packets <= 8


async def test_a_node_told_to_be_silent_is(hosts: list[LanHost], tmp_path: Path) -> None:
    host = hosts[0]
    host.count("output", MDNS_PORT)
    async with node(tmp_path, host, "alice", "--no-mdns") as alice:
        await alice.wait_event("invite")
        await trio.sleep(2)
        assert host.counted("output") == (0, 0)
