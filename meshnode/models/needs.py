"""Which tensors of a model each node of a plan must have on its disk. Sans-IO.

The engine loads a tensor where its class says (`LLM_TENSOR_INFOS` in llama-arch.cpp; how a class
becomes a device: `load_tensors` in llama-model.cpp):

- of a layer (`blk.N.`, and `enc.blk.N.`, `dec.blk.N.`): with that layer. Layers that predict
  further tokens (NextN), the last ones, go wherever the output computes when that stays at home;
- of all layers together, stored once (`rope_freqs`, `rope_factors_*`): wherever there is a layer;
- before the first layer, but computed with it (`token_embd_norm`, `per_layer_model_proj`, …): with
  layer 0. In the models of LFM2 `token_embd_norm` is the output's norm, by an old slip of theirs;
- of the output: where it computes. A tied output is the embedding, needed there once more, but not
  for encoders, which have none, nor for BitNet, which computes with the one that it has;
- of the input (the embedding), and what is none of these: on the orchestrator, always.

A device that cannot compute with a tensor as it is stored leaves it to the orchestrator's CPU
(`select_weight_buft`). That shows only when the engine loads, so it is not in here: the
orchestrator then lacks the tensor and the engine names it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meshnode.models.facts import ModelFacts
    from meshnode.pipeline.plan import Share

EMBEDDING = "token_embd.weight"
OUTPUT = "output.weight"
_LAYER = re.compile(r"(?:enc\.|dec\.)?blk\.(\d{1,4})\.")
_EVERY_LAYER = ("rope_freqs", "rope_factors_")
_FIRST_LAYER = (
    "token_embd_norm",
    "per_layer_model_proj",
    "per_layer_proj_norm",
    "hrm.",
    "nextn.pre_projection",
)
_OUTPUT = (
    "output",
    "cls",
    "dense_",
    "altup_",
    "dec.output_norm",
    "enc.output_norm",
    "nextn.post_projection",
    "fc.",
    "d2t",
    "markov_",
    "conf_proj",
    "selector_",
)
_OUTPUT_NORM_LIKE_LFM2 = ("lfm2", "lfm2moe")


class TensorClass(Enum):
    """Where the engine puts a tensor that belongs to no layer of its own."""

    INPUT = auto()
    FIRST_LAYER = auto()
    EVERY_LAYER = auto()
    OUTPUT = auto()


def layer_of(name: str) -> int | None:
    """The layer that a tensor belongs to by its name, if to one."""
    found = _LAYER.match(name)
    return int(found[1]) if found else None


def kind_of(name: str) -> str:
    """What a tensor is in its layer: `attn_q.weight` of each `blk.N.attn_q.weight`."""
    return _LAYER.sub("blk.", name, count=1)


def classify(name: str, arch: str) -> TensorClass:
    """The class of a tensor that is no layer's."""
    if name.startswith("token_embd_norm") and arch in _OUTPUT_NORM_LIKE_LFM2:
        return TensorClass.OUTPUT
    if name.startswith(_FIRST_LAYER):
        return TensorClass.FIRST_LAYER
    if name.startswith(_EVERY_LAYER):
        return TensorClass.EVERY_LAYER
    return TensorClass.OUTPUT if name.startswith(_OUTPUT) else TensorClass.INPUT


@dataclass(frozen=True)
class _Model:
    """What decides beside a tensor's name: `home_layers` go with the output where that is home."""

    arch: str
    is_tied: bool
    has_embedding: bool
    home_layers: range


def needed_tensors(facts: ModelFacts, shares: Sequence[Share]) -> dict[str, tuple[str, ...]]:
    """By node, the names of the tensors that it must have, in the order of the files.

    `shares` are a plan's, the orchestrator's first. Every tensor is somebody's.
    """
    names = {tensor.name for tensor in facts.tensors}
    local = shares[0].node
    output_is_home = shares[0].has_output and shares[-1].node != local
    model = _Model(
        arch=facts.arch,
        is_tied=OUTPUT not in names and "bert" not in facts.arch and facts.arch != "bitnet",
        has_embedding=EMBEDDING in names,
        home_layers=range(facts.n_layers - facts.n_nextn, facts.n_layers)
        if output_is_home
        else range(0),
    )
    by_node: dict[str, list[Share]] = {}
    for share in shares:
        by_node.setdefault(share.node, []).append(share)
    return {
        node: tuple(
            tensor.name
            for tensor in facts.tensors
            if any(_is_needed(tensor.name, share, model) for share in held)
            or (node == local and _is_local(tensor.name, model))
        )
        for node, held in by_node.items()
    }


def _is_local(name: str, model: _Model) -> bool:
    if not model.has_embedding and name == OUTPUT:  # CodeShell: one matrix, called the output
        return True
    return layer_of(name) is None and classify(name, model.arch) is TensorClass.INPUT


def _is_needed(name: str, share: Share, model: _Model) -> bool:
    layer = layer_of(name)
    if layer is not None:
        if layer in model.home_layers:
            return share.has_output
        return share.first_layer <= layer < share.last_layer
    kind = classify(name, model.arch)
    if kind is TensorClass.OUTPUT or (model.is_tied and name == EMBEDDING):
        return share.has_output
    if kind is TensorClass.FIRST_LAYER:
        return share.first_layer == 0 < share.last_layer
    return kind is TensorClass.EVERY_LAYER and _has_a_layer(share, model)


def _has_a_layer(share: Share, model: _Model) -> bool:
    """Whether any of its layers computes there; those that follow the output to its device do."""
    own = range(share.first_layer, share.last_layer)
    left = len(own) - len(set(own) & set(model.home_layers))
    return left > 0 or (share.has_output and bool(model.home_layers))
