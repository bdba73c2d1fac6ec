"""Who may talk to the gateway: rules that keep web pages of other origins out.

A page in the user's browser can send requests to 127.0.0.1. Three things stop it:

- It cannot choose the Host header. A name that it rebound to 127.0.0.1 (DNS rebinding) shows
  there, and only loopback names and what the operator bound are accepted.
- It cannot hide its Origin in anything but a plain GET, and only our own is accepted; what a GET
  answers, it cannot read, because no CORS header is ever sent.
- It cannot send `application/json` without asking first (a CORS preflight), which is refused.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

_HOST = re.compile(r"(?:\[(?P<v6>[0-9a-f:.]+)\]|(?P<name>[a-z0-9._-]+))(?::\d{1,5})?")
WILDCARDS = frozenset({"", "*", "0.0.0.0", "::"})  # noqa: S104 (names of it, nothing is bound)


@dataclass(frozen=True)
class HostRule:
    """The names by which the gateway may be called.

    `bound` is the host that the operator bound, None when it is every interface: then any IP
    address will do, since a rebound name is never one.
    """

    bound: str | None

    @classmethod
    def for_bound(cls, host: str) -> HostRule:
        name = host.lower()
        return cls(None if name in WILDCARDS else name)

    def allows(self, host_header: str) -> bool:
        """Whether a Host header (any port) is one of these names."""
        found = _HOST.fullmatch(host_header.lower())
        if not found:
            return False
        name = found["v6"] or found["name"]
        if name in ("localhost", self.bound):
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or self.bound is None


def is_own_origin(origin: str, host_header: str) -> bool:
    """Whether an Origin header names the very host and port that the request was sent to."""
    return origin.lower() == f"http://{host_header.lower()}"


def is_json(content_type: str) -> bool:
    """Whether a Content-Type header says `application/json`, with or without parameters."""
    return content_type.partition(";")[0].strip().lower() == "application/json"
