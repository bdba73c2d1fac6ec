"""Multicast DNS, by zeroconf: one announcement out, other nodes' announcements in.

zeroconf runs its own thread. What it hears crosses over here, in bounded numbers (`HEARD`). While
that thread has used more of a core than `SHARE` gives, it sleeps and the kernel drops what comes: a
flood, of answers or of questions, costs little. Its own memory zeroconf bounds itself.

Queries are ours and not those of its browser, which remembers every name that it was ever told.
They are asked for multicast answers: an answer by unicast would reach any one of the processes
that share port 5353 (avahi, another node), not the one that asked.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import trio
from zeroconf import (  # type: ignore[attr-defined] # not typed so
    DNSOutgoing,
    DNSQuestion,
    DNSText,
    IPVersion,
    RecordUpdate,
    RecordUpdateListener,
    ServiceInfo,
    Zeroconf,
)
from zeroconf import Error as ZeroconfError

from tunnels.allowance import Bucket, Rate
from tunnels.binding import plain_host
from tunnels.interfaces import multicast_addresses
from tunnels.network import HostNetwork
from tunnels.peer import Candidate, PeerId

log = logging.getLogger(__name__)

SERVICE = "_mesh-llm._udp.local."
FIRST_QUERY_WITHIN_S = 0.1  # RFC 6762 section 5.2: not all at the same moment
FIRST_QUERY_INTERVAL_S = 1.0
LAST_QUERY_INTERVAL_S = 3600.0
HEARD = Rate(per_s=100, burst=200)  # announcements
SHARE = Rate(per_s=0.05, burst=0.2)  # processor seconds
SHARE_CHECKED_EVERY_S = 0.25
LONGEST_SLEEP_S = 2.0
MAX_UNREAD_RECORDS = 256
MAX_INTERFACES = 8
GOODBYE_S = 1.0

_TYPE_PTR, _CLASS_IN, _QUERY, _PORT = 12, 1, 0, 5353
_Value = TypeVar("_Value")


class MdnsFailed(Exception):
    """Multicast DNS cannot be had on this machine now; the text says why."""


class _Ear(RecordUpdateListener):
    """I run in zeroconf's thread and pass on the text records of our service."""

    def __init__(self, take: Callable[[list[bytes]], None]) -> None:
        self._take = take
        self._allowed = Bucket(HEARD, time.monotonic())

    def async_update_records(self, _zc: Zeroconf, _now: float, records: list[RecordUpdate]) -> None:
        found = [
            bytes(update.new.text)
            for update in records
            if isinstance(update.new, DNSText) and update.new.name.lower().endswith(SERVICE)
        ]
        if found and self._allowed.take(time.monotonic(), len(found)):
            self._take(found)

    def async_update_records_complete(self) -> None:
        """Nothing is kept between packets."""


class _OnLink(Zeroconf):
    """I answer nobody who is not on one of this machine's networks (RFC 6762 section 11)."""

    _network = HostNetwork()

    def async_send(
        self,
        out: DNSOutgoing,
        addr: str | None = None,
        port: int = _PORT,
        v6_flow_scope: Any = (),
        transport: Any = None,
    ) -> None:
        """addr: of whom the packet is for alone, as the socket gave it; None: for the group."""
        if addr is None or self._network.is_near(plain_host(addr)):
            super().async_send(out, addr, port, v6_flow_scope, transport)


class _Brake:
    """I run in zeroconf's thread and stop it for a while when it has used too much of a core."""

    def __init__(self, zeroconf: Zeroconf) -> None:
        loop = zeroconf.loop
        assert loop is not None
        self._loop = loop
        self._share = Bucket(SHARE, time.monotonic())
        self._spent_s = 0.0
        loop.call_soon_threadsafe(self._check)

    def _check(self) -> None:
        before_s, self._spent_s = self._spent_s, time.thread_time()
        self._share.spend(time.monotonic(), self._spent_s - before_s)
        time.sleep(min(self._share.wait_s(time.monotonic()), LONGEST_SLEEP_S))
        self._loop.call_later(SHARE_CHECKED_EVERY_S, self._check)


class Mdns:
    """I announce one node, and hear others."""

    def __init__(self, zeroconf: Zeroconf, bound: Mapping[str, int], only_host: str | None) -> None:
        self._zeroconf = zeroconf
        self._bound = dict(bound)
        self._only_host = only_host
        self._info: ServiceInfo | None = None
        self._unread: deque[bytes] = deque(maxlen=MAX_UNREAD_RECORDS)
        self._lock = threading.Lock()
        self._news = trio.Event()
        self._ask_now = trio.Event()
        self._trio = trio.lowlevel.current_trio_token()
        zeroconf.add_listener(_Ear(self._take), None)
        _Brake(zeroconf)

    async def announce(self, peer: PeerId, record: bytes, places: Sequence[Candidate]) -> None:
        """From now on `record` is what this node says; before, with it, and when asked.

        places: for other programs' eyes; our own kind reads them in the record.
        """
        info = ServiceInfo(
            SERVICE,
            f"{peer}.{SERVICE}",
            port=places[0].port if places else 0,
            properties=record,
            server=f"{peer}.local.",
            parsed_addresses=list(dict.fromkeys(place.host for place in places)),
        )
        before, self._info = self._info, info
        if before is None:
            # The name is the key: nobody else can have a right to it, so nobody is asked.
            await _in_thread(
                lambda: self._zeroconf.register_service(info, cooperating_responders=True)
            )
        else:
            await _in_thread(lambda: self._zeroconf.update_service(info))

    async def heard(self) -> list[bytes]:
        """The text records that came since the last call; waits for one."""
        while True:
            news = self._news
            with self._lock:
                records = list(self._unread)
                self._unread.clear()
            if records:
                return records
            await news.wait()

    async def ask(self) -> None:
        """Asks who is there, for ever: at once, and ever less often unless `ask_now` is called."""
        await trio.sleep(random.uniform(0, FIRST_QUERY_WITHIN_S))  # noqa: S311 - no secret
        interval_s = FIRST_QUERY_INTERVAL_S
        while True:
            query = DNSOutgoing(_QUERY)
            query.add_question(DNSQuestion(SERVICE, _TYPE_PTR, _CLASS_IN))
            self._zeroconf.send(query)
            await trio.sleep(FIRST_QUERY_INTERVAL_S)
            with trio.move_on_after(interval_s - FIRST_QUERY_INTERVAL_S):
                await self._ask_now.wait()
                interval_s = FIRST_QUERY_INTERVAL_S
            self._ask_now = trio.Event()
            interval_s = min(2 * interval_s, LAST_QUERY_INTERVAL_S)

    def ask_now(self) -> None:
        """Who is there may be others than before: the network has changed, or what we look for."""
        self._ask_now.set()

    async def rescan(self) -> None:
        """Uses the interfaces that there are now, announces on those that are new, and asks. Raises
        `MdnsFailed`, also where one goes meanwhile: call again then."""
        present = _chosen(self._only_host)
        kept = dict(self._bound.items() & present.items())
        if kept != self._bound:
            # An interface that was made anew under the same address must be let go of first.
            await _in_thread(lambda: self._zeroconf.update_interfaces(list(kept)))
            self._bound = kept
        if kept != present:
            await _in_thread(lambda: self._zeroconf.update_interfaces(list(present)))
        self._bound = present
        self.ask_now()

    def _take(self, records: list[bytes]) -> None:
        """In zeroconf's thread."""
        with self._lock:
            self._unread.extend(records)
        with contextlib.suppress(trio.RunFinishedError):
            self._trio.run_sync_soon(self._wake, idempotent=True)

    def _wake(self) -> None:
        self._news.set()
        self._news = trio.Event()


@asynccontextmanager
async def open_mdns(only_host: str | None = None) -> AsyncIterator[Mdns]:
    """Multicast DNS on all interfaces, or on that of one address. Raises `MdnsFailed`."""
    bound = _chosen(only_host)
    zeroconf = await _in_thread(lambda: _open(list(bound)))
    try:
        yield Mdns(zeroconf, bound, only_host)
    finally:
        with trio.move_on_after(GOODBYE_S, shield=True):
            with contextlib.suppress(MdnsFailed):
                await _in_thread(zeroconf.close)


def _chosen(only_host: str | None) -> dict[str, int]:
    return dict(list(multicast_addresses(only_host).items())[:MAX_INTERFACES])


def _open(addresses: list[str]) -> Zeroconf:
    try:
        return _OnLink(addresses, ip_version=IPVersion.All)
    except OSError:  # a kernel without IPv6
        return _OnLink([one for one in addresses if ":" not in one], ip_version=IPVersion.V4Only)


async def _in_thread(call: Callable[[], _Value]) -> _Value:
    """zeroconf's calls wait for its thread. Raises `MdnsFailed`."""
    try:
        return await trio.to_thread.run_sync(call, abandon_on_cancel=True)
    except (OSError, ZeroconfError, RuntimeError) as error:
        raise MdnsFailed(f"multicast DNS cannot be used here: {error}") from error
