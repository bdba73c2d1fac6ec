"""Which caches and states each layer of a model has: `create_memory` in src/llama-model.cpp
upstream, with what the architectures' `load_arch_hparams` read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from meshnode.models.kv import Cells, LayerMemory
from meshnode.models.metadata import Metadata
from meshnode.models.recurrence import (
    HYBRID,
    RECURRENT,
    ROLLING_BACK,
    ngram_state_bytes,
    recurrent_layers,
    state_bytes,
)
from meshnode.models.windows import windows

WITHOUT_CACHE = frozenset(
    (
        *("bert", "jina-bert-v2", "jina-bert-v3", "nomic-bert", "nomic-bert-moe", "neo-bert"),
        *("eurobert", "wavtokenizer-dec", "modern-bert", "gemma-embedding"),
        *("dream", "llada", "llada-moe", "rnd1"),
    )
)
"""Encoders, and those that write all of a text at once."""
_LATENT = frozenset(
    (
        *("deepseek2", "deepseek32", "mistral4", "glm-dsa", "dots3note", "kimi-linear", "kimi-k3"),
        *("bailingmoe3", "glm5-next", "hy_v4"),
    )
)
"""Those that cache one latent vector for keys and values (MLA), where the file has it so."""
_ATTENDING_IN_TRUNK = frozenset(
    (
        *("qwen3next", "qwen35", "qwen35moe", "qwen4exp", "minimax-01", "glm5-next"),
        *("deepseek32", "glm-dsa", "dots3note"),
    )
)
_ATTENDING_EVERYWHERE = frozenset(("minimax-m3", "hy_v4"))
_KV_LAYERS_OF_GEMMA3N = 20
_MAX_LOOPS = 512  # LLAMA_MAX_LAYERS
_FLOAT_BYTES = 4
# DeepSeek-V4: tokens that a cell of its compressed caches stands for.
_SELECTED_RATIO, _HEAVY_RATIO = 4, 128


@dataclass(frozen=True)
class Heads:
    """Attention's shape: `n_head` and `n_head_kv` of each layer, the width of one head. Those of
    layers with a window may differ (`_swa`)."""

    n_head: tuple[int, ...]
    n_head_kv: tuple[int, ...]
    k: int
    v: int
    k_swa: int
    v_swa: int


def read_heads(metadata: Metadata, n_layers: int, n_embd: int) -> Heads:
    n_head = metadata.each_layer("attention.head_count", n_layers, default=0)
    n_head_kv = n_head
    if metadata.has("attention.head_count_kv"):
        n_head_kv = metadata.each_layer("attention.head_count_kv", n_layers, default=0)
    k = v = 0
    if n_head[0] or metadata.arch == "plamo2":
        width = n_embd // max(1, n_head[0])
        k = metadata.number("attention.key_length", default=width)
        v = metadata.number("attention.value_length", default=width)
    return Heads(
        n_head=n_head,
        n_head_kv=n_head_kv,
        k=k,
        v=v,
        k_swa=metadata.number("attention.key_length_swa", default=k),
        v_swa=metadata.number("attention.value_length_swa", default=v),
    )


def layer_memory(
    metadata: Metadata, heads: Heads, *, n_embd: int, n_nextn: int, has_nextn: bool
) -> tuple[LayerMemory, ...]:
    """For each layer. `n_nextn`: of the last layers, those said to predict further tokens;
    `has_nextn`: they are there."""
    n_layers = len(heads.n_head)
    if metadata.arch in WITHOUT_CACHE:
        return (LayerMemory(),) * n_layers
    if metadata.arch == "deepseek4" and not has_nextn:
        n_nextn = 0
    layers = _Layers(metadata, heads, n_embd=n_embd, n_trunk=n_layers - n_nextn)
    found = [layers.memory(layer) for layer in range(n_layers)]
    if metadata.arch == "graniteswitch":  # an attention of one head, after the last layer
        found[-1] = replace(found[-1], caches=(*found[-1].caches, Cells(heads.k, heads.v, heads.v)))
    loops = max(1, metadata.number("num_loops", default=1, most=_MAX_LOOPS))
    if metadata.arch == "nanbeige" and loops > 1:
        found = [replace(one, caches=one.caches * loops) for one in found]
    return tuple(found)


class _Layers:
    """I know the layers of one model."""

    def __init__(self, metadata: Metadata, heads: Heads, *, n_embd: int, n_trunk: int) -> None:
        self._metadata = metadata
        self._arch = metadata.arch
        self._heads = heads
        self._n_embd = n_embd
        self._n_layers = len(heads.n_head)
        self._n_trunk = n_trunk
        self._recurrent = recurrent_layers(metadata, self._n_layers, n_trunk, heads.n_head_kv)
        self._windows = windows(metadata, self._n_layers, n_trunk, self._recurrent)
        self._is_latent = (
            self._arch in _LATENT
            and metadata.number("attention.key_length_mla", default=0) > 0
            and metadata.number("attention.value_length_mla", default=0) > 0
        )
        self._index_width = metadata.number("attention.indexer.key_length", default=0)
        self._indexed = self._indexed_layers()
        self._n_ff = metadata.each_layer("feed_forward_length", self._n_layers, default=0)
        self._ratios = metadata.numbers("attention.compress_ratios")
        self._v_widest = max(self._v_width(layer) for layer in range(self._n_layers))
        self._state_bytes = 0
        if self._arch in RECURRENT | HYBRID:
            self._state_bytes = state_bytes(metadata, n_embd, heads.n_head[0])
        self._with_ngrams = frozenset(
            metadata.numbers("ple.layers") if self._arch == "qwen4exp" else ()
        )

    def memory(self, layer: int) -> LayerMemory:
        rolls_back = self._arch in ROLLING_BACK
        guessing = (self._attention(layer),) if layer >= self._n_trunk else ()
        if self._arch == "deepseek4":
            caches = self._compressed(layer)
            return LayerMemory(caches, self._compressor_bytes(layer), rolls_back, guessing)
        caches = (self._attention(layer),) if self._attends(layer) else ()
        if self._indexed[layer]:
            caches += (self._index(layer),)
        kept_bytes = 0
        if layer < self._n_trunk and self._recurrent[layer]:
            kept_bytes = self._state_bytes
            if layer in self._with_ngrams:
                kept_bytes += ngram_state_bytes(self._metadata, self._n_embd)
        return LayerMemory(caches, kept_bytes, rolls_back, guessing)

    def _attends(self, layer: int) -> bool:
        arch = self._arch
        if arch in RECURRENT:
            return False
        if arch in _ATTENDING_IN_TRUNK:
            return layer < self._n_trunk and not self._recurrent[layer]
        if arch == "falcon-h1" or arch in _ATTENDING_EVERYWHERE:
            return True
        if arch in ("nemotron_h", "nemotron_h_moe"):
            return not self._recurrent[layer] and self._n_ff[layer] == 0
        if arch in HYBRID:
            return not self._recurrent[layer]
        if arch == "gemma3n" and layer >= _KV_LAYERS_OF_GEMMA3N:
            return False
        if arch == "gemma4":
            shared = self._metadata.number("attention.shared_kv_layers", default=0)
            if layer >= self._n_layers - shared:
                return False
        return layer < self._n_trunk or not self._n_trunk

    def _k_width(self, layer: int) -> int:
        windowed = self._windows[layer] is not None
        return (self._heads.k_swa if windowed else self._heads.k) * self._heads.n_head_kv[layer]

    def _v_width(self, layer: int) -> int:
        windowed = self._windows[layer] is not None
        return (self._heads.v_swa if windowed else self._heads.v) * self._heads.n_head_kv[layer]

    def _attention(self, layer: int) -> Cells:
        if self._is_latent:
            return Cells(self._k_width(layer), window=self._windows[layer])
        return Cells(
            self._k_width(layer), self._v_width(layer), self._v_widest, self._windows[layer]
        )

    # -- an index of keys, to choose the tokens worth attending to -----------------------------

    def _indexed_layers(self) -> tuple[bool, ...]:
        """The layers with keys of their own for choosing (`filter_lid`, `filter_idx`)."""
        layers = range(self._n_layers)
        trunk = [layer < self._n_trunk for layer in layers]
        if self._arch == "minimax-m3":
            dense = self._metadata.number("leading_dense_block_count", default=0)
            return tuple(layer >= dense for layer in layers)
        if self._arch == "deepseek32":
            return tuple(trunk)
        if self._arch == "qwen4exp" and self._index_width:
            return tuple(trunk[layer] and not self._recurrent[layer] for layer in layers)
        if self._arch == "glm5-next":
            told = self._told_indexed((True,) * self._n_layers)
            attends = [trunk[layer] and not self._recurrent[layer] for layer in layers]
            return tuple(attends[layer] and told[layer] for layer in layers)
        if self._arch == "glm-dsa":
            told = self._told_indexed(_glm_indexed(self._metadata, self._n_layers))
            return tuple(trunk[layer] and told[layer] for layer in layers)
        has_index = self._metadata.number("attention.indexer.top_k", default=0, most=1 << 32) > 0
        if self._arch == "dots3note" or (self._arch == "hy_v4" and has_index):
            told = self._told_indexed((False,) * self._n_layers)
            return tuple(trunk[layer] and told[layer] for layer in layers)
        return (False,) * self._n_layers

    def _told_indexed(self, default: tuple[bool, ...]) -> tuple[bool, ...]:
        key = "attention.indexer.types"
        told = self._metadata.flags(key, self._n_layers)
        if told is None and self._metadata.has(key):
            return (self._metadata.number(key) > 0,) * self._n_layers
        return default if told is None else told

    def _index(self, layer: int) -> Cells:
        width = self._index_width
        if self._arch == "dots3note" and self._windows[layer] is not None:
            width = self._heads.k_swa
        if self._arch == "glm5-next":
            width *= 3  # key, gate and pooled values
        if self._is_latent or self._arch in ("qwen4exp", "glm5-next"):
            return Cells(width)
        return Cells(width, self._heads.v, self._heads.v)

    # -- DeepSeek-V4 ---------------------------------------------------------------------------

    def _ratio(self, layer: int) -> int:
        return self._ratios[layer] if layer < len(self._ratios) else 0

    def _compressed(self, layer: int) -> tuple[Cells, ...]:
        """A window of latent vectors as they are, all older ones compressed."""
        width = self._k_width(layer)
        recent = Cells(width, window=self._windows[layer], per_sequence=True)
        older = Cells(width, ratio=self._ratio(layer), per_sequence=True)
        if older.ratio == _SELECTED_RATIO:
            return recent, older, replace(older, k_width=self._index_width)
        return (recent, older) if older.ratio == _HEAVY_RATIO else (recent,)

    def _compressor_bytes(self, layer: int) -> int:
        """Values and scores of the tokens that wait to be compressed."""
        if layer >= self._n_trunk:
            return 0
        head = self._heads.k_swa
        numbers = {
            _SELECTED_RATIO: 2 * _SELECTED_RATIO * 2 * (head + self._index_width),
            _HEAVY_RATIO: _HEAVY_RATIO * head,
        }
        return 2 * numbers.get(self._ratio(layer), 0) * _FLOAT_BYTES


def _glm_indexed(metadata: Metadata, n_layers: int) -> tuple[bool, ...]:
    """Where the file does not say: all of GLM 5 and 5.1, every fourth of 5.2."""
    if metadata.number("context_length", default=0, most=1 << 32) < 1 << 20:
        return (True,) * n_layers
    return tuple(layer < 2 or (layer < 78 and layer % 4 == 2) for layer in range(n_layers))
