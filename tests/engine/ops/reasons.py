"""Why a case that the CPU computes is kept from a worker: each operation left out says it.

Kept local means planned around: the client's `supports_op` says no (patch 0008), and the scheduler
gives the node to the orchestrator. Looked up in llama.cpp's src, common, tools/server and
tools/mtmd.
"""

from __future__ import annotations

_TRAINING = "training only"
_PROJECTOR = "only projectors of images and sound build it, which the orchestrator computes itself"
_NOBODY = "no program of the engine builds it"
_CACHE = "no K or V cache has such a type"

REASONS = {
    "ACC": _NOBODY,
    "COL2IM_1D": _PROJECTOR,
    "CONV_2D": _PROJECTOR,
    "CONV_2D_DW": _PROJECTOR,
    "CONV_3D": _NOBODY,
    "CONV_TRANSPOSE_1D": _NOBODY,
    "CONV_TRANSPOSE_2D": _NOBODY,
    "COUNT_EQUAL": _TRAINING,
    "CPY": "between two strided tensors of blocks: no program of the engine builds it",
    "CROSS_ENTROPY_LOSS": _TRAINING,
    "CROSS_ENTROPY_LOSS_BACK": _TRAINING,
    "DIAG_MASK_INF": _NOBODY,
    "FLASH_ATTN_EXT": _CACHE,
    "GET_ROWS_BACK": _TRAINING,
    "IM2COL_3D": _NOBODY,
    "LEAKY_RELU": _NOBODY,
    "OPT_STEP_ADAMW": _TRAINING,
    "OPT_STEP_SGD": _TRAINING,
    "OUT_PROD": _TRAINING,
    "PAD_REFLECT_1D": _PROJECTOR,
    "POOL_1D": _PROJECTOR,
    "REPEAT_BACK": _TRAINING,
    "RMS_NORM_BACK": _TRAINING,
    "ROLL": _PROJECTOR,
    "SET_ROWS": _CACHE,
    "SILU_BACK": _TRAINING,
    "SOFT_MAX_BACK": _TRAINING,
    "SUM": "of a transposed tensor: no program of the engine builds it",
    "TIMESTEP_EMBEDDING": _NOBODY,
    "UPSCALE": _PROJECTOR,
}
