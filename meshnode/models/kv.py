"""What the layers of a model keep of conversations, in bytes, as the engine sizes it.

llama.cpp has caches with a cell a token (llama-kv-cache.cpp), shorter ones for layers that look
back over a window only (llama-kv-cache-iswa.cpp), some with a cell for several tokens
(llama-kv-cache-dsv4.cpp), and states of one size a sequence (llama-memory-recurrent.cpp). Which
layer has which: `layer_memory.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

CELL_MULTIPLE = 256
"""The engine rounds the cells of a sequence up to this (llama-context.cpp, GGML_PAD)."""
UBATCH_TOKENS = 512  # llama.cpp's default --ubatch-size
ROLLBACK_TOKENS = 3  # llama.cpp's default --spec-draft-n-max

CACHE_TYPES = {
    "f32": (1, 4),
    "f16": (1, 2),
    "bf16": (1, 2),
    "q8_0": (32, 34),
    "q5_1": (32, 24),
    "q5_0": (32, 22),
    "q4_1": (32, 20),
    "q4_0": (32, 18),
    "iq4_nl": (32, 18),
}
"""Elements and bytes of a block, by the names of `--cache-type-k`."""


@dataclass(frozen=True)
class Cells:
    """One cache of one layer: what a cell holds, and how many of them there are.

    `k_width`, `v_width`: numbers a cell. `v_padded_width`: of values where flash attention is off,
    when all layers' are as wide as the widest. `window`: tokens looked back on, None for all.
    `ratio`: tokens a cell stands for. `per_sequence`: cells are never shared between sequences.
    """

    k_width: int
    v_width: int = 0
    v_padded_width: int = 0
    window: int | None = None
    ratio: int = 1
    per_sequence: bool = False


@dataclass(frozen=True)
class LayerMemory:
    """What one layer keeps.

    `state_bytes`: of each sequence, whatever its length; kept once more for each token that may
    be taken back where it `rolls_back`. `guessing`: what it keeps besides where it predicts
    further tokens (MTP).
    """

    caches: tuple[Cells, ...] = ()
    state_bytes: int = 0
    rolls_back: bool = False
    guessing: tuple[Cells, ...] = ()

    @property
    def bytes_per_token(self) -> int:
        """Of a conversation without end, at f16: windows and states do not grow with it."""
        return sum(
            -(-2 * (cells.k_width + cells.v_width) // cells.ratio)
            for cells in self.caches
            if cells.window is None
        )


@dataclass(frozen=True)
class CacheOptions:
    """What llama-server is told that decides how large caches become.

    `ctx_tokens` is what all `slots` share. `unified`: one pool of cells for all of them.
    `whole_windows`: windows get all cells. `rollback_tokens`: how many a wrong guess takes back.
    `guessing`: with layers that predict further tokens.
    """

    ctx_tokens: int
    slots: int = 1
    k_type: str = "f16"
    v_type: str = "f16"
    ubatch_tokens: int = UBATCH_TOKENS
    unified: bool = False
    whole_windows: bool = False
    flash_attention: bool = True
    rollback_tokens: int = 0
    guessing: bool = False

    @property
    def sequence_cells(self) -> int:
        """Cells of one sequence, or of the pool for all."""
        whole = _padded(self.ctx_tokens)
        return whole if self.unified else _padded(whole // self.slots)


def memory_bytes(memory: LayerMemory, options: CacheOptions) -> int:
    """What a layer keeps, of all sequences together."""
    caches = memory.caches + (memory.guessing if options.guessing else ())
    copies = 1 + (options.rollback_tokens if memory.rolls_back else 0)
    states_bytes = memory.state_bytes * options.slots * copies
    return states_bytes + sum(sum(cells_bytes(cells, options)) for cells in caches)


def window_cells(memory: LayerMemory, options: CacheOptions) -> int:
    """How many cells a sequence, or the pool for all, has in the layer's caches with a window; 0
    without one."""
    windowed = [cells for cells in memory.caches + memory.guessing if cells.window is not None]
    return max((_cells_of_one(cells, options) for cells in windowed), default=0)


def latent_bytes(memory: LayerMemory, options: CacheOptions) -> int:
    """The largest of the layer's caches without values of their own."""
    latent = [cells for cells in memory.caches if not cells.v_width]
    return max((sum(cells_bytes(cells, options)) for cells in latent), default=0)


def cells_bytes(cells: Cells, options: CacheOptions) -> tuple[int, int]:
    """What one cache takes: its keys and its values."""
    sequences = 1 if _in_pool(cells, options) else options.slots
    count = sequences * _cells_of_one(cells, options)
    v_width = cells.v_width if options.flash_attention else cells.v_padded_width
    return (
        count * _row_bytes(cells.k_width, options.k_type),
        count * _row_bytes(v_width, options.v_type),
    )


def _in_pool(cells: Cells, options: CacheOptions) -> bool:
    return options.unified and not cells.per_sequence


def _cells_of_one(cells: Cells, options: CacheOptions) -> int:
    """Cells of one sequence, or of the pool for all."""
    count = options.sequence_cells
    if cells.window is not None and not options.whole_windows:
        sequences = options.slots if _in_pool(cells, options) else 1
        count = _padded(min(count, cells.window * sequences + options.ubatch_tokens))
    if cells.ratio > 1:
        count = _padded(max(1, -(-count // cells.ratio)))
    return count


def _row_bytes(width: int, kind: str) -> int:
    block_elements, block_bytes = CACHE_TYPES[kind]
    return -(-width // block_elements) * block_bytes


def _padded(tokens: int) -> int:
    return max(1, -(-tokens // CELL_MULTIPLE)) * CELL_MULTIPLE
