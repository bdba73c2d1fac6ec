"""Where the router is, as each system says it."""

from __future__ import annotations

import pytest

from discovery.gateway import find_gateway, parse_proc_route, parse_routes

PROC = """\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
wlan0\t00000000\t0107A8C0\t0003\t0\t0\t600\t00000000\t0\t0\t0
eth0\t00000000\tFE01A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0
tun0\t00000000\t00000000\t0001\t0\t0\t50\t00000000\t0\t0\t0
eth0\t0001A8C0\t00000000\t0001\t0\t0\t100\t00FFFFFF\t0\t0\t0
short
"""
MAC = """\
   route to: default
destination: default
       mask: default
    gateway: 192.168.1.254
  interface: en0
"""
NETSTAT = """\
Internet:
Destination        Gateway            Flags        Netif Expire
default            link#12            UCSg         utun3
default            192.168.1.254      UGScg        en0
"""
WINDOWS = """\
Network Destination        Netmask          Gateway       Interface  Metric
          0.0.0.0          0.0.0.0    192.168.1.254    192.168.1.7     25
        127.0.0.0        255.0.0.0         On-link         127.0.0.1    331
"""


def test_the_default_route_with_the_lowest_metric_counts() -> None:
    assert parse_proc_route(PROC) == "192.168.1.254"
    assert parse_proc_route(PROC.splitlines()[0]) is None


@pytest.mark.parametrize("text", [MAC, NETSTAT, WINDOWS])
def test_other_systems_are_asked_in_their_own_words(text: str) -> None:
    assert parse_routes(text) == "192.168.1.254"


def test_no_route_is_none() -> None:
    assert parse_routes("route: writing to routing socket: not in table") is None


async def test_this_machine_has_a_router_or_none() -> None:
    found = await find_gateway()
    assert found is None or found.address != found.ours
