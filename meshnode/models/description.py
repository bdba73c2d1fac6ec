"""What is told of a model: by `mesh models info --json`, and by the registry API."""

from __future__ import annotations

from collections import Counter
from typing import Any

from meshnode.config import DEFAULT_CTX_TOKENS
from meshnode.models.classes import bytes_by_kind
from meshnode.models.facts import ModelFacts
from meshnode.models.gguf_constants import GGML_QUANT_SIZES
from meshnode.models.kv import CacheOptions, memory_bytes

_TYPE_NAMES = {int(kind): str(kind.name) for kind in GGML_QUANT_SIZES}


def describe(facts: ModelFacts) -> dict[str, Any]:
    """What its headers say, ready for JSON."""
    kv_bytes = facts.kv_bytes_per_token_per_layer
    return {
        "name": facts.name,
        "architecture": facts.arch,
        "quantization": facts.quantization or None,
        "parameters": facts.n_parameters,
        "layers": facts.n_layers,
        "width": facts.n_embd,
        "feed_forward": facts.n_ff,
        "heads_kv": list(facts.n_head_kv),
        "head_width_k": facts.head_dim_k,
        "head_width_v": facts.head_dim_v,
        "experts": facts.n_expert,
        "experts_used": facts.n_expert_used,
        "vocabulary": facts.n_vocab,
        "context": facts.n_ctx_train,
        "tensors": len(facts.tensors),
        "weight_bytes": facts.weight_bytes,
        "bytes": {
            "layers": list(facts.layer_bytes),
            "embedding": facts.embedding_bytes,
            "output": facts.output_bytes - facts.tied_bytes,
            "other": facts.other_bytes,
        },
        "bytes_by_kind": {kind.value: size for kind, size in bytes_by_kind(facts).items()},
        "tied": facts.tied_bytes > 0,
        "kv_bytes_per_token": sum(kv_bytes),
        "kv_bytes_per_token_per_layer": list(kv_bytes),
        "cache_bytes_at_default_context": cache_bytes(facts),
        "chat_template": facts.chat_template is not None,
        "types": dict(bytes_by_type(facts)),
    }


def cache_bytes(facts: ModelFacts) -> int:
    """Of a conversation of the default length."""
    options = CacheOptions(ctx_tokens=DEFAULT_CTX_TOKENS)
    return sum(memory_bytes(memory, options) for memory in facts.memory)


def bytes_by_type(facts: ModelFacts) -> list[tuple[str, int]]:
    """Bytes of each tensor type, the most first."""
    sizes: Counter[str] = Counter()
    for tensor in facts.tensors:
        sizes[type_name(tensor.type)] += tensor.nbytes
    return sizes.most_common()


def type_name(number: int) -> str:
    """A tensor type as ggml calls it: `Q4_K`."""
    return _TYPE_NAMES.get(number, f"type {number}")
