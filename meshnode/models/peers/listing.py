"""What members say of the models they hold, and which one a user's word means. Sans-IO.

Messages of the `store` service, asked as those of `meshnode.models.peers.protocol` are:

- `models`: answered with a `Listing`, {"models": [[name, [further name, …], provisional identity,
  root or b"", bytes of weights, bytes that are held], …]}, `MAX_LISTED` of them at most.
- `digests`: of one model, by its root. Answered with {"digests": …}: 32 bytes a tensor, in the
  order of the tensors' names; b"" where nobody here knows them all.

Names are each member's own choice, and so is what lies behind them: where two members call two
models the same, the user says which by its identity.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meshnode.errors import AmbiguousModel, BadMessage, NoSuchModel
from meshnode.models.facts import ModelFacts, shown_name
from meshnode.models.header import MAX_TENSORS
from meshnode.models.manifest import DIGEST_BYTES, entry_of, root_of

MAX_LISTED = 1024
MAX_FURTHER_NAMES = 4
MAX_NAME_CHARS = 255
LISTING_BYTES = 2 << 20
DIGESTS_BYTES = DIGEST_BYTES * MAX_TENSORS + 1024
IDENTITY_CHARS = 2 * DIGEST_BYTES
_SUGGESTIONS = 5
_MAX_BYTES = 2**63 - 1


@dataclass(frozen=True)
class Listed:
    """One model at one member. `root`: None where nobody there has digested all of it."""

    name: str
    further_names: tuple[str, ...]
    provisional: str
    root: str | None
    weight_bytes: int
    held_bytes: int

    def is_meant(self, text: str) -> bool:
        """By its name, or by its identity, case ignored. A whole identity is no name."""
        wanted = text.casefold()
        if is_identity(wanted):
            return wanted in (self.provisional, self.root)
        return wanted in {name.casefold() for name in (self.name, *self.further_names)}


@dataclass(frozen=True)
class Told:
    """What a member of that name says it has."""

    member: str
    model: Listed


@dataclass(frozen=True)
class Choice:
    """The model that is meant. `provisionals`: names of its files as members have them, those of
    which most is held first. `root`: what some member says that it is, unproven. `members`: who
    say that they have something of it."""

    name: str
    provisionals: tuple[str, ...]
    root: str | None
    members: tuple[str, ...]

    @property
    def identity(self) -> str:
        return self.root or self.provisionals[0]


def is_identity(text: str) -> bool:
    """Whether it is written like a root or a provisional identity: 64 hex digits."""
    return len(text) == IDENTITY_CHARS and all(digit in "0123456789abcdef" for digit in text)


# -- messages -----------------------------------------------------------------------------------


def to_message(models: Sequence[Listed]) -> dict[str, Any]:
    """What `parse_listing_untrusted` reads, of the first `MAX_LISTED`."""
    rows = [
        [
            one.name[:MAX_NAME_CHARS],
            [name[:MAX_NAME_CHARS] for name in one.further_names[:MAX_FURTHER_NAMES]],
            bytes.fromhex(one.provisional),
            bytes.fromhex(one.root or ""),
            one.weight_bytes,
            one.held_bytes,
        ]
        for one in models[:MAX_LISTED]
    ]
    return {"models": rows}


def parse_listing_untrusted(message: Mapping[str, Any]) -> tuple[Listed, ...]:
    """Raises `BadMessage` and nothing else."""
    rows = message.get("models")
    if not isinstance(rows, list) or len(rows) > MAX_LISTED:
        raise _strange()
    return tuple(map(_listed, rows))


def _listed(row: object) -> Listed:
    if not isinstance(row, list) or len(row) < 6 or not isinstance(row[1], list):
        raise _strange()
    name, further, provisional, root, weight_bytes, held_bytes = row[:6]
    if len(further) > MAX_FURTHER_NAMES:
        raise _strange()
    return Listed(
        _name(name),
        tuple(map(_name, further)),
        _identity(provisional),
        _identity(root) if root != b"" else None,
        _count(weight_bytes),
        _count(held_bytes),
    )


def parse_digests_untrusted(message: Mapping[str, Any]) -> tuple[bytes, ...]:
    """In the order of the tensors' names. Raises `BadMessage` and nothing else."""
    data = message.get("digests")
    if not isinstance(data, bytes) or len(data) % DIGEST_BYTES:
        raise BadMessage("the peer's word on a model's digests has an unknown shape")
    return tuple(data[at : at + DIGEST_BYTES] for at in range(0, len(data), DIGEST_BYTES))


def _name(value: object) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME_CHARS:
        raise _strange()
    return shown_name(value)


def _identity(value: object) -> str:
    if not isinstance(value, bytes) or len(value) != DIGEST_BYTES:
        raise _strange()
    return value.hex()


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MAX_BYTES:
        raise _strange()
    return value


def _strange() -> BadMessage:
    return BadMessage("the peer's list of models has an unknown shape")


# -- what it means ------------------------------------------------------------------------------


def proven(facts: ModelFacts, root: str, digests: Sequence[bytes]) -> Mapping[str, bytes] | None:
    """These digests by tensor, if they and this header make up the root: then whoever gave them,
    and whoever gives the bytes, cannot pass off others. Else None."""
    tensors = sorted(facts.tensors, key=lambda tensor: tensor.name)
    if len(digests) != len(tensors):
        return None
    entries = [entry_of(one, digest) for one, digest in zip(tensors, digests, strict=True)]
    if root_of(facts.header_digest, entries) != root:
        return None
    return {entry.name: entry.digest for entry in entries}


def choose(text: str, told: Sequence[Told], silent: Sequence[str] = ()) -> Choice:
    """The model that a user's word means. `silent`: members that did not say what they have.
    Raises `NoSuchModel`, which says what there is, and `AmbiguousModel`."""
    found = [one for one in told if one.model.is_meant(text)]
    if not found:
        raise NoSuchModel(_unknown(text, told, silent))
    by_identity = _by_identity(found, told)
    wanted = text.casefold()
    if wanted in by_identity:  # a root: others with its files may say that they are of another
        by_identity = {wanted: by_identity[wanted]}
    if len(by_identity) > 1:
        them = ", ".join(
            f"mesh:{identity} (on {_listing([one.member for one in ones])})"
            for identity, ones in list(by_identity.items())[:_SUGGESTIONS]
        )
        raise AmbiguousModel(
            f"members call different models {shown_name(text)}: name the one you mean by its "
            f"identity: {them}"
        )
    ((identity, ones),) = by_identity.items()
    ones = sorted(ones, key=lambda one: -one.model.held_bytes)
    provisionals = tuple(dict.fromkeys(one.model.provisional for one in ones))
    members = tuple(dict.fromkeys(one.member for one in ones))
    root = None if identity in provisionals else identity
    return Choice(ones[0].model.name, provisionals, root, members)


def _by_identity(found: Sequence[Told], told: Sequence[Told]) -> dict[str, list[Told]]:
    """Parts of a model, which know no root, are of the models whose files they are of."""
    roots: dict[str, set[str]] = {}
    for one in told:
        if one.model.root is not None:
            roots.setdefault(one.model.provisional, set()).add(one.model.root)
    groups: dict[str, list[Told]] = {}
    for one in found:
        own, known = one.model.root, sorted(roots.get(one.model.provisional, ()))
        for identity in [own] if own is not None else known or [one.model.provisional]:
            groups.setdefault(identity, []).append(one)
    return groups


def _unknown(text: str, told: Sequence[Told], silent: Sequence[str]) -> str:
    nothing = f"no member that is connected has a model called {shown_name(text)!r}: "
    asked = f" ({_listing(silent)} did not say what they have)" if silent else ""
    if not told:
        return f"{nothing}they have none{asked}; name a source on the web (hf:…, https://…)"
    where: dict[str, list[str]] = {}
    for one in told:
        where.setdefault(one.model.name, []).append(one.member)
    folded = {name.casefold(): name for name in where}
    close = difflib.get_close_matches(text.casefold(), folded, _SUGGESTIONS, cutoff=0.4)
    names = list(dict.fromkeys([*(folded[key] for key in close), *sorted(where)]))
    shown = [f"{name} (on {_listing(where[name])})" for name in names[:_SUGGESTIONS]]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return f"{nothing}there are {', '.join(shown)}{more}{asked}"


def _listing(names: Sequence[str]) -> str:
    """Some of them, each once."""
    once = list(dict.fromkeys(names))
    rest = f" and {len(once) - _SUGGESTIONS} more" if len(once) > _SUGGESTIONS else ""
    return ", ".join(once[:_SUGGESTIONS]) + rest
