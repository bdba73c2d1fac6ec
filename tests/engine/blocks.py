"""What architectures are made of: the shapes of norms, attention, feed-forward parts, experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

LAYERS = 6
WIDTH = 128
HEADS = 4
HEAD = WIDTH // HEADS
FFN = 192
EXPERTS = 4
EXPERT_FFN = 96
CONTEXT_TOKENS = 512
VOCAB = 288
WINDOW = 8
"""Shorter than every prompt, so that what lies behind the window is really forgotten."""

Value = bool | int | float | str | list[int]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Architecture:
    """Metadata without the prefix of the architecture's name; shapes outermost first.

    With `tied` there is no output tensor: the engine uses the embedding a second time.
    """

    arch: str
    metadata: Mapping[str, Value]
    tensors: Mapping[str, Shape]

    @property
    def tied(self) -> bool:
        return "output.weight" not in self.tensors


COMMON: dict[str, Value] = {
    "context_length": CONTEXT_TOKENS,
    "embedding_length": WIDTH,
    "block_count": LAYERS,
    "feed_forward_length": FFN,
    "attention.head_count": HEADS,
    "attention.head_count_kv": HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.layer_norm_epsilon": 1e-5,
    "rope.dimension_count": HEAD,
    "vocab_size": VOCAB,
}
EXPERT_COUNTS: dict[str, Value] = {
    "expert_count": EXPERTS,
    "expert_used_count": 2,
    "expert_feed_forward_length": EXPERT_FFN,
}


def norm(name: str, *, bias: bool = False, width: int = WIDTH) -> dict[str, Shape]:
    found: dict[str, Shape] = {f"{name}.weight": (width,)}
    if bias:
        found[f"{name}.bias"] = (width,)
    return found


def dense(name: str, rows: int, columns: int, *, bias: bool = False) -> dict[str, Shape]:
    found: dict[str, Shape] = {f"{name}.weight": (rows, columns)}
    if bias:
        found[f"{name}.bias"] = (rows,)
    return found


def attention(
    *, kv_heads: int = HEADS, head: int = HEAD, bias: bool = False, norms: bool = False
) -> dict[str, Shape]:
    found = {
        **dense("attn_q", HEADS * head, WIDTH, bias=bias),
        **dense("attn_k", kv_heads * head, WIDTH, bias=bias),
        **dense("attn_v", kv_heads * head, WIDTH, bias=bias),
        **dense("attn_output", WIDTH, HEADS * head, bias=bias),
    }
    if norms:
        found |= {**norm("attn_q_norm", width=head), **norm("attn_k_norm", width=head)}
    return found


def gated_ffn(suffix: str = "", ffn: int = FFN) -> dict[str, Shape]:
    return {
        **dense(f"ffn_gate{suffix}", ffn, WIDTH),
        **dense(f"ffn_up{suffix}", ffn, WIDTH),
        **dense(f"ffn_down{suffix}", WIDTH, ffn),
    }


def experts(*, bias: bool = False, ffn: int = EXPERT_FFN) -> dict[str, Shape]:
    found: dict[str, Shape] = {
        **dense("ffn_gate_inp", EXPERTS, WIDTH, bias=bias),
        "ffn_gate_exps.weight": (EXPERTS, ffn, WIDTH),
        "ffn_up_exps.weight": (EXPERTS, ffn, WIDTH),
        "ffn_down_exps.weight": (EXPERTS, WIDTH, ffn),
    }
    if bias:
        found |= {
            "ffn_gate_exps.bias": (EXPERTS, ffn),
            "ffn_up_exps.bias": (EXPERTS, ffn),
            "ffn_down_exps.bias": (EXPERTS, WIDTH),
        }
    return found


def model(
    layer: Callable[[int], Mapping[str, Shape]],
    *,
    tied: bool = False,
    bias: bool = False,
    output_norm: str = "output_norm",
) -> dict[str, Shape]:
    """Embedding, layers, output, in the order in which such files are written."""
    found = dense("token_embd", VOCAB, WIDTH)
    for index in range(LAYERS):
        found |= {f"blk.{index}.{name}": shape for name, shape in layer(index).items()}
    found |= norm(output_norm, bias=bias)
    return found if tied else found | dense("output", VOCAB, WIDTH, bias=bias)
