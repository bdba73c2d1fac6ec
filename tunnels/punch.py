"""Hole punching on the node's own socket: the driver of probe.py.

Both sides of a `Meeting` call `punch` with what they know, at about the same moment:

    puncher = Puncher(doors.datagrams, lambda: network.bind(host, 0), refusal)
    address = await puncher.punch(meeting)         # raises PunchFailed
    if meeting.role is Role.DIALLER:
        await quic.dial(Candidate("quic", *address, "reflexive"), expect=peer)

What was opened stays open as long as NATs remember it: the dialler dials at once. Where many
sockets were needed to get through, the one that did is adopted by the node's socket: whatever is
sent to that address from then on leaves through it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import math
import secrets
from collections import OrderedDict
from collections.abc import Callable

import trio

from tunnels.allowance import Bucket, Buckets, Rate
from tunnels.binding import Address
from tunnels.demux import PROBE_BYTE, SharedSocket
from tunnels.dial import is_private
from tunnels.errors import BadFrame, ListenFailed, PunchFailed
from tunnels.meeting import Meeting
from tunnels.peer import NatKind
from tunnels.probe import Failed, Found, Plan, Probe, Send
from tunnels.probe_states import State
from tunnels.probe_wire import Way, label_of_untrusted
from tunnels.salvo import FAN_SOCKETS, Salvo, fan, hold, spray
from tunnels.udp import DatagramSocket

LINGER_S = 10.0  # for which a search that found is still answered
MAX_SEARCHES = 128  # under way and lingering
SALVOS_TO_HOST = Rate(per_s=1 / 60, burst=1)
SALVOS = Rate(per_s=1 / 15, burst=4)

_FIRST = bytes((PROBE_BYTE,))

log = logging.getLogger(__name__)


class Puncher:
    """I search for direct paths, to several peers at once.

    bind: one more socket, on any port; raises ListenFailed. refusal: why the address policy
    forbids a host, None where it does not.
    """

    def __init__(
        self,
        shared: SharedSocket,
        bind: Callable[[], DatagramSocket],
        refusal: Callable[[str], str | None],
        entropy: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        self._shared = shared
        self._bind = bind
        self._refusal = refusal
        self._entropy = entropy
        self._searches: OrderedDict[bytes, _Search] = OrderedDict()
        self._salvos_to_host = Buckets(SALVOS_TO_HOST)
        self._salvos = Bucket(SALVOS, trio.current_time())
        shared.on_probe = self._on_probe

    async def punch(self, meeting: Meeting) -> Address:
        """Where the other side's datagrams come from, and ours get to it. Raises PunchFailed."""
        now = trio.current_time()
        starts_s = now + meeting.begins_in_s
        salvo = self._salvo(meeting)
        plan = Plan(
            *(meeting.role, starts_s, meeting.addresses, salvo),
            may_fire=lambda: salvo is not None and self._may_fire(salvo),
            patience_s=meeting.patience_s,
        )
        probe = Probe(meeting.key, plan, self._allows, self._entropy)
        search = _Search(probe, self._shared, self._bind_one_more)
        self._make_room(now)
        label = probe.label
        self._searches[label] = search
        try:
            found = await search.run()
            self._shared.answered.add(found)
            return found
        except PunchFailed as error:
            raise PunchFailed(f"no direct path: {error}{_why(meeting)}") from None
        finally:
            search.lingers_until_s = trio.current_time() + LINGER_S
            if probe.state is not State.FOUND and self._searches.get(label) is search:
                del self._searches[label]

    def _on_probe(self, datagram: bytes, sender: Address) -> None:
        with contextlib.suppress(BadFrame):
            search = self._searches.get(label_of_untrusted(datagram))
            if search is not None:
                search.receive_untrusted(datagram, Way(sender))

    def _allows(self, host: str) -> bool:
        return self._refusal(host) is None

    def _make_room(self, now: float) -> None:
        """Those that linger go when their time is over, or when the room is needed."""
        for label, search in list(self._searches.items()):
            if search.lingers_until_s < now or (
                search.probe.is_over and len(self._searches) >= MAX_SEARCHES
            ):
                del self._searches[label]
        if len(self._searches) >= MAX_SEARCHES:
            raise PunchFailed("too many searches for direct paths are under way; try again later")

    def _salvo(self, meeting: Meeting) -> Salvo | None:
        """Of many probes, where one side's NAT is hard and the other's is not."""
        aim = next((one for one in meeting.addresses if _is_outside(one[0])), None)
        kinds = (meeting.mine.v4, meeting.theirs.v4)
        if aim is None or kinds.count(NatKind.HARD) != 1 or NatKind.BLOCKED in kinds:
            return None
        first = int.from_bytes(self._entropy(4), "big")
        if kinds[0] is NatKind.HARD:
            return fan(aim)
        return (hold if meeting.patience_s else spray)(aim[0], first)

    def _bind_one_more(self) -> DatagramSocket:
        """For a salvo. Raises ListenFailed."""
        if sum(len(search.sockets) for search in self._searches.values()) >= _most_sockets():
            raise ListenFailed("more sockets for salvos would leave too few for links")
        return self._bind()

    def _may_fire(self, salvo: Salvo) -> bool:
        now = trio.current_time()
        may = self._salvos_to_host.take(salvo.host, now) and self._salvos.take(now)
        if not may:
            log.debug("no salvo to %s now: the last one was a short while ago", salvo.host)
        return may


class _Search:
    """One meeting's probe, its timer, and the sockets of its salvo."""

    def __init__(
        self, probe: Probe, shared: SharedSocket, bind: Callable[[], DatagramSocket]
    ) -> None:
        self.probe = probe
        self.lingers_until_s = math.inf
        self._shared = shared
        self._bind = bind
        self.sockets: dict[int, DatagramSocket] = {}
        self._may_bind = True
        self._nursery: trio.Nursery | None = None
        self._wake = trio.Event()
        self._outcome: Found | Failed | None = None

    async def run(self) -> Address:
        try:
            async with trio.open_nursery() as self._nursery:
                outcome = await self._drive()
                self._nursery.cancel_scope.cancel()
            if isinstance(outcome, Failed):
                raise PunchFailed(outcome.reason)
            if outcome.way.via:
                self._shared.adopt(self.sockets.pop(outcome.way.via), outcome.way.to)
            return outcome.way.to
        finally:
            for socket in self.sockets.values():
                socket.close()
            self.sockets.clear()
            self._may_bind = False

    async def _drive(self) -> Found | Failed:
        while self._outcome is None:
            with trio.move_on_at(self.probe.next_deadline()) as timer:
                await self._wake.wait()
            self._wake = trio.Event()
            if timer.cancelled_caught:
                self.probe.handle_timer(trio.current_time())
                self._perform()
        return self._outcome

    def receive_untrusted(self, datagram: bytes, way: Way) -> None:
        """Raises BadFrame."""
        self.probe.receive_untrusted(datagram, way, trio.current_time())
        self._perform()
        self._wake.set()

    def _perform(self) -> None:
        for action in self.probe.actions():
            if not isinstance(action, Send):
                self._outcome = action
            elif not action.way.via:
                self._shared.send([action.datagram], action.way.to)
            elif (socket := self._socket(action.way.via)) is not None:
                socket.send([action.datagram], action.way.to)

    def _socket(self, via: int) -> DatagramSocket | None:
        """None when the system gives no more, or the search is over."""
        if via not in self.sockets and self._may_bind and self._nursery is not None:
            try:
                socket = self.sockets[via] = self._bind()
            except ListenFailed as error:
                log.debug("no more sockets for a salvo: %s", error)
                self._may_bind = False
            else:
                self._nursery.start_soon(self._listen, socket, via)
        return self.sockets.get(via)

    async def _listen(self, socket: DatagramSocket, via: int) -> None:
        while True:
            for datagram, sender in await socket.receive():
                if datagram[:1] == _FIRST:
                    with contextlib.suppress(BadFrame):
                        self.receive_untrusted(datagram, Way(sender, via))


def _is_outside(host: str) -> bool:
    """Whether it is an address of the internet with NATs before it: IPv4, and not private."""
    address = ipaddress.ip_address(host)
    return address.version == 4 and not is_private(address)


def _most_sockets() -> int:
    """For all salvos together: no more than a quarter of what this process may open."""
    try:
        import resource
    except ImportError:  # Windows counts no descriptors
        return FAN_SOCKETS
    return min(FAN_SOCKETS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)


def _why(meeting: Meeting) -> str:
    """What the NATs' kinds add to a reason."""
    kinds = {meeting.mine.v4, meeting.theirs.v4}
    if NatKind.BLOCKED in kinds:
        return "; one side's network lets no UDP through"
    if kinds == {NatKind.HARD}:
        return "; both NATs show everybody another port, so neither can be told where to send"
    return ""
