"""What other machines say of tensors that are not here: kept as said, and used for nothing else.

Who computes with a tensor says its digest, and where nobody has all of a model, what several say
makes up its root *as told*. Whoever lies about a tensor that it alone holds is not found out by
that, so nothing is ever refused, found or named by such a word: it is compared with the next one,
and the user hears of two that differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from meshnode.models.manifest import entry_of, root_of
from meshnode.models.store.document import MAX_TELLER_CHARS, SliceDocument, Told
from meshnode.models.store.slice import Slice
from meshnode.models.store.thinning import annotate


@dataclass(frozen=True)
class Difference:
    """Two machines with other bytes of one tensor; `other` None: this one, which has read its; the
    same as `one`: itself, earlier."""

    tensor: str
    one: str
    other: str | None


@dataclass(frozen=True)
class ToldRoot:
    """The root that a model has if all is so as it was said, and whose word that rests on."""

    root: str
    tellers: tuple[str, ...]


def note_told(folder: Path, who: str, digests: Mapping[str, bytes]) -> tuple[Difference, ...]:
    """One more machine has spoken of the model in this slice. What it says against this machine's
    own digests is not kept; of two words that differ neither is. Returns what differs."""
    who = who[:MAX_TELLER_CHARS]
    found: list[Difference] = []

    def change(document: SliceDocument) -> SliceDocument:
        told = dict(document.told)
        for name, digest in digests.items():
            known, before = document.digests.get(name), told.get(name)
            if known is not None:
                if known != digest:
                    found.append(Difference(name, who, None))
                continue
            told.setdefault(name, (digest, who))
            if before is not None and before[0] != digest:
                found.append(Difference(name, who, before[1]))
                del told[name]
        return replace(document, told=told)

    annotate(folder, change)
    return tuple(found)


def contradicted(told: Mapping[str, Told], digests: Mapping[str, bytes]) -> tuple[Difference, ...]:
    """What was told and is otherwise, now that it was read here."""
    return tuple(
        Difference(name, who, None)
        for name, (digest, who) in told.items()
        if digests.get(name, digest) != digest
    )


def told_root(found: Slice) -> ToldRoot | None:
    """None where the root is known, or some tensor's digest is not even told."""
    document = found.document
    own, told = document.digests, document.told
    tensors = found.facts.tensors
    if document.root is not None or any(t.name not in own and t.name not in told for t in tensors):
        return None
    entries = [entry_of(t, own[t.name] if t.name in own else told[t.name][0]) for t in tensors]
    tellers = {told[t.name][1] for t in tensors if t.name not in own}
    return ToldRoot(root_of(found.facts.header_digest, entries), tuple(sorted(tellers)))
