"""What tells a slice from a model that is all there: `slice.cbor` beside its files.

A slice's files are as long as the model's, with holes where weights are missing; read without a
thought they are a model of zeros. So whoever reads weights asks here first. Where the document has
been lost, or a file was moved away from it, the holes themselves are still seen (`hole_in`).
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from meshnode.errors import ModelError

SLICE_DOCUMENT = "slice.cbor"
SMALLEST_TOLD_BYTES = 1 << 20
"""A tensor this large is never all zeros, so one without a block on the disk was never written. A
smaller one can be (a bias), and file systems that compress keep zeros as holes."""

_BLOCK_BYTES = 1 << 16  # as large as any file system's


class IsASlice(ModelError):
    """Only a part of the model is here, where the whole is needed."""


def is_slice(path: Path) -> bool:
    """Whether the file is one of a slice's. True as well where its document is damaged."""
    return slice_folder(path) is not None


def slice_folder(path: Path) -> Path | None:
    """Of the slice that the file is one of, also where a link from elsewhere leads to it."""
    for folder in (path.parent, Path(os.path.realpath(path)).parent):
        if os.path.lexists(folder / SLICE_DOCUMENT):
            return folder
    return None


def hole_in(descriptor: int, start: int, stop: int) -> bool:
    """Whether nothing of these bytes is on the disk, but for blocks that they share with what lies
    before and after them. False where the system cannot tell."""
    start, stop = -(-start // _BLOCK_BYTES) * _BLOCK_BYTES, stop // _BLOCK_BYTES * _BLOCK_BYTES
    if stop - start < SMALLEST_TOLD_BYTES:
        return False
    try:
        return os.lseek(descriptor, start, os.SEEK_DATA) >= stop
    except OSError as error:
        return error.errno == errno.ENXIO  # no data from there to the end
