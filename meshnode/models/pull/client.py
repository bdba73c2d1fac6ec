"""HTTP requests that follow redirects by the rules, over connections that are kept.

A secret goes to the host it is for (scheme, host and port alike) and to no other, whatever a server
says. From https nobody is led to http. A circle of redirects, or a long row of them, ends in a
sentence.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import trio

from meshnode.errors import UsageError
from meshnode.models.pull import answers
from meshnode.models.pull.answers import Head
from meshnode.models.pull.exchange import Exchange, NothingCame
from meshnode.models.pull.reach import Reach
from meshnode.models.pull.source import SourceError, SourceFault
from meshnode.models.pull.threads import in_thread
from meshnode.models.pull.url import Origin, Url

T = TypeVar("T")

MAX_REDIRECTS = 8
MAX_IDLE = 8
TRIES = 4
FIRST_PAUSE_S = 0.5
MAX_ASKED_PAUSE_S = 10.0
PLAIN = {"Accept-Encoding": "identity"}


@dataclass(frozen=True)
class Named:
    """An address as it was named, with what its host alone may be told."""

    url: Url
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)

    def secrets_for(self, origin: Origin) -> dict[str, str]:
        if origin != self.url.origin:
            return {}
        own = self.url.authorization
        return {**self.secrets, **({} if own is None else {"Authorization": own})}

    def covers(self, origin: Origin) -> bool:
        """Whether the user's word for the address is good for this origin too."""
        named = self.url.origin
        return origin == named or (origin.host == named.host and origin.port in (80, 443))


Receive = Callable[[Exchange, Url, Sequence[Head]], T]
"""Takes the answer from the last address of a row of redirects, knowing the heads of all answers on
the way, that one's last. Runs in a thread."""


class Client:
    """I ask, and keep the connections. `close` when done."""

    def __init__(self, reach: Reach) -> None:
        self._reach = reach
        self._idle: dict[tuple[Origin, bool], list[Exchange]] = {}

    async def exchange(self, named: Named, url: Url, work: Callable[[Exchange], T]) -> T:
        """Runs `work`, which asks and receives, in a thread, on a connection to the host of `url`.
        Raises what it does, and what `Reach.connect` does."""
        key = (url.origin, named.covers(url.origin))
        while True:
            exchange = self._take_idle(key) or await self._reach.connect(url, is_named=key[1])
            is_kept = False
            try:
                result = await in_thread(exchange, partial(work, exchange))
                is_kept = self._keep(key, exchange)
                return result
            except NothingCame:  # servers close what was idle for long
                if not exchange.was_used:
                    raise
            finally:
                if not is_kept:
                    exchange.close()

    async def follow(self, named: Named, headers: Mapping[str, str], receive: Receive[T]) -> T:
        """Asks, follows redirects, and has `receive` take the answer that is none. Raises
        `SourceError`, `SourceFault`."""
        url = named.url
        heads: list[Head] = []
        seen: set[tuple[Origin, str]] = set()

        def work(exchange: Exchange) -> tuple[Head, list[T]]:
            secrets = named.secrets_for(url.origin)
            head = exchange.ask(url, {**PLAIN, **headers, **secrets})
            is_there = head.status not in answers.REDIRECTS
            return head, [receive(exchange, url, [*heads, head])] if is_there else []

        while len(heads) <= MAX_REDIRECTS:
            seen.add((url.origin, url.target))
            head, received = await self.exchange(named, url, work)
            heads.append(head)
            if received:
                return received[0]
            url = _next(named, url, head)
            if (url.origin, url.target) in seen:
                raise SourceError(f"{named.url.shown} leads in a circle: its server is at fault")
        raise SourceError(
            f"{named.url.shown} leads on and on, over {MAX_REDIRECTS} redirects and more: its "
            "server is at fault"
        )

    async def fetch(self, named: Named, max_bytes: int, headers: Mapping[str, str]) -> bytes:
        """A small document. Raises `SourceError`, `SourceFault` after a few tries."""

        def receive(exchange: Exchange, url: Url, heads: Sequence[Head]) -> bytes:
            if heads[-1].status != 200:
                raise answers.refusal(heads[-1], url.shown)
            return exchange.body(url, max_bytes)

        return await patiently(partial(self.follow, named, headers, receive))

    def close(self) -> None:
        for idle in self._idle.values():
            for exchange in idle:
                exchange.close()
        self._idle.clear()

    def _take_idle(self, key: tuple[Origin, bool]) -> Exchange | None:
        idle = self._idle.get(key, [])
        while idle:
            exchange = idle.pop()
            if exchange.is_reusable:
                return exchange
            exchange.close()
        return None

    def _keep(self, key: tuple[Origin, bool], exchange: Exchange) -> bool:
        idle = self._idle.setdefault(key, [])
        if not exchange.is_reusable or len(idle) >= MAX_IDLE:
            return False
        exchange.renew()
        idle.append(exchange)
        return True


async def patiently(ask: Callable[[], Awaitable[T]]) -> T:
    """Asks again, a few times, where a `SourceFault` says that this may help."""
    for number in range(TRIES - 1):
        try:
            return await ask()
        except SourceFault as fault:
            asked_s = min(fault.retry_after_s, MAX_ASKED_PAUSE_S)
            await trio.sleep(max(FIRST_PAUSE_S * 2.0**number, asked_s))
    return await ask()


def _next(named: Named, url: Url, head: Head) -> Url:
    location = head.get("location")
    if location is None:
        raise SourceError(f"{url.shown} leads elsewhere without saying where ({head.status})")
    try:
        led_to = url.follow(location)
    except UsageError:
        raise SourceError(f"{url.shown} leads to what is no address of the web") from None
    if (url.origin.scheme, led_to.origin.scheme) == ("https", "http"):
        raise SourceError(
            f"{named.url.shown} leads from https to {led_to.shown}, where anybody on the way could "
            "change it: not followed"
        )
    return led_to
