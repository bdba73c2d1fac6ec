"""What the engine is told of a model's files: whose weights they are, and which of them a slice
holds; the rest of its file is holes, never weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from meshnode.errors import ModelError


def engine_presence(slices: Mapping[Path, Collection[str]]) -> str:
    """The text for GGML_RPC_MESH_PRESENCE: of each file, the names of the tensors it holds.

    A file that is not named is whole to the engine, so name every one that may have a hole. A
    path may hold bytes that are no UTF-8 (as surrogates): write the text with
    `errors="surrogateescape"`.

    Raises `ModelError` for a name the format cannot carry.
    """
    lines = [f"file\t{index}\t{path.absolute()}" for index, path in enumerate(slices)]
    held = [
        f"held\t{index}\t{name}" for index, names in enumerate(slices.values()) for name in names
    ]
    for line in (*lines, *held):
        if "\n" in line:
            raise ModelError(f"{line.split(chr(9), 2)[2]!r} has a line break in its name")
    return "\n".join(("mesh-presence\t1", *lines, *held, f"end\t{len(held)}")) + "\n"


def engine_roots(root: str, paths: Sequence[str]) -> str:
    """The text for GGML_RPC_MESH_ROOTS: these files are the model of that root. Write it as the
    other. Raises `ModelError` for a name the format cannot carry."""
    for path in paths:
        if "\n" in path:
            raise ModelError(f"{path!r} has a line break in its name: rename it")
    return "".join(f"{root}\t{path}\n" for path in paths)
