"""What a model's tensors are for, by their names (llama-arch.cpp, `LLM_TENSOR_NAMES`), and how
many of their bytes one token reads.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import TYPE_CHECKING

from meshnode.models.needs import layer_of

if TYPE_CHECKING:
    from meshnode.models.facts import ModelFacts, TensorFacts

_EXPERTS = re.compile(r"_(ch)?exps\.|\.ffn_(gate|up|down)\.\d+\.")
_ATTENTION = re.compile(r"blk\.\d+\.((dec_|cross_|vis_)?attn_|indexer)")
_RECURRENT = re.compile(r"blk\.\d+\.(ssm_|time_mix_|shortconv\.)")
_FEED_FORWARD = re.compile(r"blk\.\d+\.(ffn|channel_mix_|vis_(gate|up|down)|exp_probs_b)")
_EMBEDDING = ("token_embd", "token_types", "position_embd", "per_layer_token_embd")
_OUTPUT = ("output", "cls", "dense_")
_LOOKED_UP = re.compile(r"nextn\.embed_tokens")
"""Of these a token reads one row."""


class TensorKind(Enum):
    """What a tensor is for. Routers and biases of experts are the feed-forward part's."""

    ATTENTION = "attention"
    FEED_FORWARD = "feed-forward"
    EXPERTS = "experts"
    SHARED_EXPERTS = "shared experts"
    RECURRENT = "recurrent"
    NORMS = "norms"
    EMBEDDING = "embedding"
    OUTPUT = "output"
    OTHER = "other"


def kind_of(name: str) -> TensorKind:
    if "norm" in name:
        return TensorKind.NORMS
    if layer_of(name) is None:
        if name.startswith(_EMBEDDING):
            return TensorKind.EMBEDDING
        return TensorKind.OUTPUT if name.startswith(_OUTPUT) else TensorKind.OTHER
    if _EXPERTS.search(name):
        return TensorKind.EXPERTS
    if "_shexp" in name:
        return TensorKind.SHARED_EXPERTS
    for pattern, kind in (
        (_ATTENTION, TensorKind.ATTENTION),
        (_RECURRENT, TensorKind.RECURRENT),
        (_FEED_FORWARD, TensorKind.FEED_FORWARD),
    ):
        if pattern.search(name):
            return kind
    return TensorKind.OTHER


def bytes_by_kind(facts: ModelFacts, layer: int | None = None) -> dict[TensorKind, int]:
    """Of the whole model, or of one layer; kinds that it has none of are left out."""
    found: dict[TensorKind, int] = {}
    for tensor in facts.tensors:
        if layer is None or layer_of(tensor.name) == layer:
            kind = kind_of(tensor.name)
            found[kind] = found.get(kind, 0) + tensor.nbytes
    return found


def read_bytes(tensor: TensorFacts, n_expert: int, n_expert_used: int) -> int:
    """How many of a layer's tensor's bytes one token reads: of experts those that it uses."""
    if _LOOKED_UP.search(tensor.name):
        return tensor.nbytes // max(1, tensor.ne[1])
    if not _EXPERTS.search(tensor.name) or not n_expert:
        return tensor.nbytes
    together = max(1, n_expert)
    if "exps." in tensor.name:  # the outermost dimension counts the experts
        together = max(1, next((size for size in reversed(tensor.ne) if size > 1), 1))
    return -(-tensor.nbytes * min(n_expert_used, together) // together)
