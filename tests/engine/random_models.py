"""GGUF files of any architecture with random weights whose greedy tokens leave no near-ties.

Noise has near-ties: of 288 tokens the best two lie close together now and then, and then the order
of a sum decides. So the output knows a few loud tokens and many quiet ones: among few the best is
ahead by more, texts of few tokens repeat themselves (which is what n-gram speculation lives on),
and the layers still decide which.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from zlib import crc32

import gguf
import numpy as np
import numpy.typing as npt

from tests.engine.blocks import VOCAB, Architecture, Shape, Value
from tests.engine.vocabulary import FIRST_WORD, add_vocabulary

WORDS = VOCAB - FIRST_WORD
LOUD = range(VOCAB - 6, VOCAB)
LOUD_GAIN = 8.0
F32 = int(gguf.GGMLQuantizationType.F32)
EMBEDDINGS = ("token_embd.weight", "output.weight")
OUTPUT_NORMS = ("output_norm.weight", "token_embd_norm.weight")


@dataclass(frozen=True)
class Encoded:
    """A tensor's bytes and the number of its type, which may be newer than the gguf package."""

    type: int
    data: npt.NDArray[np.generic]


def write_model(
    path: Path,
    architecture: Architecture,
    *,
    seed: int = 0,
    encode: Callable[[str, Shape], Encoded | None] = lambda name, shape: None,
) -> Path:
    """float32, but for the tensors that `encode` makes."""
    writer = gguf.GGUFWriter(str(path), architecture.arch)
    writer.add_name("random")  # a name that upstream knows makes it expect that model's tokens
    for key, value in architecture.metadata.items():
        _add(writer, f"{architecture.arch}.{key}", value)
    add_vocabulary(writer, (f"\u2581w{number}" for number in range(WORDS)))
    writer.add_token_type_count(2)
    tensors = {
        name: encode(name, shape)
        or Encoded(F32, random_weights(name, shape, seed, tied=architecture.tied))
        for name, shape in architecture.tensors.items()
    }
    for name, tensor in tensors.items():
        shape = architecture.tensors[name]
        kind = cast("gguf.GGMLQuantizationType", tensor.type)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), tensor.data.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors.values():
        writer.write_tensor_data(tensor.data)
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Value) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def random_weights(name: str, shape: Shape, seed: int, *, tied: bool) -> npt.NDArray[np.float32]:
    """Activations neither die nor explode with depth; every tensor changes the answer."""
    rng = np.random.default_rng([seed, crc32(name.encode())])
    values = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("ssm_a"):
        return -np.exp(values)  # what decays
    if ("norm" in name and name.endswith(".weight")) or "rope_" in name or name.endswith("ssm_d"):
        scale = 1 + np.float32(0.2) * np.clip(values, -3, 3)
        if tied and name in OUTPUT_NORMS:
            # Else every token would be most like itself, and follow itself.
            scale *= np.sign(rng.standard_normal(shape, dtype=np.float32))
        return scale
    if len(shape) == 1:
        return values * np.float32(0.2)
    if name in EMBEDDINGS:
        loud = name == "output.weight" or tied
        return _louder(values, shape) if loud else values
    return values * np.float32(1.5 / np.sqrt(shape[-1]))


def _louder(values: npt.NDArray[np.float32], shape: Shape) -> npt.NDArray[np.float32]:
    values = values * np.float32(1 / np.sqrt(shape[-1]))
    values[list(LOUD)] *= np.float32(LOUD_GAIN)
    return values
