"""What an endpoint offers to its peers, and to whom."""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from tunnels.gate import ServiceGate, ServiceLimits
from tunnels.peer import PeerId
from tunnels.relaying import OWN_RULES
from tunnels.stream import Handler, Stream

log = logging.getLogger(__name__)


class Services:
    """I find the handler of a service for a peer, or the sentence why there is none.

    authorize(peer, service): asked for every stream, but for those of OWN_RULES.
    """

    def __init__(self, authorize: Callable[[PeerId, str], bool]) -> None:
        self._authorize = authorize
        self._handlers: dict[str, tuple[Handler, ServiceLimits]] = {}
        self._gates: dict[str, ServiceGate] = {}

    def serve(self, service: str, handler: Handler, limits: ServiceLimits) -> None:
        self._handlers[service] = (handler, limits)
        self._gates.pop(service, None)

    def answer(self, peer: PeerId, service: str) -> Handler | str:
        """The handler of `service` for `peer`, or why there is none. The two refusals read the
        same, so that a stranger cannot list our services."""
        refused = f"the service {service!r} is not offered to this node"
        name = self._name_of(service)
        try:
            allowed = name in OWN_RULES or self._authorize(peer, service)
        except Exception:
            log.exception("the rules for %r failed: refused", service)
            return refused
        name = name if allowed else None
        return refused if name is None else self._gated(name, peer)

    def _gated(self, name: str, peer: PeerId) -> Handler | str:
        """The handler of the service served as `name`, unless the peer asks too much of it."""
        handler, limits = self._handlers[name]
        gate = self._gates.get(name)
        if gate is None:
            gate = self._gates[name] = ServiceGate(limits, trio.current_time())
        too_much = gate.enter(peer, trio.current_time())
        if too_much is not None:
            return too_much

        async def counted(stream: Stream) -> None:
            try:
                await handler(stream)
            finally:
                gate.leave(peer)

        return counted

    def _name_of(self, service: str) -> str | None:
        if service in self._handlers:
            return service
        prefixes = [
            name for name in self._handlers if name.endswith("/") and service.startswith(name)
        ]
        return max(prefixes, key=len, default=None)
