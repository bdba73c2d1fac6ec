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


def _array(key: str, numbers: list[int]) -> bytes:
    packed = struct.pack(f"<IQ{len(numbers)}I", U32, len(numbers), *numbers)
    return _pair(key, ARRAY, packed)


_INDEXER = {"attention.indexer.key_length": 4, "attention.indexer.top_k": 2}
_LATENT = {"attention.key_length_mla": 8, "attention.value_length_mla": 8}
_STATE = {"ssm.conv_kernel": 4, "ssm.inner_size": 8, "ssm.state_size": 4, "ssm.group_count": 1}
_SPECIAL: dict[str, dict[str, int | list[int]]] = {
    "gemma3": {"attention.sliding_window": 8, "attention.sliding_window_pattern": 2},
    "gemma4": {
        "attention.sliding_window": 8,
        "attention.sliding_window_pattern": [1, 0],
        "attention.shared_kv_layers": 1,
        "attention.key_length_swa": 4,
    },
    "qwen35moe": {
        **_STATE,
        "full_attention_interval": 2,
        "expert_count": 4,
        "expert_used_count": 2,
    },
    "jamba": {**_STATE, "attention.head_count_kv": [0, 2]},
    "rwkv6": {"wkv.head_size": 8, "token_shift_count": 2},
    "kimi-linear": {**_LATENT, "ssm.conv_kernel": 4, "kda.head_dim": 8},
    "glm-dsa": {**_LATENT, **_INDEXER, "attention.indexer.types": [1, 0]},
    "deepseek4": {
        "attention.sliding_window": 8,
        "attention.compress_ratios": [4, 128],
        **_INDEXER,
        "nextn_predict_layers": 1,
    },
    "qwen4exp": {
        **_STATE,
        **_INDEXER,
        "ple.layers": [0],
        "ple.conv_kernel": 4,
        "ple.ngram_size": 3,
        "hyper_connection.count": 4,
    },
}
"""Architectures whose layers keep something special of conversations, and what says so."""


def _special_file(arch: str) -> bytes:
    told = {"block_count": 2, "embedding_length": 32, "attention.head_count": 4} | _SPECIAL[arch]
    pairs = [_pair("general.architecture", STRING, _string(arch))]
    pairs += [
        _array(f"{arch}.{key}", value) if isinstance(value, list) else _u32(f"{arch}.{key}", value)
        for key, value in told.items()
    ]
    template = _pair("tokenizer.chat_template", STRING, _string("{{ messages }}"))
    pairs += [template, _u32("general.file_type", 15)]
    infos, offset = b"", 0
    for name in ("blk.0.ffn_up_exps.weight", "blk.1.ssm_a", "output.weight"):
        infos += _string(name) + struct.pack("<IQQIQ", 2, 8, 4, F32_TENSOR, offset)
        offset += 8 * 4 * 4
    head = b"GGUF" + struct.pack("<IQQ", 3, 3, len(pairs)) + b"".join(pairs)
    return head + infos + bytes(-(len(head) + len(infos)) % ALIGNMENT) + bytes(offset)


def gguf_seeds() -> list[bytes]:
    return [gguf_file(), gguf_file(version=2, experts=4), *map(_special_file, _SPECIAL)]
