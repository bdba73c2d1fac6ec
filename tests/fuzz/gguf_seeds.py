"""Small valid GGUF files, by hand: the layout is in `meshnode/models/header.py`."""

from __future__ import annotations

import struct

U32, F32, STRING, ARRAY, U64, BOOL = 4, 6, 8, 9, 10, 7
F32_TENSOR, Q8_0_TENSOR = 0, 8
ALIGNMENT = 32


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _pair(key: str, kind: int, value: bytes) -> bytes:
    return _string(key) + struct.pack("<I", kind) + value


def _u32(key: str, number: int) -> bytes:
    return _pair(key, U32, struct.pack("<I", number))


def gguf_file(version: int = 3, experts: int = 0) -> bytes:
    """Two layers, a vocabulary of three, weights of a few hundred bytes."""
    tokens = struct.pack("<IQ", STRING, 3) + b"".join(map(_string, ("a", "b", "c")))
    scores = struct.pack("<IQ", F32, 3) + struct.pack("<3f", 0, 1, 2)
    pairs = [
        _pair("general.architecture", STRING, _string("llama")),
        _pair("general.name", STRING, _string("tiny")),
        *(_u32("llama.block_count", 2), _u32("llama.embedding_length", 32)),
        *(_u32("llama.attention.head_count", 4), _u32("llama.context_length", 64)),
        _pair("llama.attention.head_count_kv", ARRAY, struct.pack("<IQII", U32, 2, 2, 4)),
        *(_u32("llama.expert_count", experts), _u32("general.alignment", ALIGNMENT)),
        _pair("tokenizer.ggml.tokens", ARRAY, tokens),
        _pair("tokenizer.ggml.scores", ARRAY, scores),
        _pair("llama.rope.scaling", BOOL, b"\1"),
        _pair("split.count", 2, struct.pack("<H", 1)),
    ]
    tensors = [
        ("token_embd.weight", F32_TENSOR, (32, 3), 384),
        ("blk.0.attn_q.weight", Q8_0_TENSOR, (32, 2), 68),
        ("blk.1.ffn_up.weight", F32_TENSOR, (8,), 32),
        ("output.weight", F32_TENSOR, (32, 3), 384),
    ]
    infos, offset = b"", 0
    for name, kind, sizes, nbytes in tensors:
        infos += _string(name) + struct.pack("<I", len(sizes))
        infos += struct.pack(f"<{len(sizes)}QIQ", *sizes, kind, offset)
        offset += -(-nbytes // ALIGNMENT) * ALIGNMENT
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs)) + b"".join(pairs)
    padding = bytes(-(len(head) + len(infos)) % ALIGNMENT)
    return head + infos + padding + bytes(offset)


def gguf_seeds() -> list[bytes]:
    return [gguf_file(), gguf_file(version=2, experts=4)]
