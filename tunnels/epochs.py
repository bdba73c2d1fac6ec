"""What tells one life of a session from the next."""

from __future__ import annotations

import secrets
from collections import OrderedDict

from tunnels.frames import EPOCH_BYTES
from tunnels.peer import PeerId

REMEMBERED_PEERS = 4096  # whose sessions ended


class Epochs:
    """What tells a peer whether its session with us still stands: the same on all links of one
    session, another after a restart, and after a session that ended here, since the peer may not
    have heard of that."""

    def __init__(self) -> None:
        self._of_process = secrets.token_bytes(EPOCH_BYTES)
        self._renewed: OrderedDict[PeerId, bytes] = OrderedDict()

    def of(self, peer: PeerId) -> bytes:
        return self._renewed.get(peer, self._of_process)

    def renew(self, peer: PeerId) -> None:
        self._renewed[peer] = secrets.token_bytes(EPOCH_BYTES)
        self._renewed.move_to_end(peer)
        while len(self._renewed) > REMEMBERED_PEERS:
            self._renewed.popitem(last=False)
