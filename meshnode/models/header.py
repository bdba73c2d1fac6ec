"""The header of one GGUF file, read without reading the weights and without trusting a byte.

Layout (ggml/docs/gguf.md upstream; versions 2 and 3, little-endian): magic `GGUF`, u32 version,
u64 count of tensors, u64 count of key-value pairs; each pair a string key, a u32 type and a value;
each tensor a name, u32 dimensions, u64 each, u32 type, u64 offset into the data section, which
starts at the next multiple of the alignment. A string is a u64 length and UTF-8.

`gguf.GGUFReader` was measured first: 8.9 s and 550 MB for a vocabulary of 150,000 tokens, because
it makes an array of each string. This reader walks over strings it does not need, twice where the
digest is concerned, and keeps none of them.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from blake3 import blake3

from meshnode.errors import ModelError
from meshnode.models.cursor import (
    MAX_HEADER_BYTES,
    U32,
    U64,
    Cursor,
    DamagedGguf,
    FileBytes,
    HeaderIncomplete,
    NotGguf,
    Number,
    PrefixBytes,
    TruncatedGguf,
)
from meshnode.models.gguf_constants import GGML_QUANT_SIZES, GGUFValueType

__all__ = [
    "MAX_HEADER_BYTES",
    "ArrayValue",
    "DamagedGguf",
    "Header",
    "HeaderIncomplete",
    "HeaderTensor",
    "NotGguf",
    "TruncatedGguf",
    "Value",
    "parse_header",
    "read_header",
    "read_strings",
]

MAX_KEYS = 1 << 14
MAX_KEY_BYTES = 0xFFFF  # by the format
MAX_TEXT_BYTES = 1 << 20
MAX_KEPT_BYTES = 1 << 23
"""Keys and texts of a header together; a text more is as good as too long."""
MAX_ARRAY_ITEMS = 1 << 23
MAX_STRINGS = 1 << 22
"""In arrays, of a header: each is walked over, and the largest vocabularies have a million."""
MAX_DECODED_ITEMS = 1 << 12
MAX_KEPT_ITEMS = 1 << 16
"""Longer arrays (vocabularies, scores), and those beyond so many items, are only counted."""
MAX_TENSORS = 1 << 16
MAX_NAME_BYTES = 63  # GGML_MAX_NAME with its NUL
MAX_DIMENSIONS = 4
_MAX_ALIGNMENT = 1 << 20
_MAX_ELEMENTS = 2**63 - 1
_DEFAULT_ALIGNMENT = 32

T = TypeVar("T")


@dataclass(frozen=True)
class ArrayValue:
    """An array among the metadata: how long, and its items where they are few and numbers."""

    count: int
    items: tuple[Number, ...]


@dataclass(frozen=True)
class LongText:
    """A text among the metadata that is too long to be kept."""

    size_bytes: int


Value = Number | str | LongText | ArrayValue


@dataclass(frozen=True)
class HeaderTensor:
    """One tensor as the header has it: `ne` innermost first, always four; `offset` in the file."""

    name: str
    type: int
    ne: tuple[int, int, int, int]
    nbytes: int
    offset: int


@dataclass(frozen=True)
class Header:
    """What one GGUF file says of itself.

    `digest` is BLAKE3 over the metadata, keys sorted, `split.*` left out, so that it does not
    depend on how the weights are spread over files. `data_start`: where the weights begin.
    """

    path: Path
    size_bytes: int
    metadata: dict[str, Value]
    tensors: tuple[HeaderTensor, ...]
    digest: bytes
    data_start: int


def read_header(path: Path) -> Header:
    """Reads the header of `path`. Raises `NotGguf`, `TruncatedGguf`, `DamagedGguf`, or a plain
    `ModelError` where the file cannot be opened; nothing else whatever the bytes."""
    return _read(path, lambda reader: reader.read())


def parse_header(data: bytes | bytearray | memoryview, size_bytes: int, path: Path) -> Header:
    """The header of a file of `size_bytes` whose first bytes are `data`, called `path` in what is
    raised: what `read_header` does, or `HeaderIncomplete` where it takes more bytes."""
    return _Reader(path, Cursor(path, size_bytes, PrefixBytes(path, data)), size_bytes).read()


def read_strings(path: Path, key: str) -> tuple[Header, tuple[bytes, ...]]:
    """The header and the texts of one array in it, like a vocabulary; none where there is no such
    array. Raises as `read_header` does."""

    def both(reader: _Reader) -> tuple[Header, tuple[bytes, ...]]:
        header = reader.read()
        return header, reader.strings(key)

    return _read(path, both)


def _read(path: Path, work: Callable[[_Reader], T]) -> T:
    try:
        if not path.is_file() and path.exists():  # to open a pipe would be to wait
            raise NotGguf(f"{path} is not a file: name a .gguf file")
        with path.open("rb", buffering=0) as file:
            size_bytes = os.fstat(file.fileno()).st_size
            cursor = Cursor(path, size_bytes, FileBytes(path, file.fileno()))
            return work(_Reader(path, cursor, size_bytes))
    except FileNotFoundError as error:
        raise ModelError(f"there is no file {path}: check its name") from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error


# GGUFValueType → struct format of one little-endian scalar.
_FORMATS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
_SCALARS = {int(kind): struct.Struct("<" + letter) for kind, letter in _FORMATS.items()}
_STRING, _ARRAY = int(GGUFValueType.STRING), int(GGUFValueType.ARRAY)

# ggml type number → (elements a block, bytes a block). The `gguf` package may be older than the
# engine; what it lacks is added from ggml-common.h.
_BLOCKS: dict[int, tuple[int, int]] = {
    42: (64, 18),  # Q2_0
    **{int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()},
}


class _Reader:
    """One pass over the header, and a second over the values that its digest is made of."""

    def __init__(self, path: Path, cursor: Cursor, size_bytes: int) -> None:
        self._path = path
        self._cursor = cursor
        self._size_bytes = size_bytes
        self._spans: dict[bytes, tuple[int, int]] = {}
        self._kept_bytes = 0
        self._kept_items = 0
        self._strings = 0

    def read(self) -> Header:
        tensor_count, pair_count = self._read_counts()
        metadata: dict[str, Value] = {}
        for _ in range(pair_count):
            key = self._key()
            start = self._cursor.at
            value = self._value()
            self._spans[key] = (start, self._cursor.at)
            metadata[key.decode()] = value
        alignment = self._alignment(metadata)
        infos = [self._tensor_info() for _ in range(tensor_count)]
        data_start = -(-self._cursor.at // alignment) * alignment
        return Header(
            path=self._path,
            size_bytes=self._size_bytes,
            metadata=metadata,
            tensors=self._placed(infos, data_start, alignment),
            digest=self._digest(),
            data_start=data_start,
        )

    def strings(self, key: str) -> tuple[bytes, ...]:
        """The texts of an array whose place `read` has found and checked."""
        cursor = self._cursor
        cursor.at, end = self._spans.get(key.encode(), (0, 0))
        if not end or cursor.number(U32) != _ARRAY or cursor.number(U32) != _STRING:
            return ()
        return tuple(cursor.take(cursor.number(U64)) for _ in range(cursor.number(U64)))

    def _read_counts(self) -> tuple[int, int]:
        cursor = self._cursor
        if self._size_bytes < 4 or cursor.take(4) != b"GGUF":
            raise NotGguf(f"{self._path} is not a GGUF file: name a .gguf file")
        version = cursor.number(U32)
        if version & 0xFFFF == 0:
            raise NotGguf(f"{self._path} is big-endian, which mesh does not read: convert it")
        if version not in (2, 3):
            raise NotGguf(
                f"{self._path} is GGUF version {version}, mesh reads 2 and 3: convert the model "
                "anew or update mesh"
            )
        tensor_count, pair_count = cursor.number(U64), cursor.number(U64)
        if tensor_count > MAX_TENSORS or pair_count > MAX_KEYS:
            raise self._damaged("it announces more tensors or keys than a model can have")
        return tensor_count, pair_count

    def _key(self) -> bytes:
        size_bytes = self._cursor.number(U64)
        self._kept_bytes += size_bytes
        if size_bytes > MAX_KEY_BYTES or self._kept_bytes > MAX_KEPT_BYTES + MAX_TEXT_BYTES:
            raise self._damaged("its keys are longer than any model's")
        key = self._cursor.take(size_bytes)
        if key in self._spans:
            raise self._damaged("a key occurs twice")
        if key.decode(errors="ignore").encode() != key:
            raise self._damaged("a key is not text")
        return key

    def _value(self) -> Value:
        kind = self._cursor.number(U32)
        if kind == _STRING:
            return self._kept_text()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise self._damaged(f"a value has the unknown type {kind}")
        scalar: Number = self._cursor.scalar(_SCALARS[kind])
        return scalar

    def _kept_text(self) -> str | LongText:
        size_bytes = self._cursor.number(U64)
        if size_bytes > MAX_TEXT_BYTES or self._kept_bytes + size_bytes > MAX_KEPT_BYTES:
            self._cursor.skip(size_bytes)
            return LongText(size_bytes)
        self._kept_bytes += size_bytes
        return _text(self._cursor.take(size_bytes))

    def _array(self) -> ArrayValue:
        kind, count = self._cursor.number(U32), self._cursor.number(U64)
        if count > MAX_ARRAY_ITEMS:
            raise self._damaged(f"an array announces {count} items")
        if kind == _STRING:
            self._strings += count
            if self._strings > MAX_STRINGS:
                raise self._damaged(f"an array makes it {self._strings} strings")
            self._cursor.skip_strings(count)
            return ArrayValue(count, ())
        if kind not in _SCALARS:
            raise self._damaged(f"an array has items of the type {kind}")
        scalar = _SCALARS[kind]
        if count > MAX_DECODED_ITEMS or self._kept_items + count > MAX_KEPT_ITEMS:
            self._cursor.skip(count * scalar.size)
            return ArrayValue(count, ())
        self._kept_items += count
        data = self._cursor.take(count * scalar.size)
        return ArrayValue(count, tuple(item for (item,) in scalar.iter_unpack(data)))

    def _tensor_info(self) -> tuple[str, int, tuple[int, int, int, int], int, int]:
        """Name, type, ne, nbytes, offset into the data section."""
        cursor = self._cursor
        name = self._tensor_name()
        dimensions = cursor.number(U32)
        if dimensions > MAX_DIMENSIONS:
            raise self._damaged(f"a tensor has {dimensions} dimensions")
        sizes = [cursor.number(U64) for _ in range(dimensions)] + [1] * MAX_DIMENSIONS
        ne = (sizes[0], sizes[1], sizes[2], sizes[3])
        kind = cursor.number(U32)
        offset = cursor.number(U64)
        if kind not in _BLOCKS:
            raise NotGguf(
                f"{self._path} uses the tensor type {kind}, unknown to this mesh: update mesh"
            )
        block_elements, block_bytes = _BLOCKS[kind]
        elements = math.prod(ne)
        if elements > _MAX_ELEMENTS or ne[0] % block_elements:
            raise self._damaged("a tensor has an impossible shape")
        return name, kind, ne, elements // block_elements * block_bytes, offset

    def _tensor_name(self) -> str:
        size_bytes = self._cursor.number(U64)
        raw = self._cursor.take(size_bytes) if size_bytes <= MAX_NAME_BYTES else b""
        name = _text(raw)
        # One line of a manifest each: nothing in a name may break or forge a line.
        if not raw or not name.isprintable() or name.encode() != raw:
            raise self._damaged("a tensor's name is empty, too long or not text")
        return name

    def _placed(
        self,
        infos: list[tuple[str, int, tuple[int, int, int, int], int, int]],
        data_start: int,
        alignment: int,
    ) -> tuple[HeaderTensor, ...]:
        """The tensors at their places in the file: inside it, aligned, not over one another."""
        tensors = tuple(
            HeaderTensor(name, kind, ne, nbytes, data_start + offset)
            for name, kind, ne, nbytes, offset in infos
        )
        if len({tensor.name for tensor in tensors}) != len(tensors):
            raise self._damaged("a tensor's name occurs twice")
        free_from = data_start
        for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
            end = tensor.offset + tensor.nbytes
            if (tensor.offset - data_start) % alignment or tensor.offset < free_from:
                raise self._damaged(f"the tensor {tensor.name} lies where it cannot lie")
            if end > self._size_bytes:
                raise TruncatedGguf(
                    f"{self._path} is truncated: it has {self._size_bytes} bytes and the tensor "
                    f"{tensor.name} ends at byte {end}; copy or download it again"
                )
            free_from = end
        return tensors

    def _alignment(self, metadata: dict[str, Value]) -> int:
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if (
            not isinstance(alignment, int)
            or not 1 <= alignment <= _MAX_ALIGNMENT
            or alignment & (alignment - 1)
        ):
            raise self._damaged("its alignment is no power of two")
        return alignment

    def _digest(self) -> bytes:
        digest = blake3()
        for key in sorted(self._spans):
            if not key.startswith(b"split."):
                start, stop = self._spans[key]
                digest.update(U64.pack(len(key)) + key + U64.pack(stop - start))
                self._cursor.digest_into(digest, start, stop)
        return digest.digest()

    def _damaged(self, what: str) -> DamagedGguf:
        return DamagedGguf(f"{self._path} is damaged, {what}: copy or download the file again")


def _text(data: bytes) -> str:
    # Names and templates are shown and compared, never executed: odd bytes are kept apart rather
    # than refused, as llama.cpp does.
    return data.decode("utf-8", "backslashreplace")
