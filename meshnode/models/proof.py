"""What stands for a model's bytes where no digest does, in a user's words."""

from __future__ import annotations

from meshnode.models.fetching import FROM_MEMBERS
from meshnode.models.store.document import SliceDocument

UNPROTECTED = (
    "it came over http without TLS, and no digest is there to compare it with: what somebody on "
    "the way changed would not be noticed; where you can, name an https address"
)
_MEMBERS_WORD = "nobody proves its digests, so it is what those say that it is who gave it"
_SOURCES_WORD = "nobody proves its digests, so it is what its source gave"


def is_members(source: str | None) -> bool:
    return not source or source.startswith(FROM_MEMBERS)


def is_unprotected(source: str | None) -> bool:
    """Whether anybody on the way could have changed the bytes."""
    return (source or "").startswith("http://")


def unproven(source: str | None) -> str:
    """Whose word it rests on."""
    return _MEMBERS_WORD if is_members(source) else _SOURCES_WORD


def whose_word(document: SliceDocument) -> str | None:
    """The same of a slice; None where it is proven: by the source's sha256, or by the root that
    members were asked for. Any other root is no more than what was read here."""
    if document.vouched:
        return None
    if document.root is not None and document.source == f"{FROM_MEMBERS}{document.root}":
        return None
    return UNPROTECTED if is_unprotected(document.source) else unproven(document.source)
