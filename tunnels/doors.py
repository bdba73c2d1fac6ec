"""The sockets of a node: UDP's and TCP's, on one port where it is free."""

from __future__ import annotations

import ssl
from collections.abc import Collection

from tunnels.binding import Address
from tunnels.demux import SharedSocket
from tunnels.errors import ListenFailed
from tunnels.identity import Identity
from tunnels.network import Network
from tunnels.tcp_socket import Listener
from tunnels.tls import listener_context


class Doors:
    """I open them, and close them again. Those that none of `needs` wants are None."""

    datagrams: SharedSocket | None = None
    listener: Listener | None = None
    second_listener: Listener | None = None
    tls: ssl.SSLContext | None = None

    def __init__(
        self,
        network: Network,
        identity: Identity,
        host: str | None,
        port: int,
        needs: Collection[str],
        tcp_port: int | None = None,
    ) -> None:
        """needs: "udp", "tcp", "tls". tcp_port: a second one for TCP. Raises ListenFailed."""
        if "udp" in needs:
            self.datagrams = SharedSocket(network.bind(host, port))
            port = self.datagrams.local[1]
        try:
            if "tcp" in needs:
                self.listener = self._listen(network, host, port)
                if tcp_port not in (None, self.listener.local[1]):
                    self.second_listener = network.listen(host, tcp_port)
            if "tls" in needs:
                self.tls = listener_context(identity)
        except BaseException:
            self.close()
            raise

    def _listen(self, network: Network, host: str | None, port: int) -> Listener:
        try:
            return network.listen(host, port)
        except ListenFailed:
            if self.datagrams is None:
                raise
            return network.listen(host, 0)

    @property
    def local(self) -> Address:
        """UDP's, where there is one: its port is what a person gives to others."""
        door = self.datagrams or self.listener
        assert door is not None
        return door.local

    def close(self) -> None:
        for door in (self.datagrams, self.listener, self.second_listener):
            if door is not None:
                door.close()
