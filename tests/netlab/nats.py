"""What the kinds of routers and firewalls do to packets, in the kernel's own words (nft 1.0.6).

A router has interfaces `wan` and `lan`; one with a guest network has `guest` besides. Every router
drops what comes to itself unasked: without that, a probe that is early takes the place of the
mapping it was meant for, and the port shifts.
"""

from __future__ import annotations

# The same hash wherever it stands in a ruleset: the port outside belongs to the port inside.
_OUTSIDE_PORT = "jhash udp sport mod 16384 seed 0x6d657368 offset 32768"
_MAPPING_S = 300

_INPUT = """
 chain input {
  type filter hook input priority filter
  iifname "wan" ct state new meta l4proto { tcp, udp } drop
 }
"""


STEALTH = """
table inet filter {
 chain input {
  type filter hook input priority filter; policy drop
  iifname "lo" accept
  ct state established,related accept
  icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-advert } accept
 }
}
"""
IPV6_FIREWALL = """
table inet filter {
 chain forward {
  type filter hook forward priority filter; policy drop
  ct state established,related accept
  oifname "wan" accept
 }
}
"""


def home(source: str = 'oifname "wan" masquerade', outbound: str = 'oifname "wan" accept') -> str:
    """source: how the source address is rewritten. outbound: what may leave."""
    return f"""
table ip nat {{
 chain post {{
  type nat hook postrouting priority srcnat
  {source}
 }}
}}
table ip filter {{
 chain forward {{
  type filter hook forward priority filter; policy drop
  ct state established,related accept
  ct status dnat accept
  iifname "wan" drop
  {outbound}
 }}
{_INPUT}
}}
"""


WEB_ONLY = home(outbound='oifname "wan" tcp dport 443 accept')


def leads_nowhere(interface: str) -> str:
    """For the middle: no IPv4 from or to there."""
    return f"""
table ip nowhere {{
 chain forward {{
  type filter hook forward priority filter
  iifname "{interface}" drop
  oifname "{interface}" drop
 }}
}}
"""


def symmetric() -> str:
    return home('oifname "wan" masquerade random,fully-random')


def port_restricted(wan: str) -> str:
    """Which, unlike Linux, does not keep the port that the host chose."""
    udp = f'oifname "wan" meta l4proto udp snat to {wan}:{_OUTSIDE_PORT}'
    return home(f'{udp}\n  oifname "wan" snat to {wan}')


def cone(wan: str, *, restricted: bool = False, hairpin: bool = False) -> str:
    """One mapping of a UDP port for all. restricted: to hosts that were sent to. hairpin: also for
    those behind the router."""
    asked = "udp dport . ip saddr @asked " if restricted else ""
    note = "update @asked { udp sport . ip daddr }" if restricted else "counter"
    came = f"ip daddr {wan}" if hairpin else 'iifname "wan"'
    turned = f'oifname != "wan" ip saddr 192.168.0.0/16 ct status dnat snat to {wan}'
    mapping = f"udp sport timeout {_MAPPING_S}s : ip saddr . udp sport"
    turned = turned if hairpin else ""
    return f"""
table ip nat {{
 map inside {{
  type inet_service : ipv4_addr . inet_service
  flags dynamic,timeout
  timeout {_MAPPING_S}s
 }}
 set asked {{
  type inet_service . ipv4_addr
  flags dynamic,timeout
  timeout {_MAPPING_S}s
 }}
 chain pre {{
  type nat hook prerouting priority dstnat
  {came} {asked}dnat to udp dport map @inside
 }}
 chain post {{
  type nat hook postrouting priority srcnat
  {turned}
  oifname "wan" meta l4proto udp update @inside {{ {mapping} }}
  oifname "wan" snat to {wan}
 }}
 chain note {{
  type filter hook forward priority mangle
  oifname "wan" meta l4proto udp {note}
 }}
}}
table ip filter {{
 chain forward {{
  type filter hook forward priority filter; policy drop
  ct state established,related accept
  ct status dnat accept
  iifname "wan" drop
  oifname "wan" accept
 }}
{_INPUT}
}}
"""
