"""GGUF files byte by byte: the layout is in `meshnode/models/header.py`."""

from __future__ import annotations

import struct
from pathlib import Path

U32, U64 = struct.Struct("<I"), struct.Struct("<Q")


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return U64.pack(len(raw)) + raw


def string_pair(key: str, value: str) -> bytes:
    return text(key) + U32.pack(8) + text(value)


def number_pair(key: str, value: int) -> bytes:
    return text(key) + U32.pack(4) + U32.pack(value)


def signed_pair(key: str, value: int) -> bytes:
    return text(key) + U32.pack(5) + struct.pack("<i", value)


def float_pair(key: str, value: float) -> bytes:
    return text(key) + U32.pack(6) + struct.pack("<f", value)


def tensor(name: str | bytes, ne: list[int], *, type: int = 0, offset: int = 0) -> bytes:
    return (
        text(name)
        + U32.pack(len(ne))
        + b"".join(U64.pack(n) for n in ne)
        + U32.pack(type)
        + U64.pack(offset)
    )


PAIRS = (
    string_pair("general.architecture", "llama"),
    number_pair("llama.block_count", 1),
    number_pair("llama.embedding_length", 4),
    number_pair("llama.attention.head_count", 2),
)


GEMMA, MAMBA = (
    (
        number_pair(f"{arch}.block_count", 1),
        number_pair(f"{arch}.embedding_length", 4),
        number_pair(f"{arch}.attention.head_count", 2),
    )
    for arch in ("gemma3", "mamba")
)


def gguf_bytes(
    pairs: tuple[bytes, ...] = PAIRS,
    tensors: tuple[bytes, ...] = (),
    *,
    version: int = 3,
    data: bytes = bytes(64),
    counts: tuple[int, int] | None = None,
) -> bytes:
    tensor_count, pair_count = counts or (len(tensors), len(pairs))
    head = b"GGUF" + U32.pack(version) + U64.pack(tensor_count) + U64.pack(pair_count)
    head += b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


def written(folder: Path, content: bytes, name: str = "m.gguf") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path
