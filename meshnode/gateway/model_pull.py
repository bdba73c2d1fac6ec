"""`POST /api/v1/models/{id}/pull`: what is asked for, and on which nodes.

What came stays when the client leaves; the same request goes on from there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from meshnode.errors import MeshError, UsageError
from meshnode.gateway.pull_events import Work
from meshnode.gateway.pull_request import bad_request
from meshnode.gateway.refusal import Refusal
from meshnode.models.facts import ModelFacts, shown_name
from meshnode.models.fetching import FROM_MEMBERS, OnProgress
from meshnode.models.peers.overview import Model
from meshnode.models.pull.reference import is_secret, parse_reference
from meshnode.models.registry import KnownModel
from meshnode.models.store.slice import Slice
from meshnode.models.web import is_reference
from meshnode.pipeline.layer_range import tensors_of_layers
from meshnode.pipeline.orders import Orders, Target
from meshnode.pipeline.user_pulls import TooManyPulls, UserPulls

RETRY_AFTER = {"retry-after": "30"}
_SUGGESTIONS = 3
_TOLD = ("id", "name", "pulled_bytes", "held_bytes", "weight_bytes", "complete", "proof")


class Pulls:
    """I pull for the operator, here and on other nodes."""

    def __init__(self, pulls: UserPulls, orders: Orders) -> None:
        self._pulls = pulls
        self._orders = orders

    def find_node(self, text: str, me: Target) -> Target:
        """Who is meant by a name or an id. Raises `Refusal` (404)."""
        if text == me.peer:
            return me
        try:
            found = self._orders.find(text)
        except MeshError as error:
            if text == me.node:
                return me
            raise Refusal(404, "unknown_node", str(error)) from None
        if text == me.node:
            raise bad_request(f"this node and another are called {text}: name one by its id")
        return found

    # -- what there is to do ------------------------------------------------------------------

    def of_source(self, source: str, layers: str | None, on: Target | None = None) -> Work:
        """From a source, `on` another node, or on this one."""
        return partial(self._pull, source, layers, on)

    def of_model(self, model: KnownModel, layers: str | None) -> Work:
        """On this node, what it lacks of a model."""
        part = model.part
        if part is None:
            return _nothing_to_pull(model)
        source = part.document.source
        if source is None or source.startswith(FROM_MEMBERS):
            return partial(self._pull, f"{FROM_MEMBERS}{model.identity}", layers, None)
        return partial(self._pull_rest, part, layers)

    async def _pull(
        self, source: str, layers: str | None, on: Target | None, tell: OnProgress
    ) -> Mapping[str, object]:
        node = on.peer if on else None
        try:
            row = await self._pulls.pull(source, layers, tell, node=node, what="layers")
        except TooManyPulls as error:
            raise _busy(error) from None
        return {name: row[name] for name in _TOLD}

    async def _pull_rest(
        self, part: Slice, layers: str | None, tell: OnProgress
    ) -> Mapping[str, object]:
        try:
            row = await self._pulls.pull_rest(part, layers, tell, what="layers")
        except TooManyPulls as error:
            raise _busy(error) from None
        return {name: row[name] for name in _TOLD}


def _busy(error: TooManyPulls) -> Refusal:
    return Refusal(503, "gateway_busy", str(error), RETRY_AFTER)


def is_source(text: str) -> bool:
    """Whether it names where a model comes from, not one that is here."""
    return is_reference(text) or text.lower().startswith(FROM_MEMBERS)


def checked_source(text: str) -> str:
    """A source that has no secret in its address: it would stay in logs and histories, and go to
    other nodes. Raises `Refusal` (400)."""
    try:
        reference = parse_reference(text)
    except UsageError as error:
        raise bad_request(str(error)) from None
    if is_secret(reference):
        raise bad_request(
            "an address with a password, or with something behind a question mark, may be secret, "
            "and is not taken here: run `mesh pull` with it on the machine that is to have the "
            "model"
        )
    return str(reference)


def source_for_others(model: KnownModel, names: Sequence[str]) -> str:
    """From where other nodes take these tensors of a model that is here: from here, where all of
    them are, which asks least of what their operators allow; else from its source on the web, or
    from whoever of the mesh has them."""
    source = model.part.document.source if model.part else None
    is_here = model.held is None or model.held.issuperset(names)
    if not is_here and source is not None and is_reference(source):
        return source
    return f"{FROM_MEMBERS}{model.identity}"


def source_of_members(elsewhere: Sequence[Model], text: str) -> str | None:
    """Of a model that only members have, by a name or an identity that the list tells; None where
    no model there is meant. Raises `Refusal` (409)."""
    wanted = text.casefold()
    found = [one for one in elsewhere if wanted in (one.root, one.provisional)] or [
        one for one in elsewhere if wanted in map(str.casefold, one.names)
    ]
    identities = sorted({one.root or one.provisional for one in found})
    if len(identities) > 1:
        them = ", ".join(f"{FROM_MEMBERS}{identity}" for identity in identities[:_SUGGESTIONS])
        text = f"members call different models {shown_name(text)}: name the one you mean: {them}"
        raise Refusal(409, "ambiguous_model", text)
    return f"{FROM_MEMBERS}{identities[0]}" if identities else None


def wanted_tensors(facts: ModelFacts, layers: str | None) -> tuple[str, ...]:
    """Raises `Refusal` (400)."""
    try:
        return tensors_of_layers(facts, layers, what="layers")
    except UsageError as error:
        raise bad_request(str(error)) from None


def _nothing_to_pull(model: KnownModel) -> Work:
    """Of a model that is whole already."""
    row = {
        "id": str(model.identity),
        "name": model.entry.name,
        "pulled_bytes": 0,
        "held_bytes": model.facts.weight_bytes,
        "weight_bytes": model.facts.weight_bytes,
        "complete": True,
        "proof": "digests" if model.identity.root else "word",
    }

    async def work(_tell: OnProgress) -> Mapping[str, object]:
        return row

    return work
