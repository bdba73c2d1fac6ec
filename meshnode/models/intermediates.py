"""What computing with a model takes besides its widths: measured on what the pinned llama.cpp
reserves (`tests/meshnode/pipeline/test_compute.py`), as its graphs (src/models) suggest.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshnode.models.layer_memory import Heads
from meshnode.models.metadata import Metadata
from meshnode.models.recurrence import HYBRID, KDA, RECURRENT, RWKV

_WITHOUT_FLASH_ATTENTION = frozenset(("grok",))
_SCORES_OF_EACH_HEAD = frozenset(("qwen4exp", "glm5-next"))
"""An index's scores, before they are summed; elsewhere one operation does both."""
_INDEX_VECTORS = 2
_LINEAR_VECTORS = 16
_ATTENTION_VECTORS, _STATE_VECTORS = 5, 5
_SCORE_COPIES = 5
"""Of an index's scores: computed, ranked, and made a mask of."""
_FLOAT_BYTES, _HALF_BYTES = 4, 2


@dataclass(frozen=True)
class Intermediates:
    """`n_head`: at most in a layer. `recurrent_width`: numbers of one token in the middle of a
    layer with a state; `index_width`: those of an index that chooses what to attend to, and
    `score_bytes` its scores for each pair of a token and a cell. `flash_attention`: whether the
    engine has it for this architecture.
    """

    n_head: int = 0
    recurrent_width: int = 0
    index_width: int = 0
    score_bytes: int = 0
    flash_attention: bool = True


NO_INTERMEDIATES = Intermediates()


def intermediates(metadata: Metadata, heads: Heads, n_embd: int) -> Intermediates:
    index_head = metadata.number("attention.indexer.key_length", default=0)
    index_heads = metadata.number("attention.indexer.head_count", default=0) if index_head else 0
    score_bytes = _SCORE_COPIES * _FLOAT_BYTES if index_head else 0
    if metadata.arch in _SCORES_OF_EACH_HEAD:
        score_bytes += index_heads * _HALF_BYTES
    return Intermediates(
        n_head=max(heads.n_head),
        recurrent_width=_recurrent_width(metadata, heads, n_embd),
        index_width=_INDEX_VECTORS * index_heads * index_head,
        score_bytes=score_bytes,
        flash_attention=metadata.arch not in _WITHOUT_FLASH_ATTENTION,
    )


def _recurrent_width(metadata: Metadata, heads: Heads, n_embd: int) -> int:
    if metadata.arch not in RECURRENT | HYBRID:
        return 0
    if metadata.arch in RWKV | KDA | {"minimax-01"}:
        head = metadata.number("kda.head_dim", default=heads.k)
        return _LINEAR_VECTORS * max(n_embd, max(heads.n_head) * head)
    inner = metadata.number("ssm.inner_size", default=0)
    groups = metadata.number("ssm.group_count", default=0)
    state = metadata.number("ssm.state_size", default=0)
    return _ATTENTION_VECTORS * n_embd + _STATE_VECTORS * (inner + groups * state)
