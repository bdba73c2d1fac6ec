"""How much memory each piece of a model takes, from its facts. Sans-IO.

A model is a row of items: its layers, and after them the output as one item more, which is how
llama.cpp counts for `-ngl` and `--tensor-split`. Weights and caches are exact. Compute buffers
follow what the pinned llama.cpp reserves for models of the llama kind, dense and mixture, 256 to
4096 wide, with contexts of 512 to 16384 tokens: the larger of the attention's and the
feed-forward's intermediates, the mask, and what other architectures take besides;
`tests/engine/test_placement.py` holds the estimate against the engine's own figures,
`tests/engine/test_layer_memory.py` the caches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from meshnode.models.intermediates import NO_INTERMEDIATES, Intermediates
from meshnode.models.kv import (
    ROLLBACK_TOKENS,
    CacheOptions,
    LayerMemory,
    latent_bytes,
    memory_bytes,
    window_cells,
)
from meshnode.pipeline.cache_options import known_cache_type

if TYPE_CHECKING:
    from meshnode.models.facts import ModelFacts

MIN_OUTPUT_TOKENS = 16
SCRATCH_BYTES = 2 * 2**20
"""A device's graph inputs, small tensors and alignment."""
_FLOAT_BYTES = 4
_MASK_BYTES = 2
_STATE_COPIES = 2


@dataclass(frozen=True)
class PlanModel:
    """What a plan must know of a model (`ModelFacts` has the meanings).

    `tied_bytes`: the part of `output_bytes` that the embedding shares when both lie on one CPU.
    `n_nextn`: of the last layers, those that run with the output only, and lie where it does.
    `read_bytes`: of each layer, what one token reads of it: of experts those that it uses.
    `memory`: what each layer keeps of conversations. `intermediates`: what computing takes besides
    the widths.
    """

    name: str
    layer_bytes: tuple[int, ...]
    embedding_bytes: int
    output_bytes: int
    other_bytes: int
    memory: tuple[LayerMemory, ...]
    n_embd: int
    n_attn: int
    n_ff: int
    n_vocab: int
    tied_bytes: int = 0
    n_nextn: int = 0
    read_bytes: tuple[int, ...] = ()
    intermediates: Intermediates = NO_INTERMEDIATES

    @property
    def n_layers(self) -> int:
        return len(self.layer_bytes)

    @property
    def kv_bytes_per_token_per_layer(self) -> tuple[int, ...]:
        """At f16, of a conversation without end: windows and states do not grow with it."""
        return tuple(memory.bytes_per_token for memory in self.memory)


def plan_model(facts: ModelFacts) -> PlanModel:
    """The part of a model's facts that a plan rests on."""
    return PlanModel(
        name=facts.name,
        layer_bytes=facts.layer_bytes,
        embedding_bytes=facts.embedding_bytes,
        output_bytes=facts.output_bytes,
        other_bytes=facts.other_bytes,
        memory=facts.memory,
        n_embd=facts.n_embd,
        n_attn=facts.n_attn,
        n_ff=facts.n_ff,
        n_vocab=facts.n_vocab,
        tied_bytes=facts.tied_bytes,
        n_nextn=facts.n_nextn,
        read_bytes=facts.read_bytes,
        intermediates=facts.intermediates,
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
    kv_type: str = "f16",
    cache: CacheOptions | None = None,
    output_shared: bool = False,
    output_at_home: bool = False,
) -> Costs:
    """`ctx_tokens` is what all slots share. `cache` stands for `ctx_tokens`, `slots` and `kv_type`
    where llama-server is told more of caches than these. `output_shared`: the output lies where the
    embedding does, so that a tied one is there once. `output_at_home`: it does so whatever place
    its item is given, which then costs nothing there. Raises `UsageError` for an unknown
    `kv_type`."""
    options = cache or CacheOptions(
        ctx_tokens, slots, known_cache_type(kv_type), known_cache_type(kv_type)
    )
    options = _as_the_model_allows(options, model)
    cells = options.sequence_cells * (1 if options.unified else slots)
    batch = min(options.ubatch_tokens, cells)
    kept = {memory: memory_bytes(memory, options) for memory in set(model.memory)}
    layers = [
        ItemCost(weight_bytes, kept[memory], 0)
        for weight_bytes, memory in zip(model.layer_bytes, model.memory, strict=True)
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
    return Costs(
        items=tuple(items),
        device_compute_bytes=SCRATCH_BYTES + _working_bytes(model, options, batch),
        host_weight_bytes=model.embedding_bytes
        + model.other_bytes
        + sum(item.weight_bytes for item in at_home),
        host_kv_bytes=sum(item.kv_bytes for item in at_home),
        host_compute_bytes=SCRATCH_BYTES
        + batch * 2 * model.n_embd * _FLOAT_BYTES
        + logits_bytes
        + sum(item.compute_bytes for item in at_home),
    )


def _as_the_model_allows(options: CacheOptions, model: PlanModel) -> CacheOptions:
    if model.n_nextn:  # whether it guesses ahead is decided when the plan is there
        rollback = max(options.rollback_tokens, ROLLBACK_TOKENS)
        options = replace(options, guessing=True, rollback_tokens=rollback)
    flash_attention = options.flash_attention and model.intermediates.flash_attention
    return replace(options, flash_attention=flash_attention)


def _working_bytes(model: PlanModel, options: CacheOptions, batch: int) -> int:
    """Of the layer that takes the most: a batch's vectors, its mask, scores, copies of states."""
    found, kinds = model.intermediates, set(model.memory)
    width = max(model.n_embd, model.n_attn)
    widest = max(5 * width, 2 * width + 3 * model.n_ff, found.recurrent_width) + found.index_width
    window = max((window_cells(memory, options) for memory in kinds), default=0)
    mask_bytes = (options.sequence_cells + window) * _MASK_BYTES
    score_bytes = options.sequence_cells * found.score_bytes
    if not options.flash_attention:  # all scores at once, and the mask in float32
        mask_bytes *= 2
        score_bytes += options.sequence_cells * found.n_head * _FLOAT_BYTES
    state_bytes = max((memory.state_bytes for memory in kinds), default=0)
    kept_bytes = _STATE_COPIES * options.slots * state_bytes
    if not options.flash_attention:  # latent vectors are turned around to serve as values
        kept_bytes += max((latent_bytes(memory, options) for memory in kinds), default=0)
    return batch * (widest * _FLOAT_BYTES + mask_bytes + score_bytes) + kept_bytes
