"""How large the headers of all files of one model may be together, and what is kept of them.

Each file's header alone may be large, and a model may have a thousand files: without a bound on all
of them a stranger's model would take whatever memory there is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from meshnode.models.header import (
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    DamagedGguf,
    Header,
    Value,
    read_header,
)

MAX_FETCHED_HEADER_BYTES = 64 * 2**20
"""Of a model that lies elsewhere: its header is in memory as a whole before anything of it is here.
A vocabulary of a million takes as much, and the largest that models have a quarter of it."""
USUAL_HEADER_BYTES = 16 * 2**20
"""What most stay below; of models with more than that few are begun at a time."""
_OF_FURTHER_FILES = ("split.count", "split.no", "split.tensors.count", "general.alignment")
"""All that is read of the metadata of files after the first."""


class HeaderBounds:
    """I admit the headers of one model's files, in order."""

    def __init__(self, most_bytes: int = MAX_HEADER_BYTES) -> None:
        self.left_bytes = most_bytes
        self._left_tensors = MAX_TENSORS
        self._is_first = True

    def admit(self, header: Header) -> Header:
        """It, less what nobody needs of it. Raises `DamagedGguf`."""
        self.left_bytes -= min(header.data_start, header.size_bytes)
        self._left_tensors -= len(header.tensors)
        if self.left_bytes < 0 or self._left_tensors < 0:
            raise too_large(header.path)
        if self._is_first:
            self._is_first = False
            return header
        kept: dict[str, Value] = {
            key: value
            for key in _OF_FURTHER_FILES
            if isinstance(value := header.metadata.get(key), int)
        }
        return replace(header, metadata=kept)


class HeadersTooLarge(DamagedGguf):
    """A model's headers together are larger than is let in."""


def too_large(path: Path) -> HeadersTooLarge:
    return HeadersTooLarge(
        f"{path}: with it the headers of the model's files are larger than any model's, or tell of "
        "more tensors; take the model from elsewhere"
    )


def read_headers(paths: Iterable[Path]) -> list[Header]:
    """Of all files of a model that are here. Blocks. Raises as `read_header` does."""
    bounds = HeaderBounds()
    return [bounds.admit(read_header(path)) for path in paths]
