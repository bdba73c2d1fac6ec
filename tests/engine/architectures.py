"""The architectures whose answers must not change over workers: their metadata and tensors.

Each is the smallest model that has what makes its architecture special: grouped heads, windows,
experts, states instead of a cache, compressed keys. What an architecture needs is what its
`load_arch_hparams` and `load_arch_tensors` upstream (src/models) read.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.engine.blocks import (
    COMMON,
    CONTEXT_TOKENS,
    EXPERT_COUNTS,
    EXPERT_FFN,
    FFN,
    HEAD,
    HEADS,
    LAYERS,
    VOCAB,
    WIDTH,
    WINDOW,
    Architecture,
    Shape,
    Value,
    attention,
    dense,
    experts,
    gated_ffn,
    model,
    norm,
)


def llama() -> Architecture:
    layer = {**norm("attn_norm"), **attention(), **norm("ffn_norm"), **gated_ffn()}
    return Architecture("llama", COMMON, model(lambda _: layer))


def qwen3() -> Architecture:
    """Fewer heads for keys than for queries, heads wider than width / heads, norms on both."""
    head = 2 * HEAD
    layer = {
        **norm("attn_norm"),
        **attention(kv_heads=2, head=head, norms=True),
        **norm("ffn_norm"),
        **gated_ffn(),
    }
    return Architecture(
        "qwen3",
        {
            **COMMON,
            "attention.head_count_kv": 2,
            "attention.key_length": head,
            "attention.value_length": head,
            "rope.dimension_count": head,
        },
        model(lambda _: layer, tied=True),
    )


def _gemma_layer(*, norms: bool) -> dict[str, Shape]:
    return {
        **norm("attn_norm"),
        **attention(kv_heads=2, norms=norms),
        **norm("post_attention_norm"),
        **norm("ffn_norm"),
        **gated_ffn(),
        **norm("post_ffw_norm"),
    }


GEMMA: dict[str, Value] = {
    **COMMON,
    "attention.head_count_kv": 2,
    "attention.key_length": HEAD,
    "attention.value_length": HEAD,
    "attention.sliding_window": WINDOW,
}


def gemma2() -> Architecture:
    """Every other layer looks back over a window only; logits are capped; the output is tied."""
    return Architecture(
        "gemma2",
        {**GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        model(lambda _: _gemma_layer(norms=False), tied=True),
    )


def gemma3() -> Architecture:
    return Architecture(
        "gemma3",
        {**GEMMA, "attention.sliding_window_pattern": 3, "rope.freq_base_swa": 1e4},
        model(lambda _: _gemma_layer(norms=True), tied=True),
    )


def phi2() -> Architecture:
    """Attention and feed-forward side by side, biases everywhere, only a part of a head rotated."""
    layer = {
        **norm("attn_norm", bias=True),
        **attention(bias=True),
        **dense("ffn_up", FFN, WIDTH, bias=True),
        **dense("ffn_down", WIDTH, FFN, bias=True),
    }
    return Architecture(
        "phi2", {**COMMON, "rope.dimension_count": HEAD // 2}, model(lambda _: layer, bias=True)
    )


def phi3() -> Architecture:
    """Queries, keys and values in one tensor, gate and up in another; two sets of rope factors,
    stored once for all layers and duplicated."""
    layer = {
        **norm("attn_norm"),
        **dense("attn_qkv", 3 * WIDTH, WIDTH),
        **dense("attn_output", WIDTH, WIDTH),
        **norm("ffn_norm"),
        **dense("ffn_up", 2 * FFN, WIDTH),
        **dense("ffn_down", WIDTH, FFN),
    }
    tensors = model(lambda _: layer)
    tensors |= {f"rope_factors_{kind}.weight": (HEAD // 2,) for kind in ("long", "short")}
    return Architecture("phi3", {**COMMON, "rope.scaling.original_context_length": 256}, tensors)


def qwen3moe() -> Architecture:
    layer = {
        **norm("attn_norm"),
        **attention(norms=True),
        **norm("ffn_norm"),
        **experts(),
    }
    return Architecture("qwen3moe", {**COMMON, **EXPERT_COUNTS}, model(lambda _: layer))


def qwen2moe() -> Architecture:
    """One expert more, which every token goes through."""
    layer = {
        **norm("attn_norm"),
        **attention(),
        **norm("ffn_norm"),
        **experts(),
        "ffn_gate_inp_shexp.weight": (WIDTH,),
        **gated_ffn("_shexp"),
    }
    return Architecture(
        "qwen2moe",
        {**COMMON, **EXPERT_COUNTS, "expert_shared_feed_forward_length": FFN},
        model(lambda _: layer),
    )


def gpt_oss() -> Architecture:
    """Experts with biases, windows in every other layer, and sinks that take attention away."""
    layer = {
        **norm("attn_norm"),
        **attention(bias=True),
        "attn_sinks.weight": (HEADS,),
        **norm("post_attention_norm"),
        **experts(bias=True),
    }
    metadata = {**COMMON, **EXPERT_COUNTS, "attention.sliding_window": WINDOW}
    return Architecture("gpt-oss", metadata, model(lambda _: layer))


INNER = 2 * WIDTH
STATE = 16
DT_RANK = 8
CONV = 4


def _mamba_part(*, norms: bool = False) -> dict[str, Shape]:
    found = {
        **dense("ssm_in", 2 * INNER, WIDTH),
        "ssm_conv1d.weight": (INNER, CONV),
        "ssm_conv1d.bias": (INNER,),
        **dense("ssm_x", DT_RANK + 2 * STATE, INNER),
        **dense("ssm_dt", INNER, DT_RANK, bias=True),
        "ssm_a": (INNER, STATE),
        "ssm_d": (INNER,),
        **dense("ssm_out", WIDTH, INNER),
    }
    if norms:
        found |= norm("ssm_dt_norm", width=DT_RANK)
        found |= {**norm("ssm_b_norm", width=STATE), **norm("ssm_c_norm", width=STATE)}
    return found


MAMBA: dict[str, Value] = {
    **COMMON,
    "ssm.conv_kernel": CONV,
    "ssm.inner_size": INNER,
    "ssm.state_size": STATE,
    "ssm.time_step_rank": DT_RANK,
}


def mamba() -> Architecture:
    """No attention: each sequence has a state that every token changes."""
    layer = {**norm("attn_norm"), **_mamba_part()}
    metadata = {**MAMBA, "attention.head_count": 0, "feed_forward_length": 0}
    return Architecture("mamba", metadata, model(lambda _: layer, tied=True))


def mamba2() -> Architecture:
    groups, heads = 2, 8
    convolved = INNER + 2 * groups * STATE
    layer: dict[str, Shape] = {
        **norm("attn_norm"),
        **dense("ssm_in", INNER + convolved + heads, WIDTH),
        "ssm_conv1d.weight": (convolved, CONV),
        "ssm_conv1d.bias": (convolved,),
        "ssm_dt.bias": (heads,),
        "ssm_a": (heads, 1),
        "ssm_d": (heads, 1),
        "ssm_norm.weight": (groups, INNER // groups),
        **dense("ssm_out", WIDTH, INNER),
    }
    metadata = {**MAMBA, "ssm.time_step_rank": heads, "ssm.group_count": groups}
    metadata |= {"attention.head_count": 0, "feed_forward_length": 0}
    return Architecture("mamba2", metadata, model(lambda _: layer))


def jamba() -> Architecture:
    """A hybrid: states in some layers, attention in others, experts in every other."""

    def layer(index: int) -> dict[str, Shape]:
        attends = index % 3 == 1
        return {
            **norm("attn_norm"),
            **(attention(kv_heads=2) if attends else _mamba_part(norms=True)),
            **norm("ffn_norm"),
            **(experts(ffn=FFN) if index % 2 else gated_ffn()),
        }

    kv_heads = [2 if index % 3 == 1 else 0 for index in range(LAYERS)]
    metadata = {**MAMBA, **EXPERT_COUNTS, "attention.head_count_kv": kv_heads}
    return Architecture("jamba", metadata, model(layer))


def lfm2() -> Architecture:
    """A hybrid of short convolutions and attention."""

    def layer(index: int) -> dict[str, Shape]:
        found = {**norm("attn_norm"), **norm("ffn_norm"), **gated_ffn()}
        if index % 2:
            return found | attention(kv_heads=2, norms=True)
        return found | {
            "shortconv.conv.weight": (WIDTH, 3),
            **dense("shortconv.in_proj", 3 * WIDTH, WIDTH),
            **dense("shortconv.out_proj", WIDTH, WIDTH),
        }

    kv_heads = [2 * (index % 2) for index in range(LAYERS)]
    metadata = {**COMMON, "attention.head_count_kv": kv_heads, "shortconv.l_cache": 3}
    return Architecture("lfm2", metadata, model(layer, tied=True, output_norm="token_embd_norm"))


def qwen35() -> Architecture:
    """A hybrid of gated delta nets and attention that gates its own output."""
    key_heads, value_heads, state = 2, 4, 32
    keys, values = key_heads * state, value_heads * state

    def layer(index: int) -> dict[str, Shape]:
        found = {**norm("attn_norm"), **norm("post_attention_norm"), **gated_ffn()}
        if index % 2:
            attends = attention(kv_heads=2, norms=True)
            return found | attends | dense("attn_q", 2 * WIDTH, WIDTH)
        return found | {
            **dense("attn_qkv", 2 * keys + values, WIDTH),
            **dense("attn_gate", values, WIDTH),
            "ssm_conv1d.weight": (2 * keys + values, CONV),
            "ssm_dt.bias": (value_heads,),
            "ssm_a": (value_heads,),
            **dense("ssm_beta", value_heads, WIDTH),
            **dense("ssm_alpha", value_heads, WIDTH),
            **norm("ssm_norm", width=state),
            **dense("ssm_out", WIDTH, values),
        }

    metadata = {
        **MAMBA,
        "attention.head_count_kv": 2,
        "attention.key_length": HEAD,
        "attention.value_length": HEAD,
        "rope.dimension_sections": [HEAD // 8, HEAD // 8, HEAD // 4, 0],
        "full_attention_interval": 2,
        "ssm.inner_size": values,
        "ssm.state_size": state,
        "ssm.time_step_rank": value_heads,
        "ssm.group_count": key_heads,
    }
    return Architecture("qwen35", metadata, model(layer))


def deepseek2() -> Architecture:
    """Keys and values of all heads come out of one small latent vector, which alone is cached;
    the first layer is dense, the others have experts and a shared one."""
    query_rank, latent, rope, nope, value = 48, 64, 32, 32, 32
    attends: dict[str, Shape] = {
        **dense("attn_q_a", query_rank, WIDTH),
        **norm("attn_q_a_norm", width=query_rank),
        **dense("attn_q_b", HEADS * (nope + rope), query_rank),
        **dense("attn_kv_a_mqa", latent + rope, WIDTH),
        **norm("attn_kv_a_norm", width=latent),
        "attn_k_b.weight": (HEADS, latent, nope),
        "attn_v_b.weight": (HEADS, value, latent),
        **dense("attn_output", WIDTH, HEADS * value),
    }

    def layer(index: int) -> dict[str, Shape]:
        routed = {**experts(), "exp_probs_b.bias": (4,), **gated_ffn("_shexp", EXPERT_FFN)}
        ffn = gated_ffn() if index == 0 else routed
        return {**norm("attn_norm"), **attends, **norm("ffn_norm"), **ffn}

    metadata = {
        **COMMON,
        **EXPERT_COUNTS,
        "leading_dense_block_count": 1,
        "expert_shared_count": 1,
        "expert_gating_func": 2,
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": query_rank,
        "attention.kv_lora_rank": latent,
        "attention.key_length": latent + rope,
        "attention.value_length": latent,
        "attention.key_length_mla": nope + rope,
        "attention.value_length_mla": value,
        "rope.dimension_count": rope,
    }
    return Architecture("deepseek2", metadata, model(layer))


def bert() -> Architecture:
    """An encoder: every token sees every other, and a text becomes one vector."""
    layer = {
        **attention(bias=True),
        **norm("attn_output_norm", bias=True),
        **dense("ffn_up", FFN, WIDTH, bias=True),
        **dense("ffn_down", WIDTH, FFN, bias=True),
        **norm("layer_output_norm", bias=True),
    }
    tensors = dense("token_embd", VOCAB, WIDTH)
    tensors |= dense("token_types", 2, WIDTH) | dense("position_embd", CONTEXT_TOKENS, WIDTH)
    tensors |= norm("token_embd_norm", bias=True)
    for index in range(LAYERS):
        tensors |= {f"blk.{index}.{name}": shape for name, shape in layer.items()}
    metadata = {**COMMON, "attention.causal": False, "pooling_type": 1}
    return Architecture("bert", metadata, tensors)


GENERATING: dict[str, Callable[[], Architecture]] = {
    "llama": llama,
    "qwen3": qwen3,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "phi2": phi2,
    "phi3": phi3,
    "qwen3moe": qwen3moe,
    "qwen2moe": qwen2moe,
    "gpt-oss": gpt_oss,
    "mamba": mamba,
    "mamba2": mamba2,
    "jamba": jamba,
    "lfm2": lfm2,
    "qwen35": qwen35,
    "deepseek2": deepseek2,
}
