"""Sources of models that lie on the web, and who may have this node ask there.

What its user names is the user's word; what an orchestrator names is a stranger's, and goes through
the address policy first. Where a server sends us on to goes through it in either case. The user's
token for a hub serves the user alone: what a stranger has this node pull, members may read.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace

from meshnode.config import PullSource
from meshnode.errors import UsageError
from meshnode.models.pull.opening import open_reference
from meshnode.models.pull.reach import Reach, welcome
from meshnode.models.pull.reference import (
    HubReference,
    MeshReference,
    OllamaReference,
    Reference,
    UrlReference,
    is_secret,
    parse_reference,
)
from meshnode.models.pull.source import NotForEverybody, RangeSource, SourceError
from tunnels import AddressPolicy
from tunnels.dial import BEYOND
from tunnels.network import HostNetwork
from tunnels.offline import NearNetwork

EVERYWHERE = "0.0.0.0"  # noqa: S104 - compared with, never bound


def is_reference(text: str) -> bool:
    """Whether a user's word for a model names a source, not a file or a model that is here."""
    scheme, colon, _ = text.partition(":")
    return bool(colon) and scheme.lower() in ("http", "https", "hf", "ollama")


def kind_of(reference: str) -> PullSource:
    """Which kind of source it names. Raises `UsageError`."""
    match parse_reference(reference):
        case HubReference() | OllamaReference():
            return PullSource.HUB
        case MeshReference():
            return PullSource.PEERS
    return PullSource.URL


def _complete(reference: Reference) -> Reference:
    """Raises `SourceError` where the address is what others are shown of one."""
    if isinstance(reference, UrlReference) and reference.urls[0].is_curtailed:
        raise SourceError(
            f"{reference}: what stood behind its question mark may be secret, so it was neither "
            "kept nor told to other machines: name the whole address again, in `mesh pull` on this "
            "machine"
        )
    return reference


def is_for_us_alone(source: str | None) -> bool:
    """Whether others, who hear of a source what is shown of it, cannot fetch from there."""
    try:
        return source is not None and is_secret(parse_reference(source))
    except UsageError:
        return False  # whoever fetches from there will say so


class Web:
    """I open sources by their references."""

    def __init__(self, *, offline: bool = False, named: str | None = None) -> None:
        """offline: nothing is asked beyond the networks that this machine is in. named: a reference
        as its user wrote it; the store keeps it, and others are told of it, without its secrets."""
        self._named = parse_reference(named) if named else None
        self._network = NearNetwork() if offline else HostNetwork()
        self._policy = AddressPolicy(only=self._network.is_near if offline else None)
        may_be_named = self._beyond if offline else welcome
        self._for_users = Reach(may_be_named, self._refusal, looks_up=not offline)
        self._for_strangers = Reach(self._refusal, self._refusal, looks_up=not offline)

    def open_for_user(self, reference: str) -> AbstractAsyncContextManager[RangeSource]:
        """Raises `MeshError`."""
        parsed = parse_reference(reference)
        if self._named is not None and str(self._named) == str(parsed):
            parsed = self._named
        return open_reference(_complete(parsed), self._for_users, with_token=True)

    def open_for_stranger(self, reference: str) -> AbstractAsyncContextManager[RangeSource]:
        """Raises `MeshError`."""
        return self._open_without_token(_complete(parse_reference(reference)))

    @asynccontextmanager
    async def _open_without_token(self, reference: Reference) -> AsyncIterator[RangeSource]:
        reach = self._for_strangers
        if isinstance(reference, UrlReference):
            reach = replace(reach, through_proxy=False)
        try:
            async with open_reference(reference, reach, with_token=False) as opened:
                yield opened
        except NotForEverybody as error:
            raise SourceError(
                f"{error.shown} is not for everybody, and no token or password serves at another "
                "node's word: its operator can run `mesh pull` on that machine, where it is gated "
                "or private; or check the name"
            ) from error

    def _refusal(self, host: str) -> str | None:
        own = self._network.interface_addresses()
        return self._policy.refusal(host, bound_host=EVERYWHERE, own_addresses=own)

    def _beyond(self, host: str) -> str | None:
        return None if self._network.is_near(host) else f"not tried: {BEYOND}"
