"""The header of one GGUF file, read without reading the weights and without trusting a byte.

Layout (ggml/docs/gguf.md upstream; versions 2 and 3, little-endian): magic `GGUF`, u32 version,
u64 count of tensors, u64 count of key-value pairs; each pair a string key, a u32 type and a value;
each tensor a name, u32 dimensions, u64 each, u32 type, u64 offset into the data section, which
starts at the next multiple of the alignment. A string is a u64 length and UTF-8.

`gguf.GGUFReader` was measured first: 8.9 s and 550 MB for a vocabulary of 150,000 tokens, because
it makes an array of each string. This reader walks over strings it does not need: 0.2 s and the
size of the header.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from blake3 import blake3

from meshnode.errors import ModelError
from meshnode.models.gguf_constants import GGML_QUANT_SIZES, GGUFValueType

MAX_HEADER_BYTES = 256 * 1024 * 1024
MAX_ARRAY_ITEMS = 1 << 23
MAX_TENSORS = 1 << 18
MAX_DECODED_ITEMS = 1 << 14
"""Longer arrays (vocabularies, scores) are only counted."""
MAX_NAME_BYTES = 63  # GGML_MAX_NAME with its NUL
MAX_DIMENSIONS = 4
_MAX_ALIGNMENT = 1 << 20
_MAX_ELEMENTS = 2**63 - 1
_DEFAULT_ALIGNMENT = 32
_CHUNK_BYTES = 1 << 20

Scalar = int | float | bool | str
T = TypeVar("T")


@dataclass(frozen=True)
class ArrayValue:
    """An array among the metadata: how long, and its items where they are few and numbers."""

    count: int
    items: tuple[int | float | bool, ...]


Value = Scalar | ArrayValue


class NotGguf(ModelError):
    """The file is something else, or a GGUF this mesh cannot read."""


class TruncatedGguf(ModelError):
    """The file ends before what its header announces."""


class DamagedGguf(ModelError):
    """The header contradicts itself or announces what cannot be."""


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
    depend on how the weights are spread over files.
    """

    path: Path
    size_bytes: int
    metadata: dict[str, Value]
    tensors: tuple[HeaderTensor, ...]
    digest: bytes


def read_header(path: Path) -> Header:
    """Reads the header of `path`. Raises `NotGguf`, `TruncatedGguf`, `DamagedGguf`, or a plain
    `ModelError` where the file cannot be opened; nothing else whatever the bytes."""
    return _read(path, lambda reader: reader.read())


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
        with path.open("rb") as file:
            return work(_Reader(path, file))
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
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")

# ggml type number → (elements a block, bytes a block). The `gguf` package may be older than the
# engine; what it lacks is added from ggml-common.h.
_BLOCKS: dict[int, tuple[int, int]] = {
    42: (64, 18),  # Q2_0
    **{int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()},
}


class _Reader:
    """One pass over the header, which is kept in memory up to `MAX_HEADER_BYTES`."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._size_bytes = os.fstat(file.fileno()).st_size
        self._data = bytearray()
        self._at = 0
        self._spans: dict[bytes, tuple[int, int]] = {}

    def read(self) -> Header:
        tensor_count, pair_count = self._read_counts()
        metadata: dict[str, Value] = {}
        raw = self._spans
        for _ in range(pair_count):
            key = self._string_bytes()
            start = self._at
            value = self._value()
            if key in raw:
                raise self._damaged("a key occurs twice")
            raw[key] = (start, self._at)
            metadata[self._text(key)] = value
        alignment = self._alignment(metadata)
        infos = [self._tensor_info() for _ in range(tensor_count)]
        data_start = -(-self._at // alignment) * alignment
        return Header(
            path=self._path,
            size_bytes=self._size_bytes,
            metadata=metadata,
            tensors=self._placed(infos, data_start, alignment),
            digest=self._digest(raw),
        )

    def strings(self, key: str) -> tuple[bytes, ...]:
        """The texts of an array whose place `read` has found and checked."""
        self._at, end = self._spans.get(key.encode(), (0, 0))
        if not end or self._number(_U32) != _ARRAY or self._number(_U32) != _STRING:
            return ()
        return tuple(self._string_bytes() for _ in range(self._number(_U64)))

    def _read_counts(self) -> tuple[int, int]:
        if self._size_bytes < 4 or self._take(4) != b"GGUF":
            raise NotGguf(f"{self._path} is not a GGUF file: name a .gguf file")
        version = self._number(_U32)
        if version & 0xFFFF == 0:
            raise NotGguf(f"{self._path} is big-endian, which mesh does not read: convert it")
        if version not in (2, 3):
            raise NotGguf(
                f"{self._path} is GGUF version {version}, mesh reads 2 and 3: convert the model "
                "anew or update mesh"
            )
        tensor_count, pair_count = self._number(_U64), self._number(_U64)
        if tensor_count > MAX_TENSORS or pair_count > MAX_HEADER_BYTES // 13:
            raise self._damaged("it announces more tensors or keys than a model can have")
        return tensor_count, pair_count

    def _value(self) -> Value:
        kind = self._number(_U32)
        if kind == _STRING:
            return self._text(self._string_bytes())
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise self._damaged(f"a value has the unknown type {kind}")
        scalar: Scalar = self._unpack(_SCALARS[kind])
        return scalar

    def _array(self) -> ArrayValue:
        kind, count = self._number(_U32), self._number(_U64)
        if count > MAX_ARRAY_ITEMS:
            raise self._damaged(f"an array announces {count} items")
        if kind == _STRING:
            for _ in range(count):
                self._skip(self._number(_U64))
            return ArrayValue(count, ())
        if kind not in _SCALARS:
            raise self._damaged(f"an array has items of the type {kind}")
        scalar = _SCALARS[kind]
        if count > MAX_DECODED_ITEMS:
            self._skip(count * scalar.size)
            return ArrayValue(count, ())
        data = self._take(count * scalar.size)
        return ArrayValue(count, tuple(item for (item,) in scalar.iter_unpack(data)))

    def _tensor_info(self) -> tuple[str, int, tuple[int, int, int, int], int, int]:
        """Name, type, ne, nbytes, offset into the data section."""
        name = self._tensor_name()
        dimensions = self._number(_U32)
        if dimensions > MAX_DIMENSIONS:
            raise self._damaged(f"a tensor has {dimensions} dimensions")
        sizes = [self._number(_U64) for _ in range(dimensions)] + [1] * MAX_DIMENSIONS
        ne = (sizes[0], sizes[1], sizes[2], sizes[3])
        kind = self._number(_U32)
        offset = self._number(_U64)
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
        raw = self._string_bytes()
        name = self._text(raw)
        # One line of a manifest each: nothing in a name may break or forge a line.
        if not 0 < len(raw) <= MAX_NAME_BYTES or not name.isprintable() or name.encode() != raw:
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

    def _digest(self, raw: dict[bytes, tuple[int, int]]) -> bytes:
        view = memoryview(self._data)
        digest = blake3()
        for key in sorted(raw):
            if not key.startswith(b"split."):
                start, end = raw[key]
                digest.update(_U64.pack(len(key)) + key + _U64.pack(end - start))
                digest.update(view[start:end])
        return digest.digest()

    def _text(self, data: bytes) -> str:
        # Names and templates are shown and compared, never executed: odd bytes are kept apart
        # rather than refused, as llama.cpp does.
        return data.decode("utf-8", "backslashreplace")

    def _string_bytes(self) -> bytes:
        return self._take(self._number(_U64))

    def _number(self, kind: struct.Struct) -> int:
        number: int = self._unpack(kind)
        return number

    def _unpack(self, kind: struct.Struct):  # type: ignore[no-untyped-def]
        start = self._at
        self._skip(kind.size)
        return kind.unpack_from(self._data, start)[0]

    def _take(self, count: int) -> bytes:
        start = self._at
        self._skip(count)
        return bytes(self._data[start : self._at])

    def _skip(self, count: int) -> None:
        """Moves on, with everything up to there in memory."""
        end = self._at + count
        if end > len(self._data):
            self._fill(end)
        self._at = end

    def _fill(self, end: int) -> None:
        if end > self._size_bytes:
            raise TruncatedGguf(
                f"{self._path} is truncated or damaged: its header goes on past its last byte; "
                "copy or download it again"
            )
        if end > MAX_HEADER_BYTES:
            raise self._damaged("its header is larger than any model's")
        while len(self._data) < end:
            chunk = self._file.read(max(_CHUNK_BYTES, end - len(self._data)))
            if not chunk:
                raise TruncatedGguf(f"{self._path} shrank while it was read: try again")
            self._data += chunk

    def _damaged(self, what: str) -> DamagedGguf:
        return DamagedGguf(f"{self._path} is damaged, {what}: copy or download the file again")
