"""`mesh doctor` in networks of each kind, with real STUN servers: it says what is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import require
from tests.netlab.servers import can_run, coturn, miniupnpd
from tests.netlab.topology import STUN, STUN6, STUN_PORT, Internet, Site, internet

pytestmark = pytest.mark.netlab

NONE_HERE = "none here"


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Internet]:
    require("coturn", can_run("turnserver"), "needs coturn (./just setup)")
    with internet() as made:
        folder = tmp_path_factory.mktemp("coturn")
        server = coturn(made.servers, [*STUN, *STUN6], STUN_PORT, folder)
        try:
            yield made
        finally:
            server.close()


def doctor(site: Site, home: Path, *options: str) -> dict[str, Any]:
    """Its checks by name, as the host of the site sees them."""
    servers = [*(f"{host}:{STUN_PORT}" for host in STUN)]
    servers += [f"[{host}]:{STUN_PORT}" for host in STUN6]
    command = [*site.host.prefix, sys.executable, "-m", "meshnode.cli.main", "doctor", "--json"]
    command += ["--no-offline", "--home", str(home), "--stun", ",".join(servers), *options]
    environment = {**os.environ, "MESH_CACHE": str(home / "cache")}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=180, env=environment, check=False
    )
    assert done.stdout, done.stderr
    return {one["name"]: one for one in json.loads(done.stdout)["checks"]}


@pytest.mark.parametrize(
    ("kind", "v4", "v6", "udp"),
    [
        ("open", "no NAT", "no NAT", "ok"),
        ("stealth", "no NAT", "no NAT", "ok"),
        ("full", "same address", NONE_HERE, "ok"),
        ("port", "same address", NONE_HERE, "ok"),
        ("home", "same address", NONE_HERE, "ok"),
        ("cgnat", "same address", NONE_HERE, "ok"),
        ("sym", "hard, or symmetric", NONE_HERE, "ok"),
        ("blocked", "nothing comes back", NONE_HERE, "note"),
        ("ipv6", "in no IPv4 network", "no NAT", "ok"),
        ("broken4", "nothing comes back", "no NAT", "ok"),
    ],
)
def test_the_network_is_known_for_what_it_is(
    net: Internet, tmp_path: Path, kind: str, v4: str, v6: str, udp: str
) -> None:
    site = net.site(kind)
    checks = doctor(site, tmp_path, "--no-portmap")
    assert v4 in checks["IPv4"]["text"]
    assert v6 in checks["IPv6"]["text"]
    assert checks["UDP"]["verdict"] == udp
    if v4 == "same address":
        assert f" {site.wan}:" in checks["IPv4"]["text"]


def test_a_router_that_maps_ports_is_seen(net: Internet, tmp_path: Path) -> None:
    require("miniupnpd", can_run("miniupnpd"), "needs miniupnpd (./just setup)")
    site = net.site("upnp")
    asked = doctor(site, tmp_path)["port mapping"]
    assert asked["verdict"] == "note"
    assert "switch on UPnP" in asked["text"]
    router = miniupnpd(site.routers[0], tmp_path)
    try:
        mapped = doctor(site, tmp_path)["port mapping"]
    finally:
        router.close()
    assert mapped["verdict"] == "ok"
    assert "PCP, NAT-PMP, UPnP" in mapped["text"]
