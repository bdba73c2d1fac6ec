"""How much memory each piece of a model takes, from its facts. Sans-IO.

A model is a row of items: its layers, and after them the output as one item more, which is how
llama.cpp counts for `-ngl` and `--tensor-split`. Weights and KV cache are exact (the cache an upper
bound for windowed layers). Compute buffers follow what the pinned llama.cpp reserves for models of
the llama kind, dense and mixture, 256 to 4096 wide, with contexts of 512 to 16384 tokens: the
larger of the attention's and the feed-forward's intermediates, and the mask;
`tests/engine/test_placement.py` holds the estimate against the engine's own figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from meshnode.errors import UsageError

if TYPE_CHECKING:
    from meshnode.models.facts import ModelFacts

UBATCH_TOKENS = 512  # llama.cpp's default --ubatch-size
KV_CELL_MULTIPLE = 256
"""llama.cpp rounds the cells of a cache up to this (llama-context.cpp, GGML_PAD)."""
MIN_OUTPUT_TOKENS = 16
SCRATCH_BYTES = 2 * 2**20
"""A device's graph inputs, small tensors and alignment."""
_FLOAT_BYTES = 4
_MASK_BYTES = 2

KV_TYPE_BYTES = {
    "f32": 4.0,
    "f16": 2.0,
    "bf16": 2.0,
    "q8_0": 34 / 32,
    "q5_1": 24 / 32,
    "q5_0": 22 / 32,
    "q4_1": 20 / 32,
    "q4_0": 18 / 32,
    "iq4_nl": 18 / 32,
}
"""Bytes an element of the KV cache, by the names of `--cache-type-k`."""


@dataclass(frozen=True)
class PlanModel:
    """What a plan must know of a model (`ModelFacts` has the meanings).

    `tied_bytes`: the part of `output_bytes` that the embedding shares when both lie on one CPU.
    `n_nextn`: of the last layers, those that run with the output only, and lie where it does.
    """

    name: str
    layer_bytes: tuple[int, ...]
    embedding_bytes: int
    output_bytes: int
    other_bytes: int
    kv_bytes_per_token_per_layer: tuple[int, ...]
    n_embd: int
    n_attn: int
    n_ff: int
    n_vocab: int
    tied_bytes: int = 0
    n_nextn: int = 0

    @property
    def n_layers(self) -> int:
        return len(self.layer_bytes)


def plan_model(facts: ModelFacts) -> PlanModel:
    """The part of a model's facts that a plan rests on."""
    return PlanModel(
        name=facts.name,
        layer_bytes=facts.layer_bytes,
        embedding_bytes=facts.embedding_bytes,
        output_bytes=facts.output_bytes,
        other_bytes=facts.other_bytes,
        kv_bytes_per_token_per_layer=facts.kv_bytes_per_token_per_layer,
        n_embd=facts.n_embd,
        n_attn=facts.n_attn,
        n_ff=facts.n_ff,
        n_vocab=facts.n_vocab,
        tied_bytes=facts.tied_bytes,
        n_nextn=facts.n_nextn,
    )


@dataclass(frozen=True)
class ItemCost:
    """One layer, or the output (which has no cache)."""

    weight_bytes: int
    kv_bytes: int
    compute_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.compute_bytes


@dataclass(frozen=True)
class Costs:
    """A model's memory for one context size.

    `items`: each layer, then the output. `device_compute_bytes`: once on every device that has any
    item. `host_*`: on the orchestrator's CPU, wherever the layers are.
    """

    items: tuple[ItemCost, ...]
    device_compute_bytes: int
    host_weight_bytes: int
    host_kv_bytes: int
    host_compute_bytes: int

    @property
    def host_bytes(self) -> int:
        return self.host_weight_bytes + self.host_kv_bytes + self.host_compute_bytes


def costs_of(
    model: PlanModel,
    *,
    ctx_tokens: int,
    slots: int,
    kv_type: str,
    output_shared: bool = False,
    output_at_home: bool = False,
) -> Costs:
    """`ctx_tokens` is what all slots share. `output_shared`: the output lies where the embedding
    does, so that a tied one is there once. `output_at_home`: it does so whatever place its item is
    given, which then costs nothing there. Raises `UsageError` for an unknown `kv_type`."""
    if kv_type not in KV_TYPE_BYTES:
        names = ", ".join(KV_TYPE_BYTES)
        raise UsageError(f"{kv_type!r} is no type for the KV cache: take one of {names}")
    cells = slots * _padded(-(-ctx_tokens // slots))
    kv_scale = KV_TYPE_BYTES[kv_type] / KV_TYPE_BYTES["f16"]
    batch = min(UBATCH_TOKENS, cells)
    layers = [
        ItemCost(weight_bytes, int(cells * kv_bytes * kv_scale), 0)
        for weight_bytes, kv_bytes in zip(
            model.layer_bytes, model.kv_bytes_per_token_per_layer, strict=True
        )
    ]
    # Only tokens whose logits are asked for reach the output: one a slot, a few when drafting.
    logits_bytes = max(slots, MIN_OUTPUT_TOKENS) * model.n_vocab * _FLOAT_BYTES
    shares_embedding = output_shared or output_at_home
    output = ItemCost(
        model.output_bytes - (model.tied_bytes if shares_embedding else 0), 0, logits_bytes
    )
    items = [*layers, output]
    n_at_home = model.n_nextn + 1 if output_at_home else 0
    cut = len(items) - n_at_home
    at_home = items[cut:]
    items[cut:] = [ItemCost(0, 0, 0)] * n_at_home
    width = max(model.n_embd, model.n_attn)
    widest = max(5 * width, 2 * width + 3 * model.n_ff)
    mask_bytes = batch * cells * _MASK_BYTES
    return Costs(
        items=tuple(items),
        device_compute_bytes=SCRATCH_BYTES + mask_bytes + batch * widest * _FLOAT_BYTES,
        host_weight_bytes=model.embedding_bytes
        + model.other_bytes
        + sum(item.weight_bytes for item in at_home),
        host_kv_bytes=sum(item.kv_bytes for item in at_home),
        host_compute_bytes=SCRATCH_BYTES
        + batch * 2 * model.n_embd * _FLOAT_BYTES
        + logits_bytes
        + sum(item.compute_bytes for item in at_home),
    )


def _padded(tokens: int) -> int:
    return -(-tokens // KV_CELL_MULTIPLE) * KV_CELL_MULTIPLE
