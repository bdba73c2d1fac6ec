"""Which model some bytes belong to, also before anybody has read all of them.

The root (`meshnode.models.manifest`) is the model's name for good, and needs a digest of every
tensor. Where nobody has the whole file yet, a provisional identity stands in: what the header says,
how long the files are, and what the source says of the bytes. Two pulls of one file have the same;
after a file was replaced at its source it is another one.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from blake3 import blake3

_CONTEXT = "mesh provisional identity 1"


@dataclass(frozen=True)
class Identity:
    """`provisional` and `root` are 64 hex digits; `root` is None until every digest is known."""

    header_digest: bytes
    provisional: str
    root: str | None = None

    def __str__(self) -> str:
        return self.root or self.provisional

    def is_named(self, text: str) -> bool:
        """Whether `text` is one of its names, case ignored."""
        return text.casefold() in (self.root, self.provisional)


def provisional_identity(header_digest: bytes, sizes: Sequence[int], validator: str) -> str:
    """`sizes`: bytes of each file, in order. `validator`: `sha256:…`, `etag:…` or `modified:…`."""
    digest = blake3(header_digest, derive_key_context=_CONTEXT)
    digest.update(struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes))
    digest.update(validator.encode())
    return digest.hexdigest()
