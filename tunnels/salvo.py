"""Many probes at once, where no single port can be named. Sans-IO.

One side's NAT is hard: each destination sees it on another port, chosen at random. The other's lets
in only who was sent to, address and port. So neither can name the port that the other must send to.
But dice can be thrown on both sides (the birthday paradox):

    fan     the hard side asks from each of FAN_SOCKETS more sockets, which opens that many ports of
            its NAT towards the easy side
    spray   the easy side asks SPRAYED_PORTS ports of the hard side's host, once each. What meets an
            open one comes through, and its answer does too

Of 64,512 ports, n tries miss 256 open ones with probability (1 - 256/64512)^n: 1.7 % after 1024,
0.03 % after 2048.

What whoever is aimed at has to bear: a fan is FAN_SOCKETS probes to one port, 24 KB on the wire; a
spray SPRAYED_PORTS probes to one host, one a port, 188 KB over three seconds. That is no weapon: it
takes a member that names the address to a node that trusts it with a session; it comes once a
minute for each host (punch.py), 3 KB/s in the long run; no probe is answered by more than itself;
and it ends with the first answer. Who waits for a reply code to be carried repeats its fan or
its spray, that is 1.2 or 9.4 KB/s to an address that its own user pasted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tunnels.binding import Address
from tunnels.probe_wire import Way

FAN_SOCKETS = 256
FAN_PER_S = 2560.0
AGAIN_S = 20.0  # NATs forget what was not answered after 30 s
SPRAYED_PORTS = 2048
SPRAY_PER_S = 683.0
HELD_PORTS = 1024
FIRST_PORT = 1024  # NATs give out this one and those above
PORTS = 65536 - FIRST_PORT
# The golden section of PORTS, and coprime to it: walked by this stride, ports lie evenly, however
# many there are. As good as dice against a NAT that throws dice; and one that counts up, so that
# its open ports are neighbours, is not missed.
PORT_STRIDE = 39871
TICK_S = 0.012


@dataclass(frozen=True)
class Salvo:
    """To be asked over each of these ways once, so many a second; of a side that waits for the
    other to begin, again every `again_s`, so that what is open stays so."""

    host: str
    ways: Sequence[Way]
    per_s: float
    again_s: float = math.inf


NO_SALVO = Salvo("", (), per_s=0.0)


class Volley:
    """I fire a salvo, a little each TICK_S. Who owns me loads it, and may stop it."""

    def __init__(self, salvo: Salvo) -> None:
        self._salvo = salvo
        self._unfired: list[Way] = []  # the next one last
        self.was_fired = False
        self.next_at_s = math.inf

    @property
    def host(self) -> str:
        return self._salvo.host

    @property
    def is_spent(self) -> bool:
        """Nothing is loaded, or any more."""
        return not self._unfired

    def begin(self, at_s: float) -> None:
        self.next_at_s = at_s

    def load(self) -> None:
        self.was_fired = True
        self._unfired = list(reversed(self._salvo.ways))

    def fire(self, now: float, *, again: bool) -> list[Way]:
        """What is to be asked now. again: once all was fired, from the beginning."""
        size = round(self._salvo.per_s * TICK_S)
        ways = self._unfired[-size:]
        del self._unfired[-size:]
        pause_s = self._salvo.again_s if again else math.inf
        self.next_at_s = now + (TICK_S if self._unfired else pause_s)
        return ways[::-1]

    def stop(self) -> None:
        self._unfired.clear()
        self.next_at_s = math.inf


def fan(to: Address) -> Salvo:
    """To the easy side's address, from sockets numbered from 1."""
    ways = [Way(to, via) for via in range(1, FAN_SOCKETS + 1)]
    return Salvo(to[0], ways, FAN_PER_S, AGAIN_S)


def spray(host: str, first: int) -> Salvo:
    """To ports of the hard side's host. first: any number; where the walk begins."""
    return Salvo(host, _walk(host, first, SPRAYED_PORTS), SPRAY_PER_S)


def hold(host: str, first: int) -> Salvo:
    """A spray of who waits for the hard side to begin."""
    return Salvo(host, _walk(host, first, HELD_PORTS), SPRAY_PER_S, AGAIN_S)


def _walk(host: str, first: int, count: int) -> list[Way]:
    return [Way((host, FIRST_PORT + (first + n * PORT_STRIDE) % PORTS)) for n in range(count)]
