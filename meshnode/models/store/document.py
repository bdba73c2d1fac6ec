"""`slice.cbor`: which tensors of a model a slice holds, and whose bytes they are.

    mesh-slice 1\\n | BLAKE3 of the rest (32 bytes) | a CBOR map

    files        [[name, bytes], …]           in the model's order, each beside the document
    source       text or null                 where the bytes come from
    validator    text                         what the source says of the bytes
    header       32 bytes                     the header's digest
    layout       32 bytes                     digest of where each tensor lies
    root         32 bytes or null             once every tensor's digest is known
    tensors      how many the model has
    weight_bytes, held_bytes                  for lists, which read no header
    digests      {tensor: 32 bytes}           known ones: of what is held, or was
    held         [tensor, …]                  those whose bytes are all here
    stamps       [[mtime_ns, inode], …]       the files when that was written
    needed       [tensor, …] or null          what the last plan computes with, and what came since
    told         {tensor: [32 bytes, who]}    what others say that its digest is: no more than said
    vouched      true or false                all was here once, with the source's sha256

Read back from a disk that may have damaged it. With a wrong digest the document is not `sealed`:
what it says is a claim then. Sources are forgotten, and held tensors are read again and compared
before anybody uses them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import cbor2
from blake3 import blake3

from meshnode.cbor import BadCbor, loads_untrusted
from meshnode.models.facts import MAX_SHARDS
from meshnode.models.header import MAX_NAME_BYTES, MAX_TENSORS
from meshnode.models.identity import Identity, provisional_identity

DIGEST_BYTES = 32
MAX_DOCUMENT_BYTES = 64 * 2**20
MAX_FILE_NAME_BYTES = 255
MAX_TELLER_CHARS = 128
MAX_TEXT_CHARS = 256 * 1024  # a validator for each of a thousand files
_MAGIC = b"mesh-slice 1\n"
_MAX_BYTES = 2**63 - 1

Stamps = tuple[tuple[int, int], ...]
Told = tuple[bytes, str]
"""A tensor's digest, and who says so."""


class BadDocument(Exception):
    """Nothing that can be used is left of it."""


@dataclass(frozen=True)
class SliceDocument:
    """What a slice says of itself. `held` and `digests` may name tensors the header has not: only
    the two together are the truth (`meshnode.models.store.slice`)."""

    files: tuple[tuple[str, int], ...]
    source: str | None
    validator: str
    header_digest: bytes
    layout: bytes
    root: str | None
    tensor_count: int
    weight_bytes: int
    held_bytes: int = 0
    digests: Mapping[str, bytes] = field(default_factory=dict)
    held: frozenset[str] = frozenset()
    stamps: Stamps = ()
    needed: frozenset[str] | None = None
    told: Mapping[str, Told] = field(default_factory=dict)
    sealed: bool = True
    vouched: bool = False

    @property
    def identity(self) -> Identity:
        sizes = [size_bytes for _, size_bytes in self.files]
        provisional = provisional_identity(self.header_digest, sizes, self.validator)
        return Identity(self.header_digest, provisional, self.root)

    @property
    def size_bytes(self) -> int:
        return sum(size_bytes for _, size_bytes in self.files)

    @property
    def complete(self) -> bool:
        return self.root is not None and len(self.held) == self.tensor_count


def to_bytes(document: SliceDocument) -> bytes:
    """Sealed."""
    body = cbor2.dumps(
        {
            "files": [list(file) for file in document.files],
            "source": document.source,
            "validator": document.validator,
            "header": document.header_digest,
            "layout": document.layout,
            "root": bytes.fromhex(document.root) if document.root else None,
            "tensors": document.tensor_count,
            "weight_bytes": document.weight_bytes,
            "held_bytes": document.held_bytes,
            "digests": dict(document.digests),
            "held": sorted(document.held),
            "stamps": [list(stamp) for stamp in document.stamps],
            "needed": None if document.needed is None else sorted(document.needed),
            "told": {name: list(told) for name, told in document.told.items()},
            "vouched": document.vouched,
        }
    )
    return _MAGIC + blake3(body).digest() + body


def parse_untrusted(data: bytes) -> SliceDocument:
    """What `to_bytes` gave, or as much of it as a disk has left. Raises `BadDocument` alone."""
    start = len(_MAGIC) + DIGEST_BYTES
    body = data[start:]
    sealed = data[:start] == _MAGIC + blake3(body).digest()
    try:
        document = _parse(loads_untrusted(body, max_values=9 * MAX_TENSORS))
    except (BadCbor, ValueError, KeyError, TypeError) as error:
        raise BadDocument from error
    if sealed:
        return document
    # A root is worth what the digests are; they are compared with the bytes, it is not.
    return replace(
        document, sealed=False, source=None, root=None, stamps=(), told={}, vouched=False
    )


def _parse(fields: Any) -> SliceDocument:
    if not isinstance(fields, dict):
        raise ValueError("no map")
    files = tuple((_file_name(name), _count(size)) for name, size in fields["files"])
    if not 1 <= len(files) <= MAX_SHARDS or len(dict(files)) != len(files):
        raise ValueError("no files, too many, or one twice")
    digests = {_name(name): _digest(value) for name, value in _entries(fields["digests"])}
    held = [_name(name) for name in fields["held"]]
    root, needed = fields["root"], fields.get("needed")
    return SliceDocument(
        files=files,
        source=None if fields["source"] is None else _text(fields["source"]),
        validator=_text(fields["validator"]),
        header_digest=_digest(fields["header"]),
        layout=_digest(fields["layout"]),
        root=None if root is None else _digest(root).hex(),
        tensor_count=_count(fields["tensors"]),
        weight_bytes=_count(fields["weight_bytes"]),
        held_bytes=_count(fields["held_bytes"]),
        digests=digests,
        held=frozenset(name for name in held if name in digests),
        stamps=tuple((_count(mtime), _count(inode)) for mtime, inode in fields["stamps"]),
        told={_name(name): _told(*row) for name, row in _entries(fields.get("told", {}))},
        needed=None if needed is None else frozenset(_name(name) for name in needed),
        vouched=fields.get("vouched") is True,
    )


def _told(digest: Any, who: Any) -> Told:
    return _digest(digest), _text(who, MAX_TELLER_CHARS)


def _entries(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError("no map")
    return value.items()


def _file_name(value: Any) -> str:
    name = _text(value, MAX_FILE_NAME_BYTES)
    if not is_file_name(name):
        raise ValueError("a name that leads out of the folder")
    return name


def is_file_name(name: str) -> bool:
    """Whether it names a file in a folder, and nothing beyond or hidden."""
    return bool(
        0 < len(name.encode(errors="replace")) <= MAX_FILE_NAME_BYTES
        and name.isprintable()
        and "/" not in name
        and not name.startswith(".")
    )


def _name(value: Any) -> str:
    name = _text(value, MAX_NAME_BYTES)
    if not name or not name.isprintable():
        raise ValueError("a name no tensor has")
    return name


def _text(value: Any, most: int = MAX_TEXT_CHARS) -> str:
    if not isinstance(value, str) or len(value) > most:
        raise ValueError("a bad text")
    return value


def _digest(value: Any) -> bytes:
    if not isinstance(value, bytes) or len(value) != DIGEST_BYTES:
        raise ValueError("a bad digest")
    return value


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MAX_BYTES:
        raise ValueError("a bad number")
    return value
