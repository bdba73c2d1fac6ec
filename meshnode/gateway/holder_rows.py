"""Who holds what of a model, as the registry API tells it."""

from __future__ import annotations

from collections.abc import Sequence

from meshnode.models.facts import ModelFacts, TensorFacts, shown_name
from meshnode.models.identity import Identity
from meshnode.models.peers.overview import Model, Share
from meshnode.models.registry import model_row
from meshnode.models.spans import Span, joined, within


def holder_row(share: Share, facts: ModelFacts | None, sizes: Sequence[int]) -> dict[str, object]:
    """facts, sizes: of the model, where they are known. `tensors`: null for all of them, or where
    its files are others than these, or it says that it has more pieces than these are."""
    row: dict[str, object] = {
        "node": share.member,
        "peer": str(share.peer),
        "complete": share.complete,
        "held_bytes": share.held_bytes,
        "tensors": None,
    }
    source = share.source
    if share.complete or source is None or facts is None:
        return row
    if [file.size_bytes for file in source.files] != list(sizes):
        return row
    pieces = source.holds or ()
    if len(pieces) > len(facts.tensors) + len(sizes):
        return row
    spans = joined(pieces)
    held = [tensor for tensor in facts.tensors if _is_within(tensor, spans)]
    return row | {
        "held_bytes": sum(tensor.nbytes for tensor in held),
        "tensors": [tensor.name for tensor in held],
    }


def elsewhere_row(model: Model, all_said: bool) -> dict[str, object]:
    """Of a model that this node has nothing of."""
    name, *aliases = model.names
    facts = model.facts
    if facts is None:
        return {"name": name, "trouble": "the members that have it did not give its header"}
    sizes = [size_bytes for _, size_bytes in model.files]
    files = [{"name": shown_name(name), "size_bytes": size} for name, size in model.files]
    identity = Identity(facts.header_digest, model.provisional, model.root)
    return {
        **model_row(facts, identity, name, aliases, files, None),
        "holders": [holder_row(share, facts, sizes) for share in model.shares],
        "members_asked": all_said,
    }


def _is_within(tensor: TensorFacts, spans: Sequence[Span]) -> bool:
    if not tensor.nbytes:
        return True
    wanted = (Span(tensor.file_index, tensor.offset, tensor.offset + tensor.nbytes),)
    return within(wanted, spans) == wanted
