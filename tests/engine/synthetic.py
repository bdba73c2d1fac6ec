"""Random llama-architecture GGUF files that the real engine loads, small or a gigabyte large.

The weights are noise, so the text is noise too, but it is the *same* noise for the same seed:
greedy tokens tell whether two runs used the same weights. Tensors are written one at a time, so a
model of any size needs the memory of its largest tensor only, and a gigabyte takes a few seconds.

Formats: the GGUF specification (ggml/docs/gguf.md upstream), Q8_0 blocks (ggml-common.h:
one float16 scale, then 32 signed bytes).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from tests.engine.vocabulary import FIRST_WORD, add_vocabulary

Q8_0_BLOCK = 32
Q8_0_BLOCK_BYTES = 34
# The standard deviation of a byte drawn uniformly from -128..127.
BYTE_STD = 73.9
CONTEXT_TOKENS = 4096

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
"""The generation prompt ends without a blank, which a grammar could not tell from an answer's."""

QUANTIZATION = {
    "F32": gguf.GGMLQuantizationType.F32,
    "F16": gguf.GGMLQuantizationType.F16,
    "Q8_0": gguf.GGMLQuantizationType.Q8_0,
}


@dataclass(frozen=True)
class Weight:
    """One tensor to be written: shape outermost first (numpy order), as in the file's rows."""

    name: str
    shape: tuple[int, ...]
    norm: bool = False


def make_model(
    path: Path,
    *,
    layers: int = 4,
    width: int = 256,
    vocab: int = 512,
    heads: int = 4,
    kv_heads: int | None = None,
    ffn: int = 512,
    type: str = "Q8_0",
    seed: int = 0,
    shards: int = 1,
    tied: bool = False,
    experts: int = 0,
    name: str = "synthetic",
    hollow: bool = False,
) -> Path:
    """Write a random model and return the path to load (the first shard when `shards` > 1).

    `kv_heads`: fewer than `heads` where several of them share keys and values (all: their own).
    `width` and `ffn` are multiples of 32 (a Q8_0 block), `vocab` is at least 260 (the control and
    byte tokens, the blank). `tied` leaves `output.weight` out: the embedding serves as the output
    too. With `experts` the feed-forward part is a mixture of that many, two used per token. A
    `hollow` one is a header, and a hole as long as the weights would be.
    """
    if vocab < 260 or width % Q8_0_BLOCK or ffn % Q8_0_BLOCK or width % heads:
        raise ValueError("vocab >= 260; width and ffn multiples of 32; heads divides width")
    kv_heads = kv_heads or heads
    kv_width = width // heads * kv_heads
    weights = list(_weights(layers, width, kv_width, vocab, ffn, tied=tied, experts=experts))
    per_shard = -(-len(weights) // shards)
    paths = [_shard_path(path, index, shards) for index in range(shards)]
    for index, shard_path in enumerate(paths):
        writer = gguf.GGUFWriter(str(shard_path), "llama")
        if index == 0:
            _add_metadata(writer, layers, width, vocab, (heads, kv_heads), ffn, experts, type, name)
        if shards > 1:
            writer.add_uint16(gguf.Keys.Split.LLM_KV_SPLIT_NO, index)
            writer.add_uint16(gguf.Keys.Split.LLM_KV_SPLIT_COUNT, shards)
            writer.add_int32(gguf.Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT, len(weights))
        first = index * per_shard
        mine = weights[first : first + per_shard]
        _write_header(writer, mine, type)
        if hollow:
            _leave_room(writer, shard_path, mine, type)
            continue
        for number, weight in enumerate(mine, start=first):
            writer.write_tensor_data(_noise(weight, _kind(weight, type), seed, number))
        writer.close()
    return paths[0]


def make_model_of_size(path: Path, *, size_bytes: int, seed: int = 0) -> Path:
    """Write a Q8_0 model of about `size_bytes` (within one layer, about 13 MB)."""
    width, ffn, vocab = 1024, 2816, 4096
    layer_weights = 4 * width * width + 3 * width * ffn
    layer_bytes = layer_weights * Q8_0_BLOCK_BYTES // Q8_0_BLOCK
    fixed_bytes = 2 * vocab * width * Q8_0_BLOCK_BYTES // Q8_0_BLOCK
    layers = max(1, (size_bytes - fixed_bytes) // layer_bytes)
    return make_model(
        path, layers=layers, width=width, vocab=vocab, heads=16, ffn=ffn, type="Q8_0", seed=seed
    )


def _shard_path(path: Path, index: int, shards: int) -> Path:
    if shards == 1:
        return path
    return path.with_name(f"{path.stem}-{index + 1:05d}-of-{shards:05d}.gguf")


def _weights(
    layers: int, width: int, kv_width: int, vocab: int, ffn: int, *, tied: bool, experts: int
) -> list[Weight]:
    found = [Weight("token_embd.weight", (vocab, width))]
    for layer in range(layers):
        prefix = f"blk.{layer}."
        found.append(Weight(prefix + "attn_norm.weight", (width,), norm=True))
        found += [
            Weight(f"{prefix}attn_{part}.weight", (rows, width))
            for part, rows in (("q", width), ("k", kv_width), ("v", kv_width), ("output", width))
        ]
        found.append(Weight(prefix + "ffn_norm.weight", (width,), norm=True))
        if experts:
            found += [
                Weight(prefix + "ffn_gate_inp.weight", (experts, width), norm=True),
                Weight(prefix + "ffn_gate_exps.weight", (experts, ffn, width)),
                Weight(prefix + "ffn_up_exps.weight", (experts, ffn, width)),
                Weight(prefix + "ffn_down_exps.weight", (experts, width, ffn)),
            ]
        else:
            found += [
                Weight(prefix + "ffn_gate.weight", (ffn, width)),
                Weight(prefix + "ffn_up.weight", (ffn, width)),
                Weight(prefix + "ffn_down.weight", (width, ffn)),
            ]
    found.append(Weight("output_norm.weight", (width,), norm=True))
    if not tied:
        found.append(Weight("output.weight", (vocab, width)))
    return found


def _add_metadata(
    writer: gguf.GGUFWriter,
    layers: int,
    width: int,
    vocab: int,
    heads: tuple[int, int],
    ffn: int,
    experts: int,
    type: str,
    name: str,
) -> None:
    writer.add_name(name)
    writer.add_context_length(CONTEXT_TOKENS)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads[0])
    writer.add_head_count_kv(heads[1])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // heads[0])
    writer.add_vocab_size(vocab)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    # Without the blank alone, a grammar that wants one has no token left to allow.
    words = (f"\u2581w{number}" for number in range(vocab - FIRST_WORD - 1))
    add_vocabulary(writer, ("\u2581", *words))
    writer.add_chat_template(CHAT_TEMPLATE)
    writer.add_file_type(
        {
            "F32": gguf.LlamaFileType.ALL_F32,
            "F16": gguf.LlamaFileType.MOSTLY_F16,
            "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
        }[type]
    )


def _write_header(writer: gguf.GGUFWriter, weights: list[Weight], type: str) -> None:
    for weight in weights:
        kind = _kind(weight, type)
        writer.add_tensor_info(
            weight.name,
            gguf.quant_shape_to_byte_shape(weight.shape, kind)
            if kind is gguf.GGMLQuantizationType.Q8_0
            else weight.shape,
            np.dtype(np.uint8 if kind is gguf.GGMLQuantizationType.Q8_0 else np.float32),
            _nbytes(weight, kind),
            raw_dtype=kind,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _leave_room(writer: gguf.GGUFWriter, path: Path, weights: list[Weight], type: str) -> None:
    writer.close()
    alignment = writer.data_alignment
    sizes = [path.stat().st_size, *(_nbytes(weight, _kind(weight, type)) for weight in weights)]
    os.truncate(path, sum(-(-size // alignment) * alignment for size in sizes))


def _kind(weight: Weight, type: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType.F32 if weight.norm else QUANTIZATION[type]


def _nbytes(weight: Weight, kind: gguf.GGMLQuantizationType) -> int:
    elements = math.prod(weight.shape)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return elements // block * block_bytes


def _noise(
    weight: Weight, kind: gguf.GGMLQuantizationType, seed: int, index: int
) -> npt.NDArray[np.generic]:
    """Weights of variance 1/fan-in, so that activations neither die nor explode with depth."""
    rng = np.random.default_rng([seed, index])
    if weight.norm and len(weight.shape) == 1:
        return np.ones(weight.shape, dtype=np.float32)
    std = 1.0 / np.sqrt(weight.shape[-1])
    if kind is not gguf.GGMLQuantizationType.Q8_0:
        values = rng.standard_normal(weight.shape, dtype=np.float32) * np.float32(std)
        return values.astype(np.float16 if kind is gguf.GGMLQuantizationType.F16 else np.float32)
    blocks = int(np.prod(weight.shape)) // Q8_0_BLOCK
    raw = np.frombuffer(rng.bytes(blocks * Q8_0_BLOCK_BYTES), dtype=np.uint8).copy()
    raw = raw.reshape(blocks, Q8_0_BLOCK_BYTES)
    raw[:, :2] = np.frombuffer(np.float16(std / BYTE_STD).tobytes(), dtype=np.uint8)
    return raw.reshape(*weight.shape[:-1], -1)
