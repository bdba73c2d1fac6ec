"""Which layers carry a state from token to token instead of a cache, and how large it is.

Both from src/llama-hparams.cpp (`n_embd_r`, `n_embd_s`) and the `load_arch_hparams` of each
architecture in src/models, upstream.
"""

from __future__ import annotations

from meshnode.models.metadata import Metadata

RWKV = frozenset(("rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"))
RECURRENT = RWKV | {"mamba", "mamba2"}
_WITHOUT_KV_HEADS = frozenset(
    (
        *("jamba", "granitehybrid", "plamo2", "lfm2", "lfm2moe", "kimi-linear", "kimi-k3"),
        *("bailingmoe3", "glm5-next"),
    )
)
"""Hybrids whose recurrent layers are those without heads for keys."""
_AT_INTERVALS = {"qwen3next": 4, "qwen35": 4, "qwen35moe": 4, "qwen4exp": 4, "minimax-01": 8}
"""Hybrids that attend in every so-manieth layer."""
_NEMOTRON = frozenset(("nemotron_h", "nemotron_h_moe"))
HYBRID = _WITHOUT_KV_HEADS | _AT_INTERVALS.keys() | _NEMOTRON | {"falcon-h1"}
ROLLING_BACK = frozenset(
    (
        *("kimi-k3", "qwen35", "qwen35moe", "qwen4exp", "deepseek4", "glm5-next", "lfm2"),
        *("lfm2moe", "bailingmoe3", *_NEMOTRON),
    )
)
"""Those whose states of the last few tokens are kept too, in case guesses were wrong."""
KDA = frozenset(("kimi-linear", "kimi-k3", "glm5-next", "bailingmoe3"))
_SHORT_CONVOLUTIONS = frozenset(("lfm2", "lfm2moe"))
_WITHOUT_GROUPS = frozenset(("mamba", "jamba"))
_FLOAT_BYTES = 4
MAX_HYPER_CONNECTIONS = 1 << 10


def recurrent_layers(
    metadata: Metadata, n_layers: int, n_trunk: int, n_head_kv: tuple[int, ...]
) -> tuple[bool, ...]:
    """For each layer whether it has a state. `n_trunk`: without those that predict further
    tokens."""
    arch = metadata.arch
    if arch in RECURRENT or arch == "falcon-h1":
        found = (True,) * n_layers
    elif arch in _WITHOUT_KV_HEADS:
        found = tuple(heads == 0 for heads in n_head_kv)
        if arch == "glm5-next":
            return found
    elif arch in _NEMOTRON:
        n_ff = metadata.each_layer("feed_forward_length", n_layers, default=0)
        found = tuple(not heads and not ff for heads, ff in zip(n_head_kv, n_ff, strict=True))
    elif arch in _AT_INTERVALS:
        told = _told_layers(metadata, n_layers)
        if told is not None:
            return told
        interval = metadata.number("full_attention_interval", default=_AT_INTERVALS[arch])
        found = tuple(bool((layer + 1) % max(1, interval)) for layer in range(n_layers))
    else:
        found = (False,) * n_layers
    return found[:n_trunk] + (False,) * (n_layers - n_trunk)


def _told_layers(metadata: Metadata, n_layers: int) -> tuple[bool, ...] | None:
    key = "attention.recurrent_layers"
    if metadata.has(key) and metadata.flags(key, n_layers) is None:
        return (bool(metadata.number(key)),) * n_layers
    return metadata.flags(key, n_layers)


def state_bytes(metadata: Metadata, n_embd: int, n_head: int) -> int:
    """The state of one sequence in one layer, float32. `n_head`: of the first layer."""
    arch = metadata.arch
    if arch in RWKV:
        head_size = metadata.number("wkv.head_size")
        rows = metadata.number("token_shift_count", default=2) + head_size
        return n_embd * rows * _FLOAT_BYTES
    if arch in _SHORT_CONVOLUTIONS:
        kept = max(0, metadata.number("shortconv.l_cache") - 1)
        return n_embd * kept * _FLOAT_BYTES
    if arch == "minimax-01":
        head = metadata.number("attention.key_length", default=n_embd // max(1, n_head))
        return head * head * n_head * _FLOAT_BYTES
    kernel = metadata.number("ssm.conv_kernel", default=0)
    if arch in KDA:
        head = metadata.number("kda.head_dim")
        convolved = 3 * (kernel - 1 if kernel else 3) * n_head * head
        return (convolved + head * head * n_head) * _FLOAT_BYTES
    inner = metadata.number("ssm.inner_size")
    state = metadata.number("ssm.state_size")
    groups = 0 if arch in _WITHOUT_GROUPS else metadata.number("ssm.group_count", default=0)
    convolved = max(0, kernel - 1) * (inner + 2 * groups * state)
    return (convolved + state * inner) * _FLOAT_BYTES


def ngram_state_bytes(metadata: Metadata, n_embd: int) -> int:
    """What Qwen4's n-gram embeddings keep besides, in the layer that has them."""
    kernel = metadata.number("ple.conv_kernel")
    streams = metadata.number("hyper_connection.count", most=MAX_HYPER_CONNECTIONS)
    ngram = metadata.number("ple.ngram_size")
    return max(0, kernel - 1) * ngram * streams * n_embd * _FLOAT_BYTES
