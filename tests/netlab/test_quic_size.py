"""Datagrams between real kernels: never in pieces, as large as the narrowest wire carries."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.conftest import require
from tests.netlab.netns import Namespace, cable, can_be_made, delete, make
from tunnels.pmtu import LARGEST_V4_BYTES, NARROW_BYTES

pytestmark = pytest.mark.netlab

ROOT = Path(__file__).parent.parent.parent
NEAR, FAR = "10.83.1.2", "10.83.2.2"
HEADERS = 28  # of IPv4 and UDP
PATIENCE_S = 60.0


class Wire:
    """Two machines with a router between them that says nothing about what it drops."""

    def __init__(self, near: Namespace, router: Namespace, far: Namespace) -> None:
        self.near = near
        self.router = router
        self.far = far

    def narrow(self, mtu: int) -> None:
        """Larger packets vanish (nft): no ICMP, which is what makes it a black hole."""
        self.router.nft(
            "flush ruleset\ntable ip narrow {\n chain forward {\n"
            "  type filter hook forward priority filter\n"
            f"  meta length > {mtu} drop\n  ip frag-off & 0x3fff != 0 counter drop\n }}\n}}\n"
        )

    def pieces(self) -> int:
        """Fragments seen by the router."""
        rules = self.router.run("nft", "list", "ruleset")
        return int(rules.split("counter packets ")[1].split()[0])


@pytest.fixture
def wire() -> Iterator[Wire]:
    require("namespaces", can_be_made(), "needs root, iproute2, nftables, conntrack (./just setup)")
    spaces = make(f"mtu{os.getpid()}{side}" for side in ("near", "router", "far"))
    try:
        near, router, far = spaces
        cable(near, "e0", router, "near")
        cable(far, "e0", router, "far")
        router.sysctl(ipv4__ip_forward=1)
        router.ip("addr add 10.83.1.1/24 dev near", "addr add 10.83.2.1/24 dev far")
        near.ip(f"addr add {NEAR}/24 dev e0", "route add default via 10.83.1.1")
        far.ip(f"addr add {FAR}/24 dev e0", "route add default via 10.83.2.1")
        yield Wire(near, router, far)
    finally:
        delete(spaces)


class Asker:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, count: int) -> tuple[int, float]:
        """An echo of so many bytes: the datagrams' size after it, and how long it took in s."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(count, file=self._process.stdin, flush=True)
        size, took_s = self._process.stdout.readline().split()
        return int(size), float(took_s)

    def await_size(self, at_least: int, at_most: int) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not at_least <= (size := self.ask(1000)[0]) <= at_most:
            assert time.monotonic() < deadline_s, size
            time.sleep(0.2)


@contextmanager
def two_nodes(wire: Wire) -> Iterator[Asker]:
    with ExitStack() as stack:
        far = stack.enter_context(_process(wire.far, FAR))
        assert far.stdout is not None
        key, port = far.stdout.readline().split()
        yield Asker(stack.enter_context(_process(wire.near, NEAR, key, FAR, port)))


@contextmanager
def _process(where: Namespace, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [*where.prefix, sys.executable, "-m", "tests.netlab.sized", *arguments]
    child = subprocess.Popen(
        command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        yield child
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize("mtu", [1500, 1420, 1280])
def test_datagrams_become_as_large_as_the_wire_and_none_is_cut(wire: Wire, mtu: int) -> None:
    wire.narrow(mtu)
    with two_nodes(wire) as asker:
        asker.await_size(mtu - HEADERS - NARROW_BYTES, mtu - HEADERS)
        asker.ask(200_000)
    assert wire.pieces() == 0


def test_a_narrow_wire_of_our_own_cuts_nothing_either(wire: Wire) -> None:
    """Unasked, the kernel would send in pieces what its own interface does not carry."""
    wire.narrow(1500)
    wire.near.ip("link set e0 mtu 1400")
    with two_nodes(wire) as asker:
        asker.await_size(1400 - HEADERS - NARROW_BYTES, 1400 - HEADERS)
        asker.ask(200_000)
    assert wire.pieces() == 0


def test_a_path_that_turns_into_a_black_hole_is_got_out_of(wire: Wire) -> None:
    wire.narrow(1500)
    with two_nodes(wire) as asker:
        asker.await_size(LARGEST_V4_BYTES, LARGEST_V4_BYTES)
        wire.narrow(1300)
        _, took_s = asker.ask(500_000)
        assert took_s < PATIENCE_S  # the link is given up after 10 s of silence: it was not
        asker.await_size(1300 - HEADERS - NARROW_BYTES, 1300 - HEADERS)
    assert wire.pieces() == 0
