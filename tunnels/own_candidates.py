"""Where peers may reach this node."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import trio

from tunnels.doors import Doors
from tunnels.kinds import Kinds
from tunnels.network import Network, reachable_hosts
from tunnels.peer import Candidate, PeerId

Source = Callable[[], Iterable[Candidate]]


class OwnCandidates:
    """I gather them from whoever knows some, and tell when there are others.

    relayed: what is to be told beside the direct ones.
    """

    def __init__(
        self,
        network: Network,
        kinds: Kinds,
        relayed: Callable[[Sequence[Candidate]], list[Candidate]],
    ) -> None:
        self._network = network
        self._kinds = kinds
        self._relayed = relayed
        self._further: list[Source] = []
        self.changed = trio.Event()  # another one after each change

    def add(self, source: Source) -> None:
        self._further.append(source)

    def tell_changed(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    def hosts(self, doors: Doors) -> list[str]:
        """Our interface addresses, where they lead to the doors."""
        return reachable_hosts(doors.local[0], self._network.interface_addresses())

    def gather(self, doors: Doors, ports: Mapping[str, int]) -> list[Candidate]:
        """ports: where we listen, by kind of link. Each place once."""
        hosts = self.hosts(doors)
        found = [Candidate(kind, one, port) for one in hosts for kind, port in ports.items()]
        if doors.second_listener is not None and "tcp" in self._kinds.wanted:
            second = doors.second_listener.local[1]
            found += [Candidate("tcp", one, second) for one in hosts]
        for source in self._further:
            found += (one for one in source() if one.transport in self._kinds.met_over)
        places: dict[tuple[str, str, int, PeerId | None], Candidate] = {}
        for one in (*self._relayed(found), *found):
            places.setdefault((one.transport, one.host, one.port, one.via), one)
        return list(places.values())
