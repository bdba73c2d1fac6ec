"""Random tensors in every type that the engine loads weights of.

The gguf package encodes some types. Of the others blocks are drawn: any bits are valid quants, only
the scales must be sensible. Layouts are those of ggml-common.h upstream.
"""

from __future__ import annotations

from dataclasses import dataclass

import gguf
import numpy as np
import numpy.typing as npt

from tests.engine.blocks import Shape
from tests.engine.random_models import Encoded

Kind = gguf.GGMLQuantizationType


@dataclass(frozen=True)
class Layout:
    """A type that the package does not encode; where in a block its float16 scales lie.

    `unit` is how large values are, about, that have the scale 1.
    """

    type: int
    weights: int
    size_bytes: int
    scales: tuple[int, ...]
    unit: float


DRAWN = {
    "Q2_K": Layout(10, 256, 84, (80, 82), 16),
    "Q3_K": Layout(11, 256, 110, (108,), 42),
    "Q4_K": Layout(12, 256, 144, (0, 2), 300),
    "Q5_K": Layout(13, 256, 176, (0, 2), 600),
    "Q6_K": Layout(14, 256, 210, (208,), 1400),
    "IQ2_XXS": Layout(16, 256, 66, (0,), 40),
    "IQ2_XS": Layout(17, 256, 74, (0,), 40),
    "IQ3_XXS": Layout(18, 256, 98, (0,), 100),
    "IQ1_S": Layout(19, 256, 50, (0,), 8),
    "IQ4_NL": Layout(20, 32, 18, (0,), 70),
    "IQ3_S": Layout(21, 256, 110, (0,), 100),
    "IQ2_S": Layout(22, 256, 82, (0,), 40),
    "IQ4_XS": Layout(23, 256, 136, (0,), 1300),
    "Q1_0": Layout(41, 128, 18, (0,), 1),
    "Q2_0": Layout(42, 64, 18, (0,), 1.5),
}
ENCODED = {
    kind.name: kind
    for kind in (
        *(Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0),
        *(Kind.TQ1_0, Kind.TQ2_0, Kind.MXFP4),
    )
}
TYPES = (*ENCODED, *DRAWN, "IQ1_M", "NVFP4")


def random_tensor(name: str, shape: Shape, seed: int) -> Encoded:
    """Values of variance about 1/fan-in in the type called `name`."""
    rng = np.random.default_rng(seed)
    size = float(1 / np.sqrt(shape[-1]))
    if name in ENCODED:
        values = rng.standard_normal(shape, dtype=np.float32) * np.float32(size)
        return Encoded(int(ENCODED[name]), gguf.quants.quantize(values, ENCODED[name]))
    if name == "IQ1_M":
        return _with_split_scale(shape, rng, size)
    if name == "NVFP4":
        return _with_small_float_scales(shape, rng)
    layout = DRAWN[name]
    blocks = _draw(shape, rng, layout.weights, layout.size_bytes)
    for at in layout.scales:
        blocks[:, at : at + 2] = _half(size / layout.unit)
    return Encoded(layout.type, blocks)


def _draw(
    shape: Shape, rng: np.random.Generator, weights: int, size_bytes: int
) -> npt.NDArray[np.uint8]:
    count = int(np.prod(shape)) // weights
    return np.frombuffer(rng.bytes(count * size_bytes), np.uint8).reshape(count, -1).copy()


def _half(value: float) -> npt.NDArray[np.uint8]:
    return np.frombuffer(np.float16(value).tobytes(), np.uint8)


def _with_split_scale(shape: Shape, rng: np.random.Generator, size: float) -> Encoded:
    """IQ1_M keeps its scale's four nibbles at the top of the last four 16-bit words."""
    blocks = _draw(shape, rng, 256, 56)
    bits = int(np.float16(size / 8).view(np.uint16))
    for nibble in range(4):
        at = 48 + 2 * nibble + 1
        blocks[:, at] = (blocks[:, at] & 0x0F) | (bits >> 4 * nibble & 0xF) << 4
    return Encoded(int(Kind.IQ1_M), blocks)


def _with_small_float_scales(shape: Shape, rng: np.random.Generator) -> Encoded:
    """NVFP4 has four scales a block, in eight bits each: 0x10 is a 32nd."""
    blocks = _draw(shape, rng, 64, 36)
    blocks[:, :4] = 0x10
    return Encoded(int(Kind.NVFP4), blocks)
