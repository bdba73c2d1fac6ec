"""Slices of a model: files of its full length, with holes where tensors are left out."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf

from meshnode.models.presence import engine_presence
from tests.engine.manifests import write_manifest


@dataclass(frozen=True)
class Slice:
    """A model's files in a folder of their own, each with the tensors it holds."""

    files: dict[Path, frozenset[str]]
    left_out: frozenset[str]

    @property
    def model(self) -> Path:
        return next(iter(self.files))

    def presence(self, path: Path) -> Path:
        path.write_text(engine_presence(self.files))
        return path

    def manifest(self, path: Path) -> Path:
        """As a worker is given it: what it holds, and nothing else."""
        return write_manifest(path, list(self.files), without=self.left_out)


def write_slice(folder: Path, whole: Sequence[Path], holds: Callable[[str], bool]) -> Slice:
    """Of the model in the files `whole`, the tensors whose names `holds` says yes to."""
    folder.mkdir()
    files: dict[Path, frozenset[str]] = {}
    left_out: set[str] = set()
    for file in whole:
        tensors = gguf.GGUFReader(file).tensors
        held = {tensor.name for tensor in tensors if holds(tensor.name)}
        left_out |= {tensor.name for tensor in tensors} - held
        spans = [
            (int(tensor.data_offset), int(tensor.n_bytes))
            for tensor in tensors
            if tensor.name in held
        ]
        header_bytes = min(int(tensor.data_offset) for tensor in tensors)
        copy = folder / file.name
        _copy_spans(file, copy, [(0, header_bytes), *spans])
        files[copy] = frozenset(held)
    return Slice(files, frozenset(left_out))


def _copy_spans(source: Path, copy: Path, spans: Collection[tuple[int, int]]) -> None:
    with source.open("rb") as whole, copy.open("wb") as sparse:
        sparse.truncate(source.stat().st_size)
        for offset, size in spans:
            whole.seek(offset)
            sparse.seek(offset)
            sparse.write(whole.read(size))
        os.fsync(sparse.fileno())


def of_layers(*layers: int, also: Collection[str] = ()) -> Callable[[str], bool]:
    """The tensors of these layers, and those named."""
    prefixes = tuple(f"blk.{layer}." for layer in layers)
    return lambda name: name.startswith(prefixes) or name in also
